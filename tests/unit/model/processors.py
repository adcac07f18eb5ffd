"""What a test asks of the processor."""

import pytest
import torch

with_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="instructions of AVX2 would end the process",
)
