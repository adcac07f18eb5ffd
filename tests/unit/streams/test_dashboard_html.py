from dataclasses import replace
from html.parser import HTMLParser

import pytest

from model.registry import Canary, Change, Entry, Registry
from schemas.records import Alert, Role
from streams import dashboard_html as html
from streams.config import KafkaConfig
from streams.dashboard_data import Link, Prediction, Snapshot, Topics
from streams.dashboard_view import LADDER, together, totals
from streams.windows import Sums
from tests.digests import at, digest, ms
from tests.unit.streams.snapshots import (
    FIRST,
    RATED,
    REGISTRY,
    SECOND,
    UNRATED,
    UP,
    entry,
    prediction,
    windows_of,
)

KAFKA = KafkaConfig()
WICKED = "<script>alert('x')</script>\"&"
NOW = RATED[-1].end_ms + 1_000
FOUND = totals(RATED, "interaction")
ALL = together(FOUND.values()).sums
LIVE = Snapshot(broker=UP, store=UP, models=UP, topics=Topics(events=1), windows=RATED)


class Words(HTMLParser):
    """The text of a piece of HTML, and its tags; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "path":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def __str__(self) -> str:
        return " ".join(" ".join(self.words).split())


def row(**changes: object) -> Prediction:
    return replace(prediction(), **changes)  # pyright: ignore[reportArgumentType]


def test_all_that_comes_from_outside_is_escaped() -> None:
    wicked = Snapshot(
        broker=Link(False, WICKED),
        store=Link(False, WICKED),
        models=Link(False, WICKED),
        topics=Topics(missing=(WICKED,)),
        windows=RATED,
        registry=Registry(
            stable=Entry(version=f"a-{WICKED}", sha256="", at=at(0), by=WICKED, reason=WICKED),
            history=[
                Change(
                    version=f"a-{WICKED}",
                    sha256="",
                    at=at(0),
                    by=WICKED,
                    reason=WICKED,
                    what="promote",
                )
            ],
        ),
    )
    alert = Alert(
        alert_id="a",
        rule=WICKED,
        severity="info",
        window_start=at(0),
        window_end=at(1),
        value=1,
        threshold=1,
        subject="interaction",
        text=WICKED,
    )
    known = [LADDER, f"a-{WICKED}"]
    wicked_row = row(
        title=WICKED, user_id=WICKED, action=WICKED, tier=WICKED, version=f"a-{WICKED}"
    )
    for text in (
        html.chips(wicked, NOW),
        html.waiting(replace(wicked, windows=()), KAFKA),
        html.notes(wicked, KAFKA, NOW),
        html.tiles(wicked, ALL, NOW),
        html.models(wicked, FOUND, known),
        html.predictions([wicked_row, row(item_id=WICKED)], "interaction", known),
        html.alerts([alert]),
        html.bars([(WICKED, 3)], {}, ""),
        html.bars([("a", 3)], {"a": WICKED}, ""),
    ):
        words = Words(text)
        assert "script" not in words.tags
        assert "<script" not in text


@pytest.mark.parametrize(
    ("snapshot", "title"),
    [
        (Snapshot(), "Waiting for Kafka"),
        (Snapshot(broker=UP, store=Link(False, "gone")), "Waiting for the store"),
        (Snapshot(broker=UP, store=UP, topics=Topics(missing=("x",))), "Waiting for topics"),
        (Snapshot(broker=UP, store=UP), "Waiting for events"),
        (Snapshot(broker=UP, store=UP, topics=Topics(events=3)), "Waiting for predictions"),
        (
            Snapshot(broker=UP, store=UP, topics=Topics(events=3), predictions=(prediction(),)),
            "Waiting for insights",
        ),
    ],
)
def test_an_empty_page_says_what_it_waits_for(snapshot: Snapshot, title: str) -> None:
    assert str(Words(html.waiting(snapshot, KAFKA))).startswith(title)


def test_notes_say_what_is_still_missing_or_gone() -> None:
    assert html.waiting(LIVE, KAFKA) == ""
    assert "No model yet" in html.notes(LIVE, KAFKA, NOW)
    assert html.notes(replace(LIVE, registry=REGISTRY), KAFKA, NOW) == ""
    assert "No ratings yet" in html.notes(replace(LIVE, windows=UNRATED), KAFKA, NOW)
    gone = html.notes(replace(LIVE, store=Link(False, "refused")), KAFKA, NOW)
    assert "refused. What was seen last is shown." in str(Words(gone))
    gone = html.notes(replace(LIVE, broker=Link(False, "No broker.")), KAFKA, NOW)
    assert "Waiting for Kafka No broker. What was seen last is shown." in str(Words(gone))
    assert "topics apply" not in gone  # which ones are missing is not known
    missing = html.notes(replace(LIVE, topics=Topics(missing=("items",))), KAFKA, NOW)
    assert "Missing: items." in missing
    assert "Nothing new" in html.notes(LIVE, KAFKA, NOW + 3_600_000)


def test_tiles_tell_now_and_when_it_is_silent_the_range() -> None:
    now = str(Words(html.tiles(LIVE, ALL, NOW)))
    assert "Predictions a second 1 " in now
    assert "Waiting to be scored 0 caught up" in now
    assert "Error, RMSE 1.00 stars MAE 1.00, 1 rating" in now
    assert "4.00 against 3.00 +1.00 stars off" in now
    assert "Model cold start" in now
    later = str(Words(html.tiles(LIVE, ALL, NOW + 3_600_000)))
    assert "Predictions a second – " in later  # not 0: insights or the store may be gone
    assert "Waiting to be scored – not told" in later
    assert "1 rating in this range" in later
    assert "1a2b3c4d promoted" in str(Words(html.tiles(replace(LIVE, registry=REGISTRY), ALL, NOW)))
    assert "no ratings yet" in html.tiles(replace(LIVE, windows=UNRATED), Sums(), NOW)


def test_no_interactions_are_none_a_second() -> None:
    texts = windows_of([digest(at(5), [(4.0, 3.0)], kind="review", tier=None)], 10)
    words = str(Words(html.tiles(replace(LIVE, windows=texts), Sums(), NOW)))
    assert "Predictions a second 0 " in words


def test_names_of_any_script_leave_their_surroundings_in_order() -> None:
    name = "\u05d2\u05d9\u05d8\u05e8\u05d4 (2)"
    text = html.predictions([row(title=name, user_id=name)], "interaction", [])
    assert text.count(f"<bdi>{name}</bdi>") == 2
    assert f"<bdi>{name}</bdi>" in html.bars([("a", 3)], {"a": name}, "")


def test_intervals_are_told_to_screen_readers() -> None:
    text = html.predictions([row(low=3.04, high=5.0)], "interaction", [])
    assert 'aria-label="80% interval from 3.0 to 5.0"' in text
    assert "aria-label" not in html.predictions([row(low=None, high=None)], "interaction", [])


def test_predictions_of_a_kind_stand_on_the_scale() -> None:
    rows = [
        row(title="Strings", action="review", truth=5.0, rating=4.5, low=3.0, high=5.0),
        row(kind="review", title="Not shown"),
        row(item_id="B00X", truth=None, rating=None, low=None, high=None, tier="", version=""),
    ]
    text = html.predictions(rows, "interaction", [LADDER])
    words = str(Words(text))
    assert "Strings · review by u" in words  # the time first: of a long id the end is cut off
    assert "4.50 5 ★ User and item" in words
    assert "B00X" in words
    assert "– – Asked too late" in words
    assert "Not shown" not in words
    assert 'class="dot" style="left:87.5%"' in text
    assert 'class="truth" style="left:100.0%"' in text
    assert 'class="interval" style="left:50.0%;width:50.0%"' in text
    assert "No predictions for requests yet" in html.predictions(rows, "request", [])


def test_a_prediction_beyond_the_scale_stays_on_it() -> None:
    text = html.predictions([row(low=0.2, high=6.0)], "interaction", [])
    assert 'style="left:0.0%;width:100.0%"' in text


def test_model_table_marks_the_one_in_service() -> None:
    words = str(Words(html.models(replace(LIVE, registry=REGISTRY), FOUND, [FIRST])))
    assert "1a2b3c4d in service promoted" in words
    assert "cold start from running means 1 1.00 1.00 +1.00" in words


def test_a_version_that_is_no_longer_tried_does_not_predict_from_running_means() -> None:
    windows = windows_of([digest(at(5), [(4.0, 3.0)], version=SECOND, role="canary")], 10)
    ended = [
        Change(**dict(entry(SECOND, 3)), what="canary"),
        Change(**dict(entry(SECOND, 9)), what="clear"),
    ]
    registry = REGISTRY.model_copy(update={"history": [*REGISTRY.history, *ended]})
    shop = replace(LIVE, windows=windows, registry=registry)
    words = str(Words(html.models(shop, totals(windows, "interaction"), [FIRST, SECOND])))
    assert "9f8e7d6c not in service by trainer 1 1.00" in words


def test_a_number_beyond_its_threshold_is_told_by_more_than_a_colour() -> None:
    (window,) = RATED
    firing = window.model_copy(update={"firing": ["rmse/interaction", "lag/review"]})
    words = str(Words(html.tiles(replace(LIVE, windows=(firing,)), ALL, NOW)))
    assert "Error, RMSE 1.00 stars Alert MAE 1.00" in words
    assert words.count("Alert") == 1


def on_trial(share: float, errors: int, name: str = SECOND) -> Snapshot:
    """Stable errs by half a star or not at all, the other by one or none."""
    sides: tuple[tuple[float, str, Role], ...] = ((0.5, FIRST, "stable"), (1.0, name, "shadow"))
    digests = [
        digest(
            at(5),
            [(3.0 + error, 3.0), (3.0, 3.0)] * errors or [(3.0, None)],
            version=version,
            role=role,
        )
        for error, version, role in sides
    ]
    canary = Canary(**dict(entry(name, 20)), share=share)
    history = [*REGISTRY.history, Change(**dict(entry(name, 20)), what="canary")]
    registry = REGISTRY.model_copy(update={"canary": canary, "history": history})
    return replace(LIVE, windows=windows_of(digests, 10), registry=registry)


def test_a_version_on_trial_stands_beside_stable() -> None:
    assert html.trial(replace(LIVE, registry=REGISTRY)) == ""
    shadow = on_trial(0, 50)
    words = str(Words(html.trial(shadow)))
    assert "Stable 100 0.35 0.25 +0.25 9f8e7d6c, shadow 100 0.71 0.50 +0.50" in words
    # Variances of one error 1/16 and 1/4, of the means of a hundred a hundredth of it.
    assert "MAE of the version on trial: +4.5 standard errors from stable's." in words
    assert "9f8e7d6c, canary 5% 100" in str(Words(html.trial(on_trial(0.05, 50))))
    assert "Too few ratings" in html.trial(on_trial(0.05, 0))
    words = str(Words(html.models(shadow, {}, [FIRST, SECOND])))
    assert "9f8e7d6c shadow on trial since by trainer" in words
    assert "<script" not in html.trial(on_trial(0, 50, WICKED))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7.25, "7.2"),
        (42.0, "42"),
        (1234, "1,234"),
        (12_345, "12.3k"),
        (1_234_567, "1.2M"),
        (345_678_901, "346M"),
        (2e9, "2.0G"),
    ],
)
def test_compact(number: float, text: str) -> None:
    assert html.compact(number) == text


def test_times_are_told_by_the_browser() -> None:
    assert f'<time data-ms="{ms(15)}"></time>' in html.tiles(
        replace(LIVE, registry=REGISTRY), ALL, NOW
    )
