"""Texts: the transformer over new item and review texts.

An item's text becomes a vector in the store, kept under encoder and text hash for good. A review's
text becomes a distribution over stars: a predicted rating of kind `review` and text features for
its user. It has a group of its own, so however slow it is, the scorer never waits for it.

A header in the store says, for an encoder and a partition of `items`, up to which offset there are
vectors. When the store has lost some, or the encoder is another, `items` is read from there again;
what has a vector already is not encoded again.
"""

import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from confluent_kafka import Message
from numpy.typing import NDArray

from model import encoder
from model.bundle import Bundle
from model.calibration import NORMAL_80
from model.catalog import item_text
from model.distribution import mean_and_deviation
from model.encoder import TextEncoder, review_text
from model.engine import Engine
from model.events import DAY_MS
from model.ids import hash_ids
from schemas.codec import Column, encode_columns, format_times, time_ms
from schemas.records import Review
from streams import coverage
from streams.claims import ends
from streams.config import ModelsConfig, TextsConfig
from streams.digests import NO_TIER, Digests, Scored
from streams.exceptions import StoreError
from streams.inputs import Inputs, split
from streams.metrics import Metrics
from streams.models import Models, Serving
from streams.predictions import rounded
from streams.processor import Offsets, Outcome, OutputBatch, Position
from streams.reader import VECTOR_DTYPE, vector_keys
from streams.store import Store

LINGER_SECONDS = 0.02
CHECK_SECONDS = 5.0  # a store that lost its vectors, and a new encoder, are noticed this soon


class Texts:
    """One worker's text lane, a processor of `streams.loop`."""

    name = "texts"
    topics = ("items", "reviews")
    together = False
    transactional = True
    linger_seconds = LINGER_SECONDS

    def __init__(
        self,
        config: TextsConfig,
        models_config: ModelsConfig,
        prefix: str,
        store: Store,
        models: Models,
        metrics: Metrics,
        worker: str,
        digest_seconds: float,
    ) -> None:
        self.batch_size = config.batch_texts
        self._config = config
        self._device = models_config.device
        self._prefix = prefix
        self._store = store
        self._models = models
        self._metrics = metrics
        self._digests = Digests(worker, "review", digest_seconds)
        self._loaded: tuple[Bundle | None, TextEncoder] | None = None
        self._engine: Engine[str, NDArray[np.float32]] | None = None
        # By partition of `items`: under which encoder it is read, and how far its vectors reach.
        self._reached: dict[int, tuple[str, int]] = {}
        self._check_at = 0.0
        self.lag = 0

    def claim(self, committed: Offsets) -> Offsets:
        """Where to read on: `items` from where its vectors end, if that is before the commit.

        Nothing is claimed in the store: a vector never changes under its key. The encoder is loaded
        here, or in `idle`: what a batch sends is in a transaction, and Kafka had ended that before
        a busy machine had loaded it. Raises `StoreError` when it cannot be.
        """
        serving = self._models.reading
        self._encoder(serving)
        used = serving.encoder_hash
        partitions = [partition for partition, topics in committed.items() if "items" in topics]
        starts = dict(committed)
        for partition, reached in zip(
            partitions, coverage.reached(self._store, used, partitions), strict=True
        ):
            self._reached[partition] = used, reached
            if used:
                before = min(committed[partition]["items"], reached)
                starts[partition] = committed[partition] | {"items": before}
        return starts

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget how far vectors reach."""
        for partition in partitions:
            self._reached.pop(partition, None)

    def idle(self) -> Outcome | None:
        """Digests that are due; now and then, a look at the vectors' headers.

        Raises `StoreError` as `process` does.
        """
        if self._reached:
            self._encoder(self._models.reading)
        if time.monotonic() > self._check_at:
            self._check_at = time.monotonic() + CHECK_SECONDS
            self._check(self._models.reading, self._reached)
        digests = self._digests.due(self.lag)
        return Outcome(outputs=digests) if digests else None

    def close(self) -> None:
        """End the encoder's thread."""
        if self._engine is not None:
            self._engine.close()

    def process(self, messages: list[Message]) -> Outcome:
        """Encode the new texts of one batch, items before reviews.

        Bad records are left to the processors that own their topics, which make them dead letters.
        Vectors are stored before the commit: after it, a store that is gone would lose them, and
        stored twice they are the same. Raises `StoreError` when the store has lost vectors, the
        encoder is another than at the claim, or cannot be loaded: then the loop claims again.
        """
        inputs, _ = split(messages, self._prefix, self.name)
        reviews, forgotten = _apart(inputs.get("reviews"))
        serving = self._models.reading
        reached = ends(messages, self._prefix + "items")
        self._check(serving, reached)
        text_encoder = self._encoder(serving)
        counts = Counter[str]()
        batches: list[OutputBatch] = []
        scored: Scored | None = None
        if text_encoder is None:
            counts["skipped: no encoder"] = len(messages)
        else:
            vectors = self._encode_items(text_encoder, inputs.get("items"), counts)
            self._store.put(*vectors)
            self._reach(serving.encoder_hash, reached)
            batches, scored = self._encode_reviews(serving, text_encoder, reviews, counts)
        if forgotten:
            counts["forget"] = len(forgotten)
            batches = _after(batches, forgotten)

        def finish(_: dict[Position, int]) -> None:
            for kind, count in counts.items():
                self._metrics.events.labels(self.name, kind).inc(count)
            if scored is not None:
                self._digests.add(scored)

        return Outcome(batches=batches, finish=finish)

    def _check(self, serving: Serving, partitions: Iterable[int]) -> None:
        """Raise `StoreError` when `items` has to be read again."""
        held = {each: self._reached[each] for each in partitions if each in self._reached}
        if any(used != serving.encoder_hash for used, _ in held.values()):
            raise StoreError("Another encoder serves: items are read again for its vectors.")
        if serving.encoder_hash and held:
            found = coverage.reached(self._store, serving.encoder_hash, held)
            if any(now < known for now, (_, known) in zip(found, held.values(), strict=True)):
                raise StoreError("The store has lost vectors: items are read again for them.")

    def _reach(self, used: str, reached: dict[int, int]) -> None:
        """Write the headers; their vectors are there by now."""
        mine = {partition: end for partition, end in reached.items() if partition in self._reached}
        coverage.reach(self._store, used, mine)
        self._reached |= {partition: (used, end) for partition, end in mine.items()}

    def _encoder(self, serving: Serving) -> TextEncoder | None:
        """The stable model's encoder, loaded when that model has changed."""
        if serving.encoder_folder is None:
            return None
        if self._loaded is None or self._loaded[0] is not serving.bundle:
            loaded = self._load(serving, serving.encoder_folder)
            if self._engine is not None:
                self._engine.close()
            self._loaded = serving.bundle, loaded
            self._engine = Engine(
                lambda texts: list(loaded.encode(texts, self._config.token_budget)),
                self._config.token_budget,
                "texts",
            )
        return self._loaded[1]

    def _load(self, serving: Serving, folder: Path) -> TextEncoder:
        """Raises `StoreError` when it cannot be loaded: its version is refused, or texts wait."""
        try:
            loaded = encoder.load(folder, self._device, serving.star_head, self._config.precision)
            if loaded.graphs is not None:
                loaded.graphs.warm(self._config.token_budget)
            return loaded
        except Exception as error:  # of torch too, as of a device without room
            self._models.refuse_encoder(serving, error)
            raise StoreError(
                f"The encoder of {serving.predictor.version} cannot be loaded, and its texts wait: "
                f"{error}. Promote another version, or set STARCAST_MODELS__ENCODER."
            ) from error

    def _vectors(self, text_encoder: TextEncoder, texts: list[str]) -> NDArray[np.float32]:
        """Hidden vectors, (n, hidden), through the micro-batching engine."""
        assert self._engine is not None  # made with the encoder
        futures: list[Future[NDArray[np.float32]]] = [
            self._engine.submit(text, cost)
            for text, cost in zip(texts, text_encoder.count_tokens(texts), strict=True)
        ]
        return np.stack([future.result() for future in futures])

    def _encode_items(
        self, text_encoder: TextEncoder, inputs: Inputs[list[Any]] | None, counts: Counter[str]
    ) -> tuple[list[bytes], list[bytes]]:
        """Keys and values of the vectors that the store does not have yet."""
        texts = sorted({item_text(each) for each in inputs.records if each} if inputs else set())
        texts = [text for text in texts if text]
        keys = vector_keys(self._store, text_encoder.hash, hash_ids(texts))
        known = self._store.read(keys)
        new = [at for at, value in enumerate(known) if value is None]
        if not new:
            return [], []
        hidden = self._vectors(text_encoder, [texts[at] for at in new])
        vectors = text_encoder.project(hidden).astype(VECTOR_DTYPE)
        counts["item"] = len(new)
        return [keys[at] for at in new], [vector.tobytes() for vector in vectors]

    def _encode_reviews(
        self,
        serving: Serving,
        text_encoder: TextEncoder,
        inputs: Inputs[list[Any]] | None,
        counts: Counter[str],
    ) -> tuple[list[OutputBatch], Scored | None]:
        """What the words of reviews say, where they have any and are not too old."""
        if inputs is None:
            return [], None
        if serving.star_head is None:
            counts["skipped: no star head"] = len(inputs.records)
            return [], None
        days = self._config.age_limit_days
        oldest = time.time() * 1_000 - days * DAY_MS if days else -np.inf
        said = [review_text(each.title, each.text) for each in inputs.records]  # "": no words
        rows = [
            at
            for at, review in enumerate(inputs.records)
            if said[at] and time_ms(review.event_time) >= oldest
        ]
        counts["skipped: too old or no text"] = len(inputs.records) - len(rows)
        if not rows:
            return [], None
        counts["review"] = len(rows)
        hidden = self._vectors(text_encoder, [said[at] for at in rows])
        version, used = serving.predictor.version, text_encoder.hash
        return _told(inputs, rows, text_encoder.stars(hidden), version, used)


def _told(
    inputs: Inputs[list[Any]],
    rows: list[int],
    stars: NDArray[np.float32],
    version: str,
    encoder_hash: str,
) -> tuple[list[OutputBatch], Scored]:
    """Predicted ratings and text features of these reviews (n), whose words mean `stars` (n, 5)."""
    reviews: list[Review] = [inputs.records[at] for at in rows]
    exact = torch.from_numpy(stars.astype(np.float64))
    mean, deviation = (each.numpy() for each in mean_and_deviation(exact))
    now = int(time.time() * 1_000)
    users, items = [each.user_id for each in reviews], [each.item_id for each in reviews]
    shared: dict[str, Column] = {
        "event_id": [each.event_id for each in reviews],
        "user_id": users,
        "item_id": items,
        "event_time": np.array([time_ms(each.event_time) for each in reviews], "M8[ms]"),
        "distribution": rounded(stars),
    }
    low = np.clip(mean - NORMAL_80 * deviation, 1, 5).astype(np.float32)
    high = np.clip(mean + NORMAL_80 * deviation, 1, 5).astype(np.float32)
    predicted = encode_columns(
        shared
        | {
            "predicted_at": format_times(np.array([now]))[0],
            "kind": "review",
            "rating": rounded(np.clip(mean, 1, 5).astype(np.float32)),
            "interval": rounded(np.stack([low, high], axis=1)),
            "model_version": version,
            "source": {
                "topic": "reviews",
                "partition": inputs.partitions()[rows],
                "offset": inputs.offsets()[rows],
            },
        }
    )
    features = encode_columns(shared | {"encoder": encoder_hash})
    scored = Scored(
        version=version,
        ratings=mean.astype(np.float32),
        truths=np.array([each.rating for each in reviews], np.float32),
        tiers=np.full(len(rows), NO_TIER, np.uint8),
        items=items,
        actions=Counter({"review": len(rows)}),
        latencies_ms=(now - inputs.timestamps()[rows]).astype(np.float32),
    )
    # A user's text features go where the user's events came from.
    places = [inputs.messages[at].partition() or 0 for at in rows]
    return [
        OutputBatch(topic, _keyed(users, values, places))
        for topic, values in (("predicted-ratings", predicted), ("text-features", features))
    ], scored


def _apart(
    reviews: Inputs[list[Any]] | None,
) -> tuple[Inputs[list[Any]] | None, list[Message]]:
    """Reviews without the null values among them, each of which erases a user."""
    if reviews is None or None not in reviews.records:
        return reviews, []
    both = list(zip(reviews.messages, reviews.records, strict=True))
    kept = [(message, record) for message, record in both if record is not None]
    left = Inputs(reviews.topic, [each for each, _ in kept], [each for _, each in kept])
    return left, [message for message, record in both if record is None]


def _after(batches: list[OutputBatch], forgotten: list[Message]) -> list[OutputBatch]:
    """The same, and after all texts of a batch the null values that erase users.

    The features of what users wrote before they were erased would make new states of them.
    """
    nulls = [
        {"key": each.key(), "value": None, "partition": each.partition() or 0} for each in forgotten
    ]
    return [*batches, OutputBatch("text-features", nulls)]


def _keyed(users: list[str], values: list[bytes], partitions: list[int]) -> list[dict[str, Any]]:
    return [
        {"key": user.encode(), "value": value, "partition": partition}
        for user, value, partition in zip(users, values, partitions, strict=True)
    ]
