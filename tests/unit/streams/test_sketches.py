import base64
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.exceptions import ContractError
from streams.sketches import encode_latency
from streams.steps import add, close, make_steps
from tests.digests import at, digest, ms
from tests.unit.streams.stepped import INSIGHTS, LATER, steps_of, window_of

COUNTS = (1, 2, 200, 201, 5_000)
SKETCHES = [encode_latency(np.linspace(0, 9, count, dtype=np.float32)) or "" for count in COUNTS]


def test_latency_quantiles_of_merged_sketches() -> None:
    fast, slow = list(np.linspace(1, 50, 500)), list(np.linspace(51, 100, 500))
    window = window_of(
        [
            digest(at(3), [(3.0, None)], latencies_ms=fast),
            digest(at(4), [(3.0, None)], latencies_ms=slow),
        ],
        ms(10),
        INSIGHTS,
    )
    latency = window.kinds["interaction"].latency_ms
    assert latency is not None
    assert latency["p50"] == pytest.approx(50, abs=3)
    assert latency["p99"] == pytest.approx(99, abs=3)
    assert latency["max"] == pytest.approx(100)
    assert encode_latency(np.zeros(0, np.float32)) is None


@pytest.mark.parametrize("sketch", SKETCHES)
def test_latencies_come_back(sketch: str) -> None:
    steps = steps_of([digest(at(5), [(3.0, None)]).model_copy(update={"latency_ms": sketch})])
    window = close(steps, ms(10), INSIGHTS)
    assert window is not None
    latency = window.kinds["interaction"].latency_ms
    assert latency is not None
    assert latency["max"] in (0.0, 9.0)


@given(st.sampled_from(SKETCHES), st.integers(0, 60), st.integers(0, 255), st.integers(1, 4_000))
def test_no_sketch_hangs_insights_or_ends_it(sketch: str, where: int, byte: int, cut: int) -> None:
    """`datasketches` reads for ever, or ends the process, where one is damaged."""
    data = bytearray(base64.b64decode(sketch))
    data[where % len(data)] = byte
    damaged = base64.b64encode(data[:cut]).decode()
    found = digest(at(5), [(3.0, None)]).model_copy(update={"latency_ms": damaged})
    steps = make_steps(INSIGHTS)
    with suppress(ContractError):
        add(steps, found, LATER)
        close(steps, ms(10), INSIGHTS)


@pytest.mark.parametrize(
    ("where", "bytes_"),
    [
        (4, b"\xff"),  # k, so the room of each level
        (8, b"\xff\xff\xff\xff\xff\xff\xff\x7f"),  # values
        (18, b"\x09"),  # levels
        (20, b"\x00"),  # where a level begins
        (-4, b"\x00\x00\xc0\x7f"),  # no number
    ],
)
def test_a_damaged_sketch_is_refused(where: int, bytes_: bytes) -> None:
    data = bytearray(base64.b64decode(SKETCHES[-1]))
    where %= len(data)
    data[where : where + len(bytes_)] = bytes_
    found = digest(at(5), [(3.0, None)]).model_copy(
        update={"latency_ms": base64.b64encode(data).decode()}
    )
    with pytest.raises(ContractError, match="KLL sketch"):
        add(make_steps(INSIGHTS), found, LATER)
