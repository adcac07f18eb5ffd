import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import orjson
import pytest
import torch
from confluent_kafka import Message
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from structlog.testing import capture_logs

from model import encoder, registry
from model.catalog import item_text
from model.ids import hash_ids
from model.state import LAYOUT_HASH
from schemas.records import Item, PredictedRating, Review, TextFeatures
from streams.config import ModelsConfig, RedisConfig, TextsConfig
from streams.exceptions import StoreError
from streams.metrics import make_metrics
from streams.models import Models
from streams.processor import Outcome
from streams.reader import VECTOR_DTYPE, vector_keys
from streams.store import Store
from streams.texts import Texts
from tests.unit.model.bundles import serve_reader, write
from tests.unit.model.encoders import bert
from tests.unit.streams.messages import PREFIX, message

TIME = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder."""
    made = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    bert(made)
    return made


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A models folder whose stable bundle has the encoder and a star head."""
    url = tmp_path_factory.mktemp("models")
    serve_reader(str(url), folder)
    return url


def make(url: str, models: Path, encoder_: Path | str = "none", **config: Any) -> Texts:
    metrics = make_metrics(CollectorRegistry())
    settings = ModelsConfig(url=str(models), encoder=str(encoder_), device="cpu")
    served = Models(settings, metrics)
    served.refresh()
    store = Store(RedisConfig(url=SecretStr(url)), LAYOUT_HASH, 4)
    texts = TextsConfig.model_validate(config)
    return Texts(texts, settings, PREFIX, store, served, metrics, "texts-0", 1e-9)


def item(name: str, title: str | None = "a good guitar") -> Item:
    return Item(item_id=name, event_time=TIME, title=title)


def review(name: str, text: str | None = "very good", **changes: Any) -> Review:
    fields: dict[str, Any] = {
        "event_id": name,
        "user_id": f"user of {name}",
        "item_id": "i",
        "event_time": TIME,
        "text": text,
    }
    return Review.model_validate(fields | changes)


def messages(topic: str, records: Sequence[Item | Review | bytes | None]) -> list[Message]:
    return [message(topic, each, 2, offset) for offset, each in enumerate(records)]


def vectors(texts: Texts, *names: str) -> list[bytes | None]:
    found = texts._models.serving.encoder_hash
    return texts._store.read(vector_keys(texts._store, found, hash_ids(names)))


def counts(texts: Texts) -> Counter[str]:
    (family,) = (
        each for each in texts._metrics.registry.collect() if each.name == "starcast_events"
    )
    found = {
        sample.labels["kind"]: int(sample.value)
        for sample in family.samples
        if sample.name == "starcast_events_total"
    }
    return Counter({kind: count for kind, count in found.items() if count})


def finish(outcome: Outcome) -> None:
    assert outcome.finish is not None
    outcome.finish({})


def test_new_item_texts_become_vectors_that_stay(store: str, tmp_path: Path, folder: Path) -> None:
    texts = make(store, tmp_path, folder)
    batch = messages("items", [item("a"), item("b"), item("c", "the drum"), item("d", None), None])
    outcome = texts.process([*batch, message("items", b"broken", 2, 9)])
    finish(outcome)
    assert (outcome.outputs, outcome.batches) == ([], [])
    first, second = vectors(texts, "a good guitar", "the drum")
    loaded = encoder.load(folder, "cpu")
    expected = loaded.project(loaded.encode(["a good guitar", "the drum"])).astype(VECTOR_DTYPE)
    np.testing.assert_allclose(
        np.frombuffer((first or b"") + (second or b""), VECTOR_DTYPE).astype(np.float32),
        expected.astype(np.float32).ravel(),
        atol=2e-3,
    )
    assert counts(texts) == {"item": 2}
    texts._store.put(vector_keys(texts._store, loaded.hash, hash_ids(["the drum"])), [b"kept"])
    finish(texts.process(batch))
    assert vectors(texts, "the drum") == [b"kept"]
    assert counts(texts) == {"item": 2}
    assert item_text(item("a")) == "a good guitar"


def test_vectors_are_stored_before_the_offsets_are_committed(
    store: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is gone after the commit would lose them: nobody would read the texts again."""
    texts = make(store, tmp_path, folder)
    put, tries = texts._store.put, [StoreError("gone")]

    def failing(keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        if tries:
            raise tries.pop()
        put(keys, values)

    monkeypatch.setattr(texts._store, "put", failing)
    batch = messages("items", [item("a")])
    with pytest.raises(StoreError):
        texts.process(batch)
    texts.process(batch)  # the loop, from the offsets as they were
    assert vectors(texts, "a good guitar") != [None]


def test_items_are_read_again_where_the_store_has_no_vectors(
    store: str, tmp_path: Path, folder: Path
) -> None:
    texts = make(store, tmp_path, folder)
    committed = {"items": 2, "reviews": 7}
    assert texts.claim({2: {"items": -1, "reviews": 7}})[2] == {"items": -1, "reviews": 7}
    finish(texts.process(messages("items", [item("a"), item("b", "the drum")])))
    assert texts.claim({2: committed})[2] == committed
    texts._store.client.flushall()
    with pytest.raises(StoreError, match="lost vectors"):
        texts.process([message("items", item("c", "the flute"), 2, 2)])
    assert texts.claim({2: committed})[2] == {"items": 0, "reviews": 7}
    finish(texts.process(messages("items", [item("a"), item("b", "the drum")])))
    assert None not in vectors(texts, "a good guitar", "the drum")
    assert texts.claim({2: committed})[2] == committed
    assert texts.claim({1: {"reviews": 5}})[1] == {"reviews": 5}  # without `items`


def test_a_lost_vector_is_noticed_though_nothing_comes(
    store: str, tmp_path: Path, folder: Path
) -> None:
    texts = make(store, tmp_path, folder)
    texts.claim({2: {"items": -1}})
    finish(texts.process(messages("items", [item("a")])))
    texts._check_at = 0
    texts.idle()
    texts._store.client.flushall()
    texts.idle()  # it has just looked
    texts._check_at = 0
    with pytest.raises(StoreError, match="lost vectors"):
        texts.idle()
    texts.drop([2])
    texts._check_at = 0
    texts.idle()


def test_a_header_is_not_ahead_of_its_vectors(
    store: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make(store, tmp_path, folder)
    texts.claim({2: {"items": -1}})
    put, calls = texts._store.put, list[list[bytes]]()

    def noted(keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        calls.append(list(keys))
        put(keys, values)

    monkeypatch.setattr(texts._store, "put", noted)
    texts.process(messages("items", [item("a")]))
    used = texts._models.serving.encoder_hash
    assert calls == [
        vector_keys(texts._store, used, hash_ids(["a good guitar"])),
        [texts._store.plain_key(f"texts:{used}:2")],
    ]


def test_a_new_encoder_reads_all_items(
    store: str, tmp_path: Path, folder: Path, bundles: Path
) -> None:
    texts = make(store, tmp_path)  # without one
    assert texts.claim({2: {"items": 5}})[2] == {"items": 5}
    finish(texts.process(messages("items", [item("a")])))
    texts._models = make(store, tmp_path, folder)._models
    with pytest.raises(StoreError, match="Another encoder"):
        texts.process(messages("items", [item("a")]))
    assert texts.claim({2: {"items": 5}})[2] == {"items": 0}


def test_reviews_become_predictions_and_text_features(store: str, bundles: Path) -> None:
    texts = make(store, bundles)
    records = [
        review("r1", rating=5),
        review("r2", None),
        review("r3", None, title="broke"),
        b"[]",
        review("r4", "the string broke"),
    ]
    texts._digests.due(0)
    outcome = texts.process(messages("reviews", records))
    assert outcome.outputs == []  # bad reviews are dead letters of the scorer
    by_topic = {batch.topic: batch.messages for batch in outcome.batches}
    assert by_topic.keys() == {"predicted-ratings", "text-features"}
    for rows in by_topic.values():
        assert [row["partition"] for row in rows] == [2, 2, 2]
        assert [row["key"] for row in rows] == [b"user of r1", b"user of r3", b"user of r4"]
    predicted = [
        PredictedRating.model_validate_json(row["value"]) for row in by_topic["predicted-ratings"]
    ]
    features = [TextFeatures.model_validate_json(row["value"]) for row in by_topic["text-features"]]
    for prediction, feature in zip(predicted, features, strict=True):
        assert (prediction.kind, prediction.tier, prediction.seq) == ("review", None, None)
        assert prediction.event_id == feature.event_id
        assert prediction.distribution == feature.distribution
        shares = np.array(prediction.distribution)
        assert prediction.rating == pytest.approx(float(shares @ np.arange(1, 6)), abs=1e-3)
        low, high = prediction.interval or (0, 0)
        assert 1 <= low <= (prediction.rating or 0) <= high <= 5
        assert prediction.model_version == texts._models.serving.predictor.version
        assert feature.encoder == texts._models.serving.encoder_hash
    assert [each.source.offset for each in predicted] == [0, 2, 4]
    assert counts(texts) == {}
    assert texts.idle() is None  # nothing is counted before the commit
    finish(outcome)
    assert counts(texts) == {"review": 3, "skipped: too old or no text": 1}
    digest = texts.idle()
    assert digest is not None
    assert b'"kinds":{"review":3}' in (digest.outputs[0].value or b"")


def test_texts_past_the_age_limit_are_skipped_and_counted(store: str, bundles: Path) -> None:
    texts = make(store, bundles, age_limit_days=10)
    now = datetime.now(UTC)
    records = [
        review("old", event_time=now - timedelta(days=11)),
        review("new", event_time=now - timedelta(days=9)),
    ]
    outcome = texts.process(messages("reviews", records))
    finish(outcome)
    assert {len(batch.messages) for batch in outcome.batches} == {1}
    assert counts(texts) == {"review": 1, "skipped: too old or no text": 1}


def test_a_text_without_words_says_nothing(store: str, bundles: Path) -> None:
    """Spaces and tags are a text; what a star head makes of none is no review's opinion."""
    texts = make(store, bundles)
    blank = [review("spaces", " \n"), review("tags", "<p>&nbsp;</p>"), review("words")]
    outcome = texts.process(messages("reviews", blank))
    finish(outcome)
    sent = [each["value"] for batch in outcome.batches for each in batch.messages]
    assert [orjson.loads(each)["event_id"] for each in sent] == ["words"] * 2
    assert counts(texts) == {"review": 1, "skipped: too old or no text": 2}


def test_without_a_star_head_reviews_are_skipped_and_counted(
    store: str, tmp_path: Path, folder: Path
) -> None:
    texts = make(store, tmp_path, folder)
    outcome = texts.process([*messages("reviews", [review("r")]), *messages("items", [item("a")])])
    finish(outcome)
    assert outcome.batches == []
    assert counts(texts) == {"skipped: no star head": 1, "item": 1}


def test_without_an_encoder_all_is_skipped_and_counted(store: str, tmp_path: Path) -> None:
    texts = make(store, tmp_path)
    finish(texts.process([*messages("reviews", [review("r")]), *messages("items", [item("a")])]))
    assert counts(texts) == {"skipped: no encoder": 2}


def test_a_canary_changes_nothing_for_texts(store: str, bundles: Path, folder: Path) -> None:
    """Its encoder is stable's, which is not loaded again."""
    texts = make(store, bundles)
    finish(texts.process(messages("items", [item("a")])))
    loaded = texts._loaded
    other = write(str(bundles), seed=1, encoder=folder)
    registry.set_canary(str(bundles), other.version, other.sha256, 0.5, "a test", "")
    try:
        texts._models.refresh()
        assert texts._models.serving.canary is not None
        outcome = texts.process(messages("reviews", [review("r")]))
        assert texts._loaded is loaded
        (batch, _) = outcome.batches
        predicted = PredictedRating.model_validate_json(batch.messages[0]["value"])
        assert predicted.model_version == texts._models.serving.predictor.version
    finally:
        registry.clear_canary(str(bundles), "a test", "")
    texts.close()


def test_an_encoder_is_loaded_before_there_is_a_batch(
    store: str, tmp_path: Path, folder: Path
) -> None:
    """What a batch sends is in a transaction, which Kafka ends after seconds."""
    promote(tmp_path, folder)
    texts = make(store, tmp_path)
    texts.claim({2: {"items": 0, "reviews": 0}})
    with patch.object(encoder, "load", side_effect=AssertionError("loaded within a batch")):
        finish(texts.process(messages("items", [item("a")])))
    written = write(str(tmp_path), seed=1, encoder=folder)
    registry.promote(str(tmp_path), written.version, written.sha256, "a test", "")
    texts._models.refresh()
    texts.idle()
    assert texts._loaded is not None
    assert texts._loaded[0] is texts._models.reading.bundle
    texts.close()


def test_a_swap_takes_the_new_encoder(store: str, tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    torch.manual_seed(1)  # other weights than `folder` has
    bert(other)
    texts = make(store, tmp_path / "models", folder)
    batch = messages("items", [item("a")])
    finish(texts.process(batch))
    before = texts._models.serving.encoder_hash
    written = write(str(tmp_path / "models"), encoder=other)
    registry.promote(str(tmp_path / "models"), written.version, written.sha256, "a test", "")
    texts._models.refresh()
    finish(texts.process(batch))
    assert texts._models.serving.encoder_hash != before
    assert vectors(texts, "a good guitar") != [None]
    keys = vector_keys(texts._store, before, hash_ids(["a good guitar"]))
    assert texts._store.read(keys) != [None]  # beside the old one's
    assert counts(texts) == {"item": 2}
    texts.close()
    assert not texts._engine or not texts._engine._thread.is_alive()
    make(store, tmp_path).close()  # which has encoded nothing


def promote(url: Path, encoder_: Path) -> str:
    written = write(str(url), encoder=encoder_)
    registry.promote(str(url), written.version, written.sha256, "a test", "")
    return written.version


@pytest.fixture
def unheard_of(tmp_path: Path, folder: Path) -> Path:
    """An encoder that transformers refuses, as that of a later release."""
    made = tmp_path / "unheard of"
    shutil.copytree(folder, made)
    config = made / "config.json"
    config.write_text(config.read_text().replace('"bert"', '"unheard-of"'))
    return made


def test_a_version_whose_encoder_cannot_be_loaded_is_refused_and_what_runs_reads_on(
    store: str, tmp_path: Path, folder: Path, unheard_of: Path
) -> None:
    url = tmp_path / "models"
    good = promote(url, folder)
    texts = make(store, url)
    texts._models._coverage = lambda *_: 0.5  # others serve the one before until all is read
    batch, committed = messages("items", [item("a")]), {2: {"items": 1}}
    texts.claim(committed)
    finish(texts.process(batch))
    loaded = texts._loaded
    promote(url, unheard_of)
    texts._models.refresh()
    with capture_logs() as logs:
        with pytest.raises(StoreError, match="cannot be loaded"):
            texts.idle()
        with pytest.raises(StoreError, match="cannot be loaded"):
            texts.claim(committed)
    (refused,) = [line for line in logs if line["event"] == "bundle refused"]
    assert "unheard-of" in refused["reason"]
    texts._models.refresh()
    assert texts._models.reading.predictor.version == good
    texts.claim(committed)
    finish(texts.process(batch))
    assert texts._loaded is loaded
    texts.close()


def test_texts_wait_for_an_encoder_that_serves_and_cannot_be_loaded(
    store: str, tmp_path: Path, folder: Path, unheard_of: Path
) -> None:
    url = tmp_path / "models"
    bad = promote(url, unheard_of)
    texts = make(store, url)
    batch, committed = messages("items", [item("a")]), {2: {"items": 1}}
    with pytest.raises(StoreError, match=f"encoder of {bad} cannot be loaded"):
        texts.claim(committed)
    assert texts._models.serving.predictor.version == bad  # which scores on, without words
    assert texts.idle() is None  # of nothing claimed
    promote(url, folder)
    texts._models.refresh()
    assert texts.claim(committed)[2] == {"items": 0}
    finish(texts.process(batch))
    assert None not in vectors(texts, "a good guitar")
    texts.close()


@pytest.mark.parametrize("encoded", [True, False])
def test_what_erases_a_user_goes_on_after_what_they_wrote(
    store: str, bundles: Path, tmp_path: Path, encoded: bool
) -> None:
    texts = make(store, bundles if encoded else tmp_path)
    batch = messages("reviews", [review("a"), None, review("b")])
    outcome = texts.process(batch)
    finish(outcome)
    sent = [
        (each["key"], each["value"] is None, each["partition"])
        for part in outcome.batches
        if part.topic == "text-features"
        for each in part.messages
    ]
    written = [(b"user of a", False, 2), (b"user of b", False, 2)] if encoded else []
    assert sent == [*written, (b"k", True, 2)]
    assert counts(texts)["forget"] == 1
