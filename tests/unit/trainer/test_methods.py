"""Which weights of an encoder a method fits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import encoder as encoders
from trainer import methods
from trainer.config import FineTuneConfig


def test_a_model_without_layers_takes_no_adapters(encoder_folder: Path) -> None:
    bare = replace(encoders.load(encoder_folder, "cpu"), model=torch.nn.Linear(2, 2))
    with pytest.raises(encoders.EncoderError, match="no stack of layers"):
        methods.trainable(bare, "adapters", FineTuneConfig(), 1)
