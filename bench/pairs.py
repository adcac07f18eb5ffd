"""How many pairs of user and item the rating network scores a second when all is at hand.

`predictor` is the way of the scorer: rows in the host's memory, gathered, scored and calibrated.
`network` is the fused network alone, with its inputs on the device already.
"""

from collections.abc import Callable, Mapping

import torch
from rich.console import Console

from bench.clock import seconds
from bench.model import default_models
from bench.rows import make_item_tables, make_rows
from model import bundle, registry
from model import device as devices
from model.network import gather, tensors
from model.predict import predictor
from model.replay import History

USERS, ITEMS = 20_000, 10_000
ROWS = 8_192  # pairs at once
KNOWN_EVENTS = 100_000  # what users and items are known by


def pair_rates(pairs: int, device: str, console: Console) -> Mapping[str, float]:
    """Pairs a second of the default bundle on a device."""
    url = default_models(console)
    stable = registry.read(url).stable
    assert stable is not None  # `default_models` promotes what it fits
    ready = predictor(bundle.load(url, stable.version, stable.sha256), device)
    network = ready.network
    assert network is not None  # a bundle has one
    attributes, vectors = make_item_tables(ITEMS, ready.vector_width)
    history = History(attributes, vectors=vectors, batch_events=ROWS)
    rows = make_rows(KNOWN_EVENTS + ROWS, USERS, ITEMS)
    history.apply(rows[:KNOWN_EVENTS])
    asked = rows[KNOWN_EVENTS:]
    observation, lookups = history.look(asked)
    target = devices.find(device)
    resident = tensors(
        network.config, gather(asked, observation, lookups, ready.vector_width), target
    )

    def alone() -> None:
        with torch.inference_mode():
            network(resident)

    def whole() -> None:
        ready.predict(asked, observation, lookups)

    return {
        "predictor": _rate(whole, pairs, target),
        "network": _rate(alone, pairs, target),
    }


def _rate(score: Callable[[], None], pairs: int, device: torch.device) -> float:
    times = -(-pairs // ROWS)

    def scores() -> None:
        for _ in range(times):
            score()

    score()  # what is set up at first is not timed
    return times * ROWS / seconds(scores, device)
