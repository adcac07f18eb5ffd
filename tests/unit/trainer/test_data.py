"""Rows from a record file, and their replay."""

import gc
import gzip
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import features
from model.events import REVIEW, TEXT, VIEW
from model.ids import hash_ids
from schemas import files
from schemas.files import write_records
from schemas.records import Record, Review, TextFeatures
from tests.unit.trainer.shop import ITEMS, REVIEWS, START, USERS, item, review
from trainer import data
from trainer.data import (
    Examples,
    Log,
    from_file,
    item_texts,
    replay,
    sorted_by_time,
)
from trainer.exceptions import TrainerError


def examples(log: Log, encoder: str = "") -> Examples:
    return replay(log, None, encoder, 0, lambda done, total: None)


def test_a_file_gives_its_events_in_order_with_what_is_known_beside_them(shop_file: Path) -> None:
    log = from_file(shop_file)
    assert len(log) == 2 * REVIEWS
    assert (log.rated, len(log.items), len(log.users)) == (REVIEWS, ITEMS, USERS)
    assert log.events["action"][:4].tolist() == [VIEW, REVIEW, VIEW, REVIEW]
    assert log.reviews["row"].to_list() == list(range(1, 2 * REVIEWS, 2))
    assert log.reviews["event_id"][0] == "r0"
    assert hash_ids(["r0"])[0] == log.events["event_id"][1]
    assert len(item_texts(log)) == ITEMS


def test_what_was_read_off_texts_is_an_event_of_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    stars: dict[str, Any] = {"distribution": [0, 0, 0, 0.5, 0.5], "encoder": "e"}
    rated = review(1, 2, 3, START, 5)
    names = {name: getattr(rated, name) for name in ("event_id", "user_id", "item_id")}
    text = TextFeatures(**names, event_time=rated.event_time, **stars)
    write_records(path, [("reviews", rated), ("text-features", text), ("reviews", rated)])
    log = from_file(path)
    assert log.events["action"].tolist() == [REVIEW, TEXT, REVIEW]
    assert log.events["text_stars"][1] == 4.5
    assert log.events["user"].tolist() == hash_ids(["u2"] * 3).tolist()
    assert log.reviews["row"].to_list() == [0, 2]


def test_a_file_is_read_in_parts(shop_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = from_file(shop_file)
    monkeypatch.setattr(data, "_READ", 100)
    monkeypatch.setattr(files, "BATCH", 100)
    table, held = data._review_table, list[int]()

    def alive() -> int:
        return sum(type(each) is Review for each in gc.get_objects())

    def counted(*columns: Any) -> Any:
        held.append(alive())
        return table(*columns)

    gc.collect()
    before = alive()  # of other tests

    monkeypatch.setattr(data, "_review_table", counted)
    parts = from_file(shop_file)
    assert parts.events.tobytes() == whole.events.tobytes()
    assert parts.reviews.equals(whole.reviews)
    assert (parts.items, parts.users) == (whole.items, whole.users)
    assert max(held) - before < 250  # of 700


def test_a_file_without_events_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    write_records(path, [("items", item(1))])
    with pytest.raises(TrainerError, match="no reviews, behavior or text-features"):
        from_file(path)


def test_what_breaks_the_contract_is_left_out_as_the_stream_does(
    shop_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = gzip.decompress(shop_file.read_bytes())
    path = tmp_path / "some.jsonl"
    bad = b'{"topic": "reviews", "value": {"event_id": "r"}}\n{\n[\n'
    path.write_bytes(bad + good)
    assert from_file(path).events.tobytes() == from_file(shop_file).events.tobytes()
    lines = good.count(b"\n")
    assert f"3 of {lines + 3:,} lines of {path} break the contract" in caplog.text
    assert "2 not JSON in UTF-8" in caplog.text
    assert "1 not a good record of reviews: user_id: missing (the first: line 1)" in caplog.text
    path.write_bytes(bad)
    with pytest.raises(TrainerError, match=r"3 of 3 lines .*line 2, .*\n.*starcast schema"):
        from_file(path)


def test_ratings_of_another_scale_are_refused(shop_file: Path, tmp_path: Path) -> None:
    """Though most lines, of items and views, are good; a slip or two is left out."""
    review = (
        '{"topic": "reviews", "value": {"event_id": "%d", "user_id": "u", "item_id": "i", '
        '"event_time": "2026-11-24T10:15:00Z", "rating": %d}}\n'
    )
    good = gzip.decompress(shop_file.read_bytes()).decode()  # 700 reviews
    path = tmp_path / "some.jsonl"
    path.write_text(good + "".join(review % (number, 10) for number in range(36)))
    assert from_file(path).rated == 700
    path.write_text(good + "".join(review % (number, 10) for number in range(38)))
    with pytest.raises(TrainerError, match=r"38 of .*\nIts ratings are of another scale.*4 / 9"):
        from_file(path)


@pytest.mark.parametrize(
    ("stars", "rescale"),
    [
        ([5, 4, 3, 2, 1, 5, 4, 3, 2, 55], False),  # a slip is a tenth of a file of ten
        ([5, 4, 3, 2, 1, 5, 4, 3, 50, 55], False),
        ([8, 9, 3, 5, 4, 7], True),
    ],
)
def test_a_slip_in_a_small_file_is_no_other_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stars: list[int], rescale: bool
) -> None:
    review = (
        '{"topic": "reviews", "value": {"event_id": "%d", "user_id": "u", "item_id": "i", '
        '"event_time": "2026-11-24T10:15:00Z", "rating": %d}}\n'
    )
    path = tmp_path / "small.jsonl"
    path.write_text("".join(review % each for each in enumerate(stars)))
    if rescale:
        with pytest.raises(TrainerError, match="another scale"):
            from_file(path)
    else:
        good = [each for each in stars if each <= 5]
        assert from_file(path).reviews["rating"].to_list() == good
        assert f"{len(stars) - len(good)} of 10 lines" in caplog.text


def test_a_file_of_which_most_breaks_the_contract_is_refused(
    shop_file: Path, tmp_path: Path
) -> None:
    """As one of stars from 1 to 10: what is left would be measured as if it were all."""
    review = (
        '{"topic": "reviews", "value": {"event_id": "%d", "user_id": "u", "item_id": "i", '
        '"event_time": "2026-11-24T10:15:00Z", "rating": %d}}\n'
    )
    path = tmp_path / "ten.jsonl"
    path.write_text("".join(review % (stars, stars) for stars in range(11)))
    with pytest.raises(
        TrainerError, match=r"6 of 11 .*5 not .*rating: .*to 5 \(the first: line 7, got 6\)"
    ):
        from_file(path)


def test_lines_out_of_place_are_told(
    shop_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = gzip.decompress(shop_file.read_bytes()).splitlines(keepends=True)
    from_file(shop_file)
    assert caplog.text == ""
    path = tmp_path / "turned.jsonl"
    path.write_bytes(b"".join(reversed(lines)))
    from_file(path)
    assert f"{path} is not in the order of time: " in caplog.text
    assert f"{ITEMS} of {ITEMS} items of {path} stand behind all events" in caplog.text


def test_examples_are_the_rated_reviews_and_see_nothing_of_their_own_stars(shop_file: Path) -> None:
    log = from_file(shop_file)
    found = examples(log)
    assert len(found) == REVIEWS
    assert found.rating.tolist() == log.reviews["rating"].to_list()
    assert found.history[0] == 0
    other = log.events.copy()
    last = found.row[-1]
    other["rating"][last] = 1.0 if log.events["rating"][last] != 1 else 5.0
    changed = examples(replace(log, events=other))
    np.testing.assert_array_equal(found.inputs.features, changed.inputs.features)
    assert changed.rating[-1] != found.rating[-1]


def test_attributes_are_not_known_before_they_are_said(tmp_path: Path) -> None:
    def events(first: int, count: int) -> list[tuple[str, Record]]:
        times = [START + timedelta(hours=number) for number in range(first, first + count)]
        return [("reviews", review(first + n, n, 1, time, 4)) for n, time in enumerate(times)]

    path = tmp_path / "late.jsonl"
    write_records(path, [*events(0, 100), ("items", item(1)), *events(100, 100)])
    known = examples(from_file(path)).inputs.features[:, features.INDEX["item_known"]]
    assert not np.nan_to_num(known[:100]).any()
    assert (known[128:] == 1).all()  # from the next batch of the replay on


def test_rows_of_one_instant_see_nothing_of_each_other(tmp_path: Path) -> None:
    """Two days: on the second, three reviews of one item by three users."""
    first = [review(n, n, 1, START, 5) for n in range(2)]
    second = [review(2 + n, 2 + n, 1, START + timedelta(days=1), 1) for n in range(3)]
    path = tmp_path / "days.jsonl"
    write_records(path, [("reviews", each) for each in [*first, *second]])
    log = from_file(path)
    counts = features.INDEX["item_ratings"]

    def known(**options: Any) -> list[float]:
        found = replay(log, None, "", 0, lambda done, total: None, **options)
        return np.rint(np.expm1(found.inputs.features[:, counts])).tolist()

    assert known(ties="instant") == [0, 0, 2, 2, 2]
    assert known(ties="instant", still=0) == [0] * 5
    assert known(ties="instant", still=2) == [0, 0, 2, 2, 2]
    # In one batch item states stand still, as they do live; the partition's mean does not.
    assert known() == [0] * 5


def test_each_instant_of_its_own_gives_what_arrival_one_by_one_gives(
    shop_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = from_file(shop_file)
    assert len(np.unique(log.events["time"])) == len(log)
    monkeypatch.setattr(data, "_BATCH_EVENTS", 1)
    monkeypatch.setattr(data, "_LARGEST_BATCH", 1)
    one = examples(log)
    other = replay(log, None, "", 0, lambda done, total: None, ties="instant")
    np.testing.assert_array_equal(one.inputs.features, other.inputs.features)
    np.testing.assert_array_equal(one.inputs.recents, other.inputs.recents)


def test_a_history_is_put_in_the_order_of_time(tmp_path: Path) -> None:
    times = [START + timedelta(hours=hour) for hour in (3, 1, 2)]
    path = tmp_path / "mixed.jsonl"
    write_records(
        path,
        [
            ("reviews", review(0, 0, 1, times[0], 5)),
            ("items", item(1)),
            *(("reviews", review(n, n, 1, times[n], 4)) for n in (1, 2)),
        ],
    )
    log = sorted_by_time(from_file(path))
    assert log.reviews["event_id"].to_list() == ["r1", "r2", "r0"]
    assert log.reviews["row"].to_list() == [0, 1, 2]
    assert (np.diff(log.events["time"]) > 0).all()
    # It was known after r0, which now comes last: to none of these.
    assert [count for count, _ in log.items] == [3]
    known = replay(log, None, "", 0, lambda done, total: None, ties="instant")
    assert not np.nan_to_num(known.inputs.features[:, features.INDEX["item_known"]]).any()
