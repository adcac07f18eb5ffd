"""From what was observed to predictions: one path for every caller and any number of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from model import device as devices
from model import ladder
from model.bundle import Bundle
from model.calibration import Calibration, Reals, Singles, calibrate
from model.events import EVENT, REVIEW, Rows, blank
from model.exceptions import BundleError
from model.ids import NONE, hash_ids
from model.lookups import Lookups, table, vectors_of
from model.network import FusedNetwork, Inputs, gather, tensors
from model.replay import History, Observation, recover
from model.serving import Served
from model.state import ITEM_ATTRIBUTES, PARTITION, USER
from model.state_bytes import from_bytes, to_bytes

# Rows pass the network on a device in blocks of one size, the last one padded: see `serving`.
_BLOCK = 2048


@dataclass(frozen=True)
class Predictions:
    """What is said of n events."""

    rating: Singles  # (n,) stars, the mean of the distribution
    distribution: Singles  # (n, 5) over 1 to 5 stars
    low: Singles  # (n,) the interval that holds the rating in 80 of 100 cases
    high: Singles  # (n,)
    tier: NDArray[np.uint8]  # (n,) positions in ladder.TIERS
    version: str

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers; weights that are numbers may give others."""
        return bool(np.isfinite(self.distribution).all())


@dataclass(frozen=True)
class Predictor:
    """A model that is ready to serve; without a network, the cold-start ladder."""

    version: str
    network: FusedNetwork | None
    calibration: Calibration
    encoder_hash: str | None  # whose vectors it reads

    @cached_property
    def _outputs(self) -> Callable[[Inputs], tuple[Reals, Reals]]:
        assert self.network is not None
        return _ready(self.network)

    @property
    def vector_width(self) -> int:
        """Length of the vectors that it reads; 0: none."""
        return self.network.config.vector if self.network else 0

    def predict(self, events: Rows, observation: Observation, lookups: Lookups) -> Predictions:
        """Predictions for EVENT rows (n), bit for bit the same alone and in any batch."""
        if self.network is None:
            mean, logits = ladder.outputs(observation.features)
        else:
            inputs = gather(events, observation, lookups, self.vector_width)
            mean, logits = self._outputs(inputs)
        rating, shares, low, high = calibrate(mean, logits, self.calibration)
        tier = ladder.tiers(observation.features)
        return Predictions(rating, shares, low, high, tier, self.version)


def predictor(bundle: Bundle | None, device: str = "auto") -> Predictor:
    """A predictor of a bundle, on a device; of the cold-start ladder when there is none."""
    if bundle is None:
        return Predictor(ladder.VERSION, None, Calibration(), None)
    network = bundle.network.to(devices.find(device)).eval()
    return Predictor(bundle.version, network, bundle.calibration, bundle.encoder_hash)


def warm(predictor: Predictor) -> None:
    """Predict for an invented shopper, as a worker does before it takes work on.

    After it all loops of `model.compiled` are compiled, for one event and for several: arrays of
    one row are of another kind. At a machine's first run that takes ten seconds and more, in which
    a worker that has partitions would be silent and lose them.

    Raises BundleError where it says what is no number.
    """
    items = hash_ids(["a", "b", "c", "d"])
    attributes = blank(ITEM_ATTRIBUTES, len(items))
    attributes["text"] = items
    vectors = np.ones((len(items), max(predictor.vector_width, 1)), np.float32)
    events = blank(EVENT, len(items))
    events["user"], events["item"], events["event_id"] = NONE + 1, items, items
    events["action"], events["rating"], events["time"] = REVIEW, 4, 1
    known = table(items, attributes)
    history = History(known, vectors=vectors_of(items, vectors), batch_events=len(items) - 1)
    states, partition = from_bytes(to_bytes(blank(USER, 1)), USER), blank(PARTITION, ())
    for batch in history.run(events):
        some, result = events[batch.rows], batch.result
        if not predictor.predict(some, result.observation, batch.lookups).finite:
            raise BundleError(f"{predictor.version} predicts what is no number; train again")
        rows, index = result.observation.features, np.zeros(len(some), np.intp)
        states, partition = recover(
            states, index, partition, some, rows, result.duplicate, result.step
        )


def raw_outputs(network: FusedNetwork, inputs: Inputs) -> tuple[Reals, Reals]:
    """Mean (n,) and logits (n, 5) of a network as it serves, not calibrated."""
    return _ready(network)(inputs)


def _ready(network: FusedNetwork) -> Callable[[Inputs], tuple[Reals, Reals]]:
    """What gives a network's outputs on the device where it is."""
    if network.prior.device.type == "cpu":
        return Served(network).outputs
    return partial(_outputs_on_device, network)


@torch.inference_mode()
def _outputs_on_device(network: FusedNetwork, inputs: Inputs) -> tuple[Reals, Reals]:
    count = len(inputs)
    padded = np.arange(count + -count % _BLOCK)
    padded[count:] = 0
    outputs = np.empty((len(padded), 6))
    for first in range(0, len(padded), _BLOCK):
        some = inputs.take(padded[first : first + _BLOCK])
        rows = tensors(network.config, some, network.prior.device, all_older=True)
        output = network(rows)
        outputs[first : first + _BLOCK, 0] = output.mean.cpu()
        outputs[first : first + _BLOCK, 1:] = output.logits.cpu()
    return outputs[:count, 0], outputs[:count, 1:]
