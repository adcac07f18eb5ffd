"""The whole evaluation on a small shop."""

import sys
import tracemalloc
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from schemas.files import write_records
from schemas.records import Item
from tests.unit.trainer.shop import REVIEWS, START, Entries, review, shop
from trainer import evaluate as evaluation
from trainer.config import FitConfig, SizesConfig, TextConfig, TrainerConfig
from trainer.data import Log, Ties, from_file
from trainer.evaluate import evaluate, folder_of, measure
from trainer.evaluate_texts import PARTS
from trainer.exceptions import TrainerError
from trainer.figures import gained, summary
from trainer.fit import Fitted
from trainer.kept import Kept
from trainer.leaks import Leak
from trainer.metrics import Floats
from trainer.peers import ratings, texts, tuning
from trainer.peers.ratings import Peer, Predict, Rated
from trainer.prepare import Prepared

SMALL = TrainerConfig(
    threads=1,
    text=TextConfig(method="frozen", l2=1e-4),
    fit=FitConfig(epochs=2, sizes=SizesConfig(members=1, width=16)),
)

QUICK = SMALL.model_copy(
    update={"fit": FitConfig(epochs=1, trees=False, sizes=SizesConfig(width=2, factors=0))}
)

LAST_DAY = START + timedelta(days=(REVIEWS - 1) // 24)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRIALS", 1)
    monkeypatch.setattr(ratings, "MOST_FOREST_TREES", 5)
    monkeypatch.setattr(
        texts,
        "finetune_plain",
        lambda *given: [(np.full(len(asked), 3.0), np.full(len(asked), 3)) for asked in given[3]],
    )


def test_every_model_is_measured_on_the_same_rows_and_goes_on_where_it_stopped(
    shop_file: Path, encoder_folder: Path, tmp_path: Path, few: None
) -> None:
    log = from_file(shop_file)
    found = evaluate(log, tmp_path, SMALL, encoder=str(encoder_folder)).document
    names = {
        "model", "global", "bias", "bias_running", "biasedmf", "biasedmf_folded",
        "svd", "svdpp", "lightgbm", "forest",
    }  # fmt: skip
    for way in ("prequential", "arrival", "static"):
        assert found["rating"][way].keys() == names
        assert {each["rows"] for each in found["rating"][way].values()} == {70}
    # States that stand still know no more of a user; what never looks at them says the same.
    for name in ("global", "bias", "svd"):
        assert found["rating"]["static"][name]["mse"] == found["rating"]["prequential"][name]["mse"]
    assert found["gain"]["best_peer"] in names
    readers = {"model", "tfidf_ridge", "tfidf_logistic", "frozen_logistic", "finetune_plain"}
    for part in PARTS:
        assert found[part].keys() == readers
    assert found["text_title"]["model"]["rows"] < found["text"]["model"]["rows"]
    assert found["text"]["tfidf_ridge"]["rmse"] < 0.5
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = evaluate(log, tmp_path, SMALL, encoder=str(encoder_folder)).document
    assert orjson.dumps(again) == orjson.dumps(found)  # which has numbers that are none
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """But for rounding: a forest adds up its trees in the order in which threads end."""
    if one.dtype.kind == "f":
        return np.allclose(one, other, rtol=1e-9, atol=1e-12)
    return np.array_equal(one, other)


def test_stars_of_the_newest_day_change_no_prediction(
    encoder_folder: Path, tmp_path: Path, few: None
) -> None:
    """Reviews dated by the day: those of the newest see nothing of each other, nor does a fit."""

    def predictions(name: str, turned: bool) -> dict[str, Any]:
        entries: Entries = []
        sold: list[tuple[str, Any]] = [*shop()]
        for topic, record in sold:
            day = record.event_time.replace(hour=0, minute=0)
            last = topic == "reviews" and day == LAST_DAY
            stars = {"rating": 6 - record.rating} if turned and last else {}
            entries.append((topic, record.model_copy(update={"event_time": day, **stars})))
        write_records(tmp_path / f"{name}.jsonl", entries)
        log = from_file(tmp_path / f"{name}.jsonl")
        evaluate(log, tmp_path / name, SMALL, encoder=str(encoder_folder))
        return {
            f"{path.stem}: {part}": array
            for path in sorted((tmp_path / name).glob("*.npz"))
            for part, array in np.load(path).items()
        }

    first, second = predictions("first", False), predictions("second", True)
    assert first.keys() == second.keys()
    moved = {name for name in first if not same(first[name], second[name])}
    assert {name.split(": ")[0] for name in moved} >= {"model", "peer bias_running"}
    assert all(": arrival" in name for name in moved), moved


def test_without_peers_our_model_alone_is_measured(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refit, known = evaluation.refit_network, list[int]()

    def watched(fitted: Fitted, data: Prepared, rows: NDArray[np.int64], *rest: Any) -> Any:
        known.append(len(rows))
        return refit(fitted, data, rows, *rest)

    monkeypatch.setattr(evaluation, "refit_network", watched)
    found = evaluate(from_file(shop_file), tmp_path, SMALL, encoder="none", peers=())
    rows = found.document["rows"]
    assert known == [rows["train"] + rows["validation"]]
    assert found.document["rating"]["prequential"].keys() == {"model"}
    assert found.document["gain"] is None
    assert found.document["text"] == {}
    assert summary(found)


def test_a_peer_knows_rows_that_are_asked_for_but_where_it_stands_still(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []  # how many rows of the past and of those asked for

    def fit(known: Rated, settings: Mapping[str, Any], seed: int) -> Predict:
        def predict(asked: Rated, past: Rated) -> Floats:
            told.append((len(past), int(np.isin(past.turn, asked.turn).sum())))
            return np.full(len(asked), 7.0)

        return predict

    monkeypatch.setattr(ratings, "PEERS", {"global": Peer(fit)})
    found = evaluate(from_file(shop_file), tmp_path, SMALL, encoder="none", peers=("global",))
    rows = found.document["rows"]
    every, known = rows["rated"], rows["train"] + rows["validation"]
    still, moving = (known, 0), (every, rows["test"])
    assert dict(zip(found.document["rating"], told, strict=True)) == {
        "prequential": moving,
        "static": still,
        "arrival": moving,
    }
    stars = found.document["rating"]["prequential"]["global"]["ratings"]
    assert stars["5 stars"]["mse"] == 0  # nobody is asked for more


def dated_by_the_day(folder: Path, rows: int, users: int, a_day: int) -> Log:
    stars = np.random.default_rng(5).integers(1, 6, rows).tolist()
    entries: Entries = [
        ("reviews", review(row, row % users, row, START + timedelta(days=row // a_day), stars[row]))
        for row in range(rows)
    ]
    write_records(folder / "days.jsonl", entries)
    return from_file(folder / "days.jsonl")


def test_of_one_day_a_peer_knows_what_our_states_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten users rate once a day, the newest rows two items each: by arrival one is known before."""
    known: list[int] = []  # of the rows asked for, how many of their users' have a lower turn

    def fit(data: Rated, settings: Mapping[str, Any], seed: int) -> Predict:
        def predict(asked: Rated, past: Rated) -> Floats:
            pairs = zip(asked.user, asked.turn, strict=True)
            known.append(sum(((past.user == u) & (past.turn < t)).sum() for u, t in pairs))
            return np.full(len(asked), 3.0)

        return predict

    log = dated_by_the_day(tmp_path, rows=400, users=10, a_day=20)
    monkeypatch.setattr(ratings, "PEERS", {"global": Peer(fit)})
    options: dict[str, Any] = {"encoder": "none", "peers": ("global",)}
    evaluate(log, tmp_path / "instant", QUICK, **options)
    # Of each user 36 rows are older than the newest two days, and then one or two of a day.
    days = 10 * 2 * (36 + 38)
    assert known == [days, 10 * 2 * 2 * 36, days + 2 * 10]
    known.clear()
    evaluate(log, tmp_path / "arrival", QUICK, ties="arrival", **options)
    assert known == [days + 2 * 10, 10 * 2 * 2 * 36]


def test_a_day_is_parted_where_its_rows_know_of_each_other_alone(tmp_path: Path) -> None:
    """Of 205 rows, ten a day and five on the last: the newest 20 begin within a day."""
    log = dated_by_the_day(tmp_path, rows=205, users=9, a_day=10)
    sizes: dict[Ties, tuple[int, ...]] = {"instant": (160, 20, 25), "arrival": (165, 20, 20)}
    for ties, rows in sizes.items():
        folder = tmp_path / ties
        found = evaluate(log, folder, QUICK, encoder="none", peers=(), ties=ties).document["rows"]
        assert (found["train"], found["validation"], found["test"]) == rows
        assert measure(log, None, QUICK, ties=ties).document["rows"]["test"] == rows[-1]


def test_figures_are_what_the_rows_say(tmp_path: Path) -> None:
    """By hand: of the newest 40 of 400 rows 30 are of newcomers, who rate three items each."""
    random = np.random.default_rng(5)
    stars = random.integers(1, 6, 400)
    pairs = [(row // 10, row % 10) for row in range(360)]
    pairs += [(100 + user, 20 + turn) for turn in range(3) for user in range(10)]
    pairs += [(user, 30) for user in range(10)]
    entries: Entries = [
        ("reviews", review(row, *pair, START + timedelta(hours=row), int(stars[row])))
        for row, pair in enumerate(pairs)
    ]
    write_records(tmp_path / "pairs.jsonl", entries)
    log = from_file(tmp_path / "pairs.jsonl")
    found = evaluate(log, tmp_path / "kept", SMALL, encoder="none", peers=("global",)).document
    error = stars[:360].mean() - stars[360:]
    told = found["rating"]["prequential"]["global"]
    assert (told["rows"], told["mae"]) == (40, pytest.approx(np.abs(error).mean()))
    assert told["mse"] == pytest.approx((error**2).mean()) == pytest.approx(told["rmse"] ** 2)
    masks = {"0": slice(0, 10), "1-2": slice(10, 30), "10+": slice(30, 40)}
    for name, rows in masks.items():
        bucket = told["buckets"][name]
        assert bucket["rows"] == len(error[rows])
        assert bucket["mse"] == pytest.approx((error[rows] ** 2).mean())
    assert told["buckets"]["3-9"]["rows"] == 0
    assert np.isnan(told["buckets"]["3-9"]["rmse"])
    assert "3-9" not in told["model_minus_this"]
    items = {name: each["rows"] for name, each in told["item_buckets"].items()}
    assert items == {"0": 4, "1-2": 8, "3-9": 28, "10+": 0}  # four items, ten rows of each
    for star in range(1, 6):
        rows = stars[360:] == star
        assert told["ratings"][f"{star} stars"]["rows"] == rows.sum()
        assert told["ratings"][f"{star} stars"]["mse"] == pytest.approx((error[rows] ** 2).mean())
    ours = found["rating"]["prequential"]["model"]
    for name, each in (("all", ours), *ours["buckets"].items()):
        if each["rows"]:
            other = told if name == "all" else told["buckets"][name]
            gap = told["model_minus_this"][name]
            assert gap["mean"] == pytest.approx(each["mse"] - other["mse"])
            for drawn in (gap, gap["by_users"]):
                assert drawn["low"] <= gap["mean"] <= drawn["high"]
    gap = told["model_minus_this"]["all"]  # of users who have several rows each
    assert gap["low"] != gap["by_users"]["low"]
    still = found["rating"]["static"]["global"]
    assert [each["rows"] for each in still["buckets"].values()] == [30, 0, 0, 10]
    assert found["gain"]["gain"] == pytest.approx(1 - ours["rmse"] / told["rmse"])


def test_peers_are_chosen_by_name(
    shop_file: Path, encoder_folder: Path, tmp_path: Path, few: None
) -> None:
    log = from_file(shop_file)
    wanted = ("bias", "tfidf_ridge")
    found = evaluate(log, tmp_path, SMALL, encoder=str(encoder_folder), peers=wanted).document
    assert found["rating"]["prequential"].keys() == {"model", "bias"}
    assert found["gain"]["best_peer"] == "bias"
    assert found["text"].keys() == {"model", "tfidf_ridge"}
    found = evaluate(log, tmp_path, SMALL, encoder=str(encoder_folder), peers=["bias"]).document
    assert found["text"].keys() == {"model"}
    with pytest.raises(TrainerError, match="no peer is called nobody; there are global, bias,"):
        evaluate(log, tmp_path, SMALL, encoder="none", peers=["nobody"])


def test_peers_that_are_not_installed_are_told(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trainer.peers", None)
    with pytest.raises(TrainerError, match=r"not all installed .*'\.\[peers\]'.*--peers none"):
        evaluate(from_file(shop_file), tmp_path, SMALL, encoder="none")


def test_beside_a_peer_without_error_there_is_no_gain() -> None:
    """As where all ratings are equal."""
    assert gained({"model": {"rmse": 1.0}}) is None
    assert gained({"model": {"rmse": 1.0}, "bias": {"rmse": 0.0}, "svd": {"rmse": 2.0}}) is None
    found = gained({"model": {"rmse": 1.0}, "bias": {"rmse": 4.0}, "svd": {"rmse": 2.0}})
    assert found == {"best_peer": "svd", "gain": 0.5}


def test_an_alarm_stops_it_unless_told_otherwise(
    shop_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak = Leak("a leak", 1, ("r1",))
    monkeypatch.setattr(evaluation.leaks, "known_later", lambda log: [leak])
    log = from_file(shop_file)
    with monkeypatch.context() as before:  # texts are read, which may take hours
        before.setattr(evaluation, "base_encoder", pytest.fail)
        with pytest.raises(TrainerError, match="a leak: 1 rows, as r1"):
            evaluate(log, tmp_path, SMALL, encoder="none", peers=())
    found = evaluate(log, tmp_path, SMALL, encoder="none", peers=(), allow_leaks=True)
    assert found.document["leaks"][0]["kind"] == "a leak"


def test_a_feature_that_says_the_ratings_of_a_small_shop_is_an_alarm(tmp_path: Path) -> None:
    """Each price is that of one rating: the newest rows alone, 70, are too few to see it."""
    sold: list[tuple[str, Any]] = [*shop()]
    entries: Entries = []
    for topic, each in sold:
        if topic == "reviews":
            name, time = f"sold {each.event_id}", each.event_time
            entries.append(("items", Item(item_id=name, event_time=time, price=each.rating)))
            entries.append((topic, each.model_copy(update={"item_id": name})))
    write_records(tmp_path / "told.jsonl", entries)
    with pytest.raises(TrainerError, match=r"feature item_price says the rating: 700 rows\n"):
        evaluate(from_file(tmp_path / "told.jsonl"), tmp_path, SMALL, encoder="none", peers=())


def test_a_leak_that_began_in_the_newest_rows_is_an_alarm(tmp_path: Path) -> None:
    """Prices say the stars of the newest 230 of 2,300 rows, and nothing of the others'."""
    random = np.random.default_rng(5)
    stars, prices = random.integers(1, 6, 2_300), random.integers(1, 6, 2_300)
    prices[2_070:] = stars[2_070:]
    entries: Entries = []
    for row in range(2_300):
        time, name = START + timedelta(hours=row), f"i{row}"
        entries.append(("items", Item(item_id=name, event_time=time, price=float(prices[row]))))
        rated = review(row, row % 50, row, time, int(stars[row]))
        entries.append(("reviews", rated.model_copy(update={"item_id": name})))
    write_records(tmp_path / "late.jsonl", entries)
    with pytest.raises(TrainerError, match=r"feature item_price says the rating: 230 rows\n"):
        evaluate(from_file(tmp_path / "late.jsonl"), tmp_path, SMALL, encoder="none", peers=())


def test_rows_of_one_time_alone_are_told(
    shop_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """None of them is older than another: nothing is known of any."""
    sold: list[tuple[str, Any]] = [*shop()]
    write_records(
        tmp_path / "noon.jsonl",
        [(topic, each.model_copy(update={"event_time": START})) for topic, each in sold],
    )
    log = from_file(tmp_path / "noon.jsonl")
    found = evaluate(log, tmp_path / "noon", SMALL, encoder="none", peers=()).document
    assert found["rating"]["prequential"]["model"]["buckets"]["0"]["rows"] == found["rows"]["test"]
    assert "--ties arrival" in caplog.text
    caplog.clear()
    evaluate(from_file(shop_file), tmp_path / "shop", SMALL, encoder="none", peers=())
    assert "--ties arrival" not in caplog.text


def test_parts_of_other_rows_are_not_taken_for_these(shop_file: Path, tmp_path: Path) -> None:
    """As of a file whose newest rows were dated in the future when they were measured."""
    Kept(tmp_path).get("rows", lambda: {"rows": np.arange(3)})
    with pytest.raises(TrainerError, match="measured on other rows; delete it"):
        evaluate(from_file(shop_file), tmp_path, SMALL, encoder="none", peers=())


def test_a_large_file_is_not_held_in_memory_to_name_its_folder(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    with events.open("wb") as file:
        file.truncate(50_000_000)
    tracemalloc.start()
    try:
        folder_of(events, SMALL, "none", "instant", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_another_encoder_or_file_has_a_folder_of_its_own(
    shop_file: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    """Weights that are replaced in their directory are another encoder."""
    encoder = copytree(encoder_folder, tmp_path / "encoder")

    def folder(events: Path = shop_file) -> Path:
        return folder_of(events, SMALL, str(encoder), "instant", tmp_path)

    first = folder()
    assert folder() == first
    (tmp_path / "other").write_bytes(b"")
    assert folder(tmp_path / "other") != first
    settings = encoder / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    assert folder() != first
