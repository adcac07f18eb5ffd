"""Ratings that are asked for: what they are predicted from, as states and attributes are now."""

import time

import numpy as np
from numpy.typing import NDArray

from model.events import Rows, from_request, joined
from model.ids import Hashes, partitions_of
from model.lookups import Lookups
from model.replay import Observation, observe
from model.state import USER
from streams.reader import USER_STATE, Reader
from streams.store import Store
from streams.user_states import decode_header

HEADER_SECONDS = 1.0  # a partition's running mean moves slowly


class Asking:
    """Reads what pairs of users and items are predicted from; changes nothing."""

    def __init__(self, store: Store, reader: Reader) -> None:
        self._store = store
        self._reader = reader
        self._headers: dict[int, tuple[float, Rows]] = {}

    def observe(
        self, encoder: str, users: Hashes, items: Hashes, times: NDArray[np.int64]
    ) -> tuple[Rows, Observation, Lookups]:
        """EVENT rows (n) that ask for pairs of users and items, and what `predict` takes beside.

        Args:
            encoder: the hash of the encoder whose vectors are read; "" for none.
            users: (n).
            items: (n).
            times: (n) of asking, in ms.
        """
        self._reader.use_encoder(encoder)
        events = from_request(users, items, times)
        distinct, index = np.unique(users, return_inverse=True)
        states = self._reader.states(USER_STATE, distinct, USER)
        lookups = self._reader.lookups(events, states)
        owners, owner = np.unique(partitions_of(users, self._store.partitions), return_inverse=True)
        headers = [self._header(partition)["partition"] for partition in owners.tolist()]
        running = joined([each.copy().reshape(1) for each in headers]).take(owner)
        return events, observe(states.take(index), running, events, lookups), lookups

    def _header(self, partition: int) -> Rows:
        until, header = self._headers.get(partition, (0.0, None))
        if header is None or until < time.monotonic():
            header = decode_header(self._store.header(USER_STATE, partition))
            self._headers[partition] = time.monotonic() + HEADER_SECONDS, header
        return header
