"""One evaluation for every model, honest by construction.

Rated rows are split by time: train, then validation, then test. Everything is chosen on
validation, then fitted to train and validation, and asked for the test rows in three ways:

- prequential: each row is predicted from all that is strictly older, and learnt by the states;
- arrival: likewise, but rows of one time see those that came before them in the given order;
- static: states stand still from the first test row on.

Question (b), stars read off a review's text, has the same split and is never mixed with (a).
"""

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import polars as pl
import torch
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.progress import Progress
from rich.table import Table

from model import encoder as encoders
from model.bundle import FORMAT
from model.encoder import TextEncoder, review_text
from model.features import FEATURE_HASH
from model.state import LAYOUT_HASH
from trainer import ablations, leaks, text
from trainer.clean import EXAMPLES, Step
from trainer.config import TrainerConfig
from trainer.copies import copies
from trainer.data import Examples, Log, Ties, replay, sorted_by_time
from trainer.exceptions import TrainerError
from trainer.fine_tune import taken
from trainer.fit import Fitted
from trainer.gate import difference
from trainer.metrics import (
    HISTORY_BUCKETS,
    Calibration,
    Floats,
    TextScores,
    by_history,
    by_rating,
    calibration,
    class_scores,
    scores,
)
from trainer.models import Predicted, predict
from trainer.prepare import (
    Prepared,
    cleaned,
    item_vectors,
    sampled,
    tracker,
    unrated_texts,
)
from trainer.report import reliability
from trainer.split import Split, by_instant, by_time
from trainer.text import TEST, TRAIN, VALIDATION, ReviewTexts
from trainer.train import base_encoder, fit_network, refit_network

MODEL = "model"
PARTS = ("text", "text_title", "text_body")  # whole reviews, titles alone, texts alone

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Evaluated:
    """What was measured; `document` is what the command writes."""

    document: dict[str, Any]
    steps: tuple[Step, ...]  # of cleaning

    @property
    def plot(self) -> str:
        """Whether what the model claims happens as often, as SVG."""
        return reliability(Calibration(**self.document["calibration"]))


class Kept:
    """Results by name in a folder, so that an evaluation that was cut short goes on from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of `name`: made once."""
        path = self.folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as found:
                return dict(found)
        made = make()
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **cast(Any, made))
        part.replace(path)
        return made


def evaluate(
    log: Log,
    folder: Path,
    config: TrainerConfig | None = None,
    *,
    encoder: str = "auto",
    ties: Ties = "instant",
    peers: Collection[str] | None = None,
    allow_leaks: bool = False,
    ablate: bool = False,
    progress: Progress | None = None,
) -> Evaluated:
    """Fit our model and every peer to a log's older rows; measure all on its newest.

    Args:
        log: the history.
        folder: where parts of the result are kept; one folder for each log and settings.
        config: settings; the defaults when absent.
        encoder: as `models.encoder`.
        ties: what rows of one time know of each other, in fitting too.
        peers: names of those that are measured, which takes longer than our model; all when
            absent.
        allow_leaks: go on where an alarm is raised.
        ablate: whether each part of the network is taken away in turn, too.
        progress: where bars are shown.

    Raises:
        TrainerError: too few rated rows; an alarm that was raised; a peer that there is not.
    """
    config = config or TrainerConfig()
    wanted = _wanted(peers)
    if config.threads:
        torch.set_num_threads(config.threads)
    kept = Kept(folder)
    log = sorted_by_time(log) if ties == "instant" else log
    found = cleaned(log, config)
    rows = found.reviews["row"].to_numpy()
    cut = by_instant if ties == "instant" else by_time
    split = cut(log.events["time"][rows], config.split)
    base = base_encoder(encoder, None, config)
    worded, copies = _worded(found.reviews, split, config)
    steps = (*found.steps, copies)
    alarms = [*leaks.known_later(log), *_copied(worded)]
    _stop_at(alarms, allow_leaks)
    unrated = unrated_texts(log, config.text, int(rows[split.test].min()))
    texts, used = _our_texts(worded, unrated, base, config, kept, progress)
    asked = _replays(log, rows, split, used, ties, progress)
    examples, test = asked["prequential"], split.test
    alarms += leaks.telling_features(examples.inputs.features[test], examples.rating[test])
    _stop_at(alarms, allow_leaks)
    ours = _ours(asked, split, config, kept, progress)
    theirs = _peers(wanted, asked, split, config, kept, progress) if wanted else {}
    if wanted and worded is not None and base is not None:
        texts |= _text_peers(wanted, worded, base, config, kept, progress)
    rating = examples.rating[test]
    blocks = {
        way: _block(rating, data, test, {MODEL: ours[way].rating, **_of_way(theirs, way)}, config)
        for way, data in asked.items()
    }
    model = ours["prequential"]
    document: dict[str, Any] = {
        "ties": ties,
        "rows": {
            "events": len(log),
            "rated": log.rated,
            **{name: len(getattr(split, name)) for name in ("train", "validation", "test")},
        },
        "rating": blocks,
        "gain": _gain(blocks["prequential"]),
        "calibration": asdict(calibration(rating, model.distribution, model.low, model.high)),
        **_text_blocks(worded, texts),
        "leaks": [asdict(each) for each in alarms],
        "cleaning": [asdict(each) for each in steps],
        "settings": config.model_dump(mode="json"),
    }
    if ablate:
        data = sampled(Prepared(examples, split), config)
        document["ablations"] = ablated(data, config, kept, progress)
    return Evaluated(document, steps)


def _wanted(peers: Collection[str] | None) -> frozenset[str]:
    """The names of the peers that are measured."""
    if peers is not None and not peers:
        return frozenset()
    from trainer.peers import ratings, texts  # an extra, and slow to import

    known = (*ratings.PEERS, *texts.TEXT_PEERS, texts.PLAIN)
    chosen = frozenset(known if peers is None else peers)
    if unknown := sorted(chosen.difference(known)):
        raise TrainerError(f"no peer is called {unknown[0]}; there are {', '.join(known)}")
    return chosen


def _stop_at(alarms: Sequence[leaks.Leak], allowed: bool) -> None:
    if alarms and not allowed:
        told = "\n".join(f"- {each}" for each in alarms)
        raise TrainerError(
            f"these rows let a model know the answer before it is asked:\n{told}\n"
            "Mend the data, or pass --allow-leaks to measure all the same"
        )


def folder_of(path: Path, config: TrainerConfig, encoder: str, ties: Ties, root: Path) -> Path:
    """Where the parts of an evaluation are kept: one for each file, settings and model's code."""
    digest = hashlib.sha256(path.read_bytes())
    code = [FEATURE_HASH, LAYOUT_HASH, FORMAT]
    digest.update(orjson.dumps([config.model_dump(mode="json"), encoder, ties, *code]))
    return root / digest.hexdigest()[:16]


# -- question (a) --------------------------------------------------------------------------------


def _replays(
    log: Log,
    rows: NDArray[np.int64],
    split: Split,
    encoder: TextEncoder | None,
    ties: Ties,
    progress: Progress | None,
) -> dict[str, Examples]:
    """The rated rows as each way of asking meets them."""
    vectors = item_vectors(log, encoder, tracker(progress, "encoding item texts"))
    width = 0 if vectors is None else vectors.rows.shape[1]
    name = encoder.hash if encoder else ""
    first = int(rows[split.test].min())

    def replayed(ties: Ties, still: int | None = None) -> Examples:
        words = tracker(progress, "replaying events" + (", standing still" if still else ""))
        return replay(log, vectors, name, width, words, ties, still).keep(rows)

    found = {"prequential": replayed(ties), "static": replayed(ties, first)}
    return {**found, "arrival": replayed("arrival")} if ties == "instant" else found


def _ours(
    asked: Mapping[str, Examples],
    split: Split,
    config: TrainerConfig,
    kept: Kept,
    progress: Progress | None,
) -> dict[str, Predicted]:
    """Our model's answers, by way of asking."""
    names = ("rating", "distribution", "low", "high")

    def make() -> Arrays:
        data = sampled(Prepared(asked["prequential"], split), config)
        fitted, corrected = fit_network(data, config, progress)
        known = np.concatenate([data.split.train, split.validation])
        network = refit_network(fitted, data, known, config, progress)
        made: Arrays = {"chosen": _chosen(fitted)}
        for way, examples in asked.items():
            told = predict(network, corrected, examples, split.test)
            made |= {f"{way} {name}": getattr(told, name) for name in names}
        return made

    made = kept.get(MODEL, make)
    return {way: Predicted(*(made[f"{way} {name}"] for name in names)) for way in asked}


def ablated(
    data: Prepared, config: TrainerConfig, kept: Kept, progress: Progress | None = None
) -> dict[str, Any]:
    """The rating network without each part in turn: by part, an `ablations.Ablated` as a mapping.

    Each is kept, for a run that is cut short.
    """

    def predicted(part: str | None) -> Floats:
        name = f"without {part or 'nothing'}"
        return kept.get(name, lambda: {"rating": ablations.ablate(data, config, part, progress)})[
            "rating"
        ]

    whole = predicted(None)
    without = {part: predicted(part) for part in ablations.PARTS}
    rating = data.examples.rating[data.split.test]
    found = ablations.compare(rating, whole, without, config)
    return {part: asdict(each) for part, each in found.items()}


def _chosen(fitted: Fitted) -> Floats:
    return np.array([fitted.penalty, fitted.epochs, fitted.belief])


def _peers(
    wanted: Collection[str],
    asked: Mapping[str, Examples],
    split: Split,
    config: TrainerConfig,
    kept: Kept,
    progress: Progress | None,
) -> dict[str, Arrays]:
    """The peers' answers, by name and way of asking."""
    from trainer.peers import ratings  # an extra, and slow to import

    rated = {way: _rated(examples) for way, examples in asked.items()}
    whole = rated["prequential"]
    train, validation = whole.take(split.train), whole.take(split.validation)
    known = ratings.joined(train, validation)

    def make(peer: ratings.Peer) -> Arrays:
        settings, told = ratings.settle(peer, train, validation, config.seed)
        answers: Arrays = {
            way: told(data.take(split.test), known if way == "static" else whole)
            for way, data in rated.items()
        }
        return {**answers, "settings": np.array(orjson.dumps(settings).decode())}

    bar = tracker(progress, "tuning and fitting the peers")
    chosen = {name: peer for name, peer in ratings.PEERS.items() if name in wanted}
    found: dict[str, Arrays] = {}
    for done, (name, peer) in enumerate(chosen.items()):
        bar(done, len(chosen))
        found[name] = kept.get(f"peer {name}", lambda peer=peer: make(peer))
    bar(1, 1)
    return found


def _rated(examples: Examples) -> Any:
    from trainer.peers.ratings import Rated

    events = examples.events
    return Rated(
        events["user"], events["item"], events["time"], examples.rating, examples.inputs.features
    )


def _of_way(theirs: Mapping[str, Arrays], way: str) -> dict[str, Floats]:
    return {name: answers[way] for name, answers in theirs.items()}


def _block(
    rating: Floats,
    examples: Examples,
    test: NDArray[np.int64],
    models: Mapping[str, Floats],
    config: TrainerConfig,
) -> dict[str, Any]:
    """The errors of every model on the test rows, and ours beside each."""
    masks = {
        "buckets": by_history(examples.history[test]),
        "item_buckets": by_history(examples.item_history[test]),
        "ratings": by_rating(rating),
    }
    found: dict[str, Any] = {}
    for name, predicted in models.items():
        clipped = np.clip(predicted, 1, 5)
        found[name] = {
            **asdict(scores(rating, clipped)),
            **{
                kind: {
                    bucket: asdict(scores(rating[mask], clipped[mask]))
                    for bucket, mask in several.items()
                }
                for kind, several in masks.items()
            },
        }
        if name == MODEL:
            continue
        # What ours gains (below zero) or loses beside this one, in squared error.
        found[name]["model_minus_this"] = {
            bucket: asdict(
                difference(
                    rating[mask], models[MODEL][mask], clipped[mask], config.gate, config.seed
                )
            )
            for bucket, mask in {"all": np.ones(len(rating), bool), **masks["buckets"]}.items()
            if mask.any()
        }
    return found


def _gain(block: Mapping[str, Any]) -> dict[str, Any] | None:
    """Ours beside the best peer: 1 − RMSE / RMSE; None without peers."""
    others = {name: figures["rmse"] for name, figures in block.items() if name != MODEL}
    if not others:
        return None
    best = min(others, key=lambda name: others[name])
    return {"best_peer": best, "gain": 1 - block[MODEL]["rmse"] / others[best]}


# -- question (b) --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worded:
    """Review texts, whole, and their parts ("" where one is missing)."""

    whole: ReviewTexts
    titles: list[str]
    bodies: list[str]
    names: list[str]  # event ids

    def part(self, name: str) -> list[str]:
        return {"text": [*self.whole.texts], "text_title": self.titles, "text_body": self.bodies}[
            name
        ]


def _worded(
    reviews: pl.DataFrame, split: Split, config: TrainerConfig
) -> tuple[_Worded | None, Step]:
    """The texts of cleaned reviews under the split of all, but those that copy older ones."""
    span = np.full(reviews.height, TRAIN, np.int8)
    span[split.validation], span[split.test] = VALIDATION, TEST
    table = reviews.with_columns(pl.Series("span", span)).sort("time", maintain_order=True)
    table = table.filter(pl.col("title").is_not_null() | pl.col("text").is_not_null())
    texts = [review_text(*pair) for pair in zip(table["title"], table["text"], strict=True)]
    tested = table["span"].to_numpy() == TEST
    newer = np.flatnonzero(tested)
    older = [texts[row] for row in np.flatnonzero(~tested).tolist()]
    copied = newer[copies(older, [texts[row] for row in newer.tolist()])]
    examples = tuple(table["event_id"][copied[:EXAMPLES].tolist()].to_list())
    step = Step("test text that repeats an older one: not asked for", True, len(copied), examples)
    good = np.setdiff1d(np.arange(len(texts)), copied)
    if len(good) < config.text.least_texts:
        return None, step
    table = table[good.tolist()]
    whole = ReviewTexts(
        [texts[row] for row in good.tolist()],
        table["rating"].to_numpy(),
        table["span"].to_numpy(),
    )
    titles, bodies = ([each or "" for each in table[name]] for name in ("title", "text"))
    return _Worded(whole, titles, bodies, table["event_id"].to_list()), step


def _copied(worded: _Worded | None) -> list[leaks.Leak]:
    if worded is None:
        return []
    tested = worded.whole.span == TEST
    texts, names = np.array(worded.whole.texts, object), np.array(worded.names, object)
    return leaks.copied_texts(
        texts[~tested].tolist(), texts[tested].tolist(), names[tested].tolist()
    )


def _our_texts(
    worded: _Worded | None,
    unrated: Sequence[str],
    base: TextEncoder | None,
    config: TrainerConfig,
    kept: Kept,
    progress: Progress | None,
) -> tuple[dict[str, Arrays], TextEncoder | None]:
    """Our star head's answers for the test texts, and the encoder that it reads with."""
    if worded is None or base is None or config.text.method == "none":
        return {}, base
    whole = worded.whole
    test = np.flatnonzero(whole.span == TEST)
    rows = np.flatnonzero(whole.span != TEST)
    if config.text.text_limit:
        rows = rows[-config.text.text_limit :]
    rows = np.concatenate([rows, test])
    used = ReviewTexts(taken(whole.texts, rows), whole.rating[rows], whole.span[rows], unrated)
    bar = tracker(progress, "reading review texts")

    def make() -> Arrays:
        folder = kept.folder / "encoder"
        checkpoint = kept.folder / "checkpoint"
        found = text.fit(used, base, config.text, folder, config.seed, bar, checkpoint)
        where = found.encoder.folder
        answers: Arrays = {
            "encoder": np.array(where.name if where.is_relative_to(folder) else ""),
            "trained": np.array(found.cost.trained),
        }
        for part in PARTS:
            words = worded.part(part)
            vectors = text.encode(found.encoder, [words[row] for row in test.tolist()], bar)
            shares = text.stars(found.judged, vectors)
            answers[part] = shares @ np.arange(1.0, 6.0)
            answers[f"{part} stars"] = shares.argmax(1) + 1
        return answers

    answers = kept.get("text model", make)
    name = str(answers["encoder"])
    if not name:
        return {MODEL: answers}, base
    folder = kept.folder / "encoder" / name
    return {MODEL: answers}, encoders.load(
        folder, config.device, longest_tokens=config.text.longest_tokens
    )


def _text_peers(
    wanted: Collection[str],
    worded: _Worded,
    base: TextEncoder,
    config: TrainerConfig,
    kept: Kept,
    progress: Progress | None,
) -> dict[str, Arrays]:
    """The peers' answers for the test texts."""
    from trainer.peers import texts  # an extra

    chosen = {name: peer for name, peer in texts.TEXT_PEERS.items() if name in wanted}
    if not chosen and texts.PLAIN not in wanted:
        return {}
    whole, spans = worded.whole, worded.whole.span
    test = np.flatnonzero(spans == TEST).tolist()
    vectors = {
        part: kept.get(
            f"vectors {part}",
            lambda part=part: {
                "vectors": text.encode(
                    base,
                    worded.part(part)
                    if part == "text"
                    else [worded.part(part)[row] for row in test],
                    tracker(progress, "encoding texts for the peers"),
                )
            },
        )["vectors"]
        for part in PARTS
    }

    def those(span: int) -> texts.Worded:
        chosen = np.flatnonzero(spans == span)
        return texts.Worded(
            taken(whole.texts, chosen),
            whole.rating[chosen],
            vectors["text"][chosen],
        )

    def make(peer: texts.TextPeer) -> Arrays:
        settings, read = texts.settle(peer, those(TRAIN), those(VALIDATION), config.seed)
        answers: Arrays = {"settings": np.array(orjson.dumps(settings).decode())}
        for part in PARTS:
            words = [worded.part(part)[row] for row in test]
            encoded = vectors[part][test] if part == "text" else vectors[part]
            answers[part], answers[f"{part} stars"] = read(words, encoded)
        return answers

    found = {
        name: kept.get(f"text peer {name}", lambda peer=peer: make(peer))
        for name, peer in chosen.items()
    }
    if texts.PLAIN not in wanted:
        return found
    checkpoints = kept.folder / "plain"

    def plain() -> Arrays:
        known = np.flatnonzero(spans != TEST)
        told = texts.finetune_plain(
            base.folder,
            taken(whole.texts, known),
            whole.rating[known],
            [[worded.part(part)[row] for row in test] for part in PARTS],
            config.text.longest_tokens,
            config.seed,
            checkpoints,
        )
        answers: Arrays = {}
        for part, (expected, stars) in zip(PARTS, told, strict=True):
            answers[part], answers[f"{part} stars"] = expected, stars
        return answers

    found[texts.PLAIN] = kept.get(f"text peer {texts.PLAIN}", plain)
    shutil.rmtree(checkpoints, ignore_errors=True)  # hundreds of megabytes, of no more use
    return found


def _text_blocks(worded: _Worded | None, texts: Mapping[str, Arrays]) -> dict[str, dict[str, Any]]:
    """The errors of every reader, for whole reviews and for each part where there is one."""
    if worded is None:
        return {part: {} for part in PARTS}
    tested = worded.whole.span == TEST
    rating = worded.whole.rating[tested]
    found: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        words = np.array([bool(each) for each in worded.part(part)])[tested]
        found[part] = {
            name: asdict(_part_scores(rating[words], answers, part, words))
            for name, answers in texts.items()
        }
    return found


def _part_scores(
    rating: Floats, answers: Arrays, part: str, words: NDArray[np.bool_]
) -> TextScores:
    return class_scores(rating, answers[part][words], answers[f"{part} stars"][words])


# -- for people ----------------------------------------------------------------------------------


def summary(found: Evaluated) -> RenderableType:
    """Tables for the console."""
    document = found.document
    parts: list[RenderableType] = []
    buckets = [name for name, _, _ in HISTORY_BUCKETS]
    for way, block in document["rating"].items():
        table = Table(
            way,
            "RMSE",
            "MAE",
            *(f"RMSE {bucket}" for bucket in buckets),
            "model − this, squared error",
            title_justify="left",
        )
        for name, figures in sorted(block.items(), key=lambda each: each[1]["rmse"]):
            numbers = [figures["rmse"], figures["mae"]]
            numbers += [figures["buckets"][bucket]["rmse"] for bucket in buckets]
            gap = figures.get("model_minus_this", {}).get("all")
            told = f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap else ""
            cells = ["–" if np.isnan(number) else f"{number:.4f}" for number in numbers]
            table.add_row(name, *cells, told, style="bold" if name == MODEL else None)
        parts.append(table)
    if document["gain"]:
        gain = document["gain"]
        parts.append(f"prequential: {gain['gain']:+.2%} beside the best peer, {gain['best_peer']}")
    parts += [_text_table(part, document[part]) for part in PARTS if document[part]]
    ece, coverage = document["calibration"]["ece"], document["calibration"]["coverage"]
    parts.append(f"calibration error {ece:.3f}, 80% intervals hold {coverage:.1%}")
    return Group(*parts)


def _text_table(part: str, block: Mapping[str, Any]) -> Table:
    table = Table(part.replace("_", ": "), "rows", "RMSE", "MAE", "accuracy", "macro-F1")
    for name, figures in sorted(block.items(), key=lambda each: each[1]["rmse"]):
        numbers: Sequence[float] = [
            figures[metric] for metric in ("rmse", "mae", "accuracy", "macro_f1")
        ]
        style = "bold" if name == MODEL else None
        cells = [f"{number:.4f}" for number in numbers]
        table.add_row(name, str(figures["rows"]), *cells, style=style)
    return table
