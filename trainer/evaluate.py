"""One evaluation for every model, honest by construction.

Rated rows are split by time: train, then validation, then test. Everything is chosen on
validation, then fitted to train and validation, and asked for the test rows in three ways:

- prequential: each row is predicted from all that is strictly older, and learnt by the states;
- arrival: likewise, but rows of one time see those that came before them in the given order;
- static: states stand still from the first test row on.

Question (b), stars read off a review's text (`evaluate_texts`), has the same split and is never
mixed with (a).
"""

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from model import encoder as encoders
from model.bundle import Bundle
from model.calibration import Calibration as BundleCalibration
from model.encoder import TextEncoder
from model.ladder import VERSION
from trainer import ablations, evaluate_texts, leaks
from trainer.assess import bundle_encoder
from trainer.clean import Step
from trainer.config import TrainerConfig
from trainer.data import Examples, Log, Ties, replay, sorted_by_time
from trainer.exceptions import TrainerError
from trainer.figures import MODEL, Evaluated, errors, gained
from trainer.kept import Arrays, Kept
from trainer.metrics import (
    Floats,
    calibration,
)
from trainer.models import Predicted, baselines, predict
from trainer.prepare import (
    Prepared,
    cleaned,
    item_vectors,
    sampled,
    unrated_texts,
)
from trainer.progress import tracker
from trainer.split import Split, by_instant, by_time
from trainer.train import base_encoder, fit_network, fitted_until, refit_network

logger = logging.getLogger(__name__)

_LEAST_TIMES = 3  # so that train, validation and test are each of their own


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
        TrainerError: too few rated rows; an alarm that was raised; a peer that there is not; parts
            of other rows in the folder.
    """
    config = config or TrainerConfig()
    wanted = _wanted(peers)
    kept = Kept(folder)
    begun = _begin(log, config, ties, allow_leaks)
    log, rows, split, worded = begun.log, begun.rows, begun.split, begun.worded
    if not np.array_equal(kept.get("rows", lambda: {"rows": rows})["rows"], rows):
        raise TrainerError(  # what lay in the future then may not now
            f"{folder} has parts that were measured on other rows; delete it to begin anew"
        )
    base = base_encoder(encoder, None, config)
    unrated = unrated_texts(log, config.text, int(rows[split.test].min()))
    read, used = evaluate_texts.ours(worded, unrated, base, config, kept, progress)
    asked = _replays(begun, used, ties, progress)
    alarms = _alarms(begun, asked, allow_leaks)
    ours = _ours(asked, split, config, kept, progress)
    texts = {} if read is None else {MODEL: read}
    theirs = _peers(wanted, asked, split, ties, config, kept, progress) if wanted else {}
    if wanted and worded is not None and base is not None:
        texts |= evaluate_texts.peers(wanted, worded, base, config, kept, progress)
    others = {way: _of_way(theirs, way) for way in asked.test}
    document = {"ties": ties, **_document(begun, asked, ours, others, texts, alarms, config)}
    if ablate:
        data = sampled(Prepared(asked.known, split), config)
        document["ablations"] = ablated(data, config, kept, progress)
    return Evaluated(document, begun.steps)


def measure(
    log: Log,
    bundle: Bundle | None,
    config: TrainerConfig | None = None,
    *,
    ties: Ties = "instant",
    allow_leaks: bool = False,
    progress: Progress | None = None,
) -> Evaluated:
    """Ask a bundle, or the cold-start ladder when it is None, for the newest rows of a log.

    Nothing is fitted but the baselines beside it, which see the older rows alone. The bundle may
    have been fitted to these very rows: how many are not newer than its own is told. The other
    arguments and errors are as in `evaluate`.
    """
    config = config or TrainerConfig()
    begun = _begin(log, config, ties, allow_leaks)
    log, split, worded = begun.log, begun.split, begun.worded
    encoder = bundle_encoder(bundle, config)
    asked = _replays(begun, encoder, ties, progress)
    alarms = _alarms(begun, asked, allow_leaks)
    network = bundle.network if bundle else None
    calibrated = bundle.calibration if bundle else BundleCalibration()
    ours = {way: predict(network, calibrated, data) for way, data in asked.test.items()}
    others = {way: baselines(asked.known, split, data, config) for way, data in asked.test.items()}
    texts: dict[str, Arrays] = {}
    if worded is not None and encoder is not None and encoder.star_head is not None:
        bar = tracker(progress, "reading review texts")
        texts[MODEL] = evaluate_texts.read(worded, encoder, encoder.star_head, bar)
    document = _document(begun, asked, ours, others, texts, alarms, config)
    times = log.events["time"][begun.rows[split.test]]
    known = int((times <= fitted_until(bundle)).sum()) if bundle else 0
    document["rows"]["not_newer_than_its_own"] = known
    version = bundle.version if bundle else VERSION
    if known:
        logger.warning(
            "%s was fitted to rows as new as %d of these %d: of a shop whose rows they are it errs "
            "less here than on what it has not met",
            version,
            known,
            len(times),
        )
    return Evaluated({"model": version, "ties": ties, **document}, begun.steps)


@dataclass(frozen=True)
class _Begun:
    """What is asked for, before anything is fitted."""

    log: Log  # in the order of time, when ties are those of an instant
    rows: NDArray[np.int64]  # of the cleaned reviews, in the log
    split: Split  # of these
    worded: evaluate_texts.Worded | None
    alarms: list[leaks.Leak]
    steps: tuple[Step, ...]  # of cleaning


@dataclass(frozen=True)
class _Asked:
    """Rows as the replay met them."""

    known: Examples  # all that are rated, each from what came before it
    test: Mapping[str, Examples]  # the newest, by way of asking


def _begin(log: Log, config: TrainerConfig, ties: Ties, allow_leaks: bool) -> _Begun:
    if config.threads:
        torch.set_num_threads(config.threads)
    log = sorted_by_time(log) if ties == "instant" else log
    found = cleaned(log, config)
    rows = found.reviews["row"].to_numpy()
    cut = by_instant if ties == "instant" else by_time
    time = log.events["time"][rows]
    split = cut(time, config.split)
    if ties == "instant" and len(np.unique(time)) < _LEAST_TIMES:
        logger.warning(
            "all rows are of one time or two, and rows of one time are asked for without what the "
            "others say: the order of the file is taken by --ties arrival"
        )
    worded, copies = evaluate_texts.texts_of(found.reviews, split, config)
    alarms = leaks.known_later(log)
    _stop_at(alarms, allow_leaks)
    return _Begun(log, rows, split, worded, alarms, (*found.steps, copies))


def _alarms(begun: _Begun, asked: _Asked, allow_leaks: bool) -> list[leaks.Leak]:
    """All alarms, once the rows have been replayed. Raises TrainerError unless they are allowed."""
    examples = asked.known
    time = begun.log.events["time"][begun.rows]
    told = {  # by what all rows say, and the newest, in which a leak may have begun
        each.kind: each
        for rows in (np.arange(len(examples)), begun.split.test)
        for each in leaks.telling_features(
            examples.inputs.features[rows], examples.rating[rows], time[rows]
        )
    }
    alarms = [*begun.alarms, *told.values()]
    _stop_at(alarms, allow_leaks)
    return alarms


def _document(
    begun: _Begun,
    asked: _Asked,
    ours: Mapping[str, Predicted],
    others: Mapping[str, Mapping[str, Floats]],
    texts: Mapping[str, Arrays],
    alarms: Sequence[leaks.Leak],
    config: TrainerConfig,
) -> dict[str, Any]:
    """The figures of ours and of others, by way of asking and by name."""
    rating = asked.test["prequential"].rating
    blocks = {
        way: errors(data, {MODEL: ours[way].rating, **others[way]}, config)
        for way, data in asked.test.items()
    }
    model = ours["prequential"]
    return {
        "rows": {
            "events": len(begun.log),
            "rated": begun.log.rated,
            **{name: len(getattr(begun.split, name)) for name in ("train", "validation", "test")},
        },
        "rating": blocks,
        "gain": gained(blocks["prequential"]),
        "calibration": asdict(calibration(rating, model.distribution, model.low, model.high)),
        **evaluate_texts.blocks(begun.worded, texts),
        "leaks": [asdict(each) for each in alarms],
        "cleaning": [asdict(each) for each in begun.steps],
        "settings": config.model_dump(mode="json"),
    }


def _wanted(peers: Collection[str] | None) -> frozenset[str]:
    """The names of the peers that are measured."""
    if peers is not None and not peers:
        return frozenset()
    try:
        from trainer.peers import ratings, texts  # an extra, and slow to import
    except ImportError as error:
        raise TrainerError(
            f"the peers are not all installed ({error}): run `pip install '.[peers]'` in a "
            "checkout, or pass --peers none to measure our model alone"
        ) from error

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
            "Mend the data (date an item at its first event or before, leave out what was made of "
            "ratings), or pass --allow-leaks to measure all the same"
        )


def folder_of(path: Path, config: TrainerConfig, encoder: str, ties: Ties, root: Path) -> Path:
    """Where the parts of an evaluation are kept: one for each file, settings, encoder and code."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    read = encoders.setting_hash(encoder)
    digest.update(orjson.dumps([config.model_dump(mode="json"), read, ties]))
    for package in (Path(encoders.__file__).parent, Path(__file__).parent):
        for source in sorted(package.rglob("*.py")):  # another release may say otherwise
            digest.update(source.read_bytes())
    return root / digest.hexdigest()[:16]


def _replays(
    begun: _Begun, encoder: TextEncoder | None, ties: Ties, progress: Progress | None
) -> _Asked:
    """The rated rows as each way of asking meets them."""
    log, rows = begun.log, begun.rows
    vectors = item_vectors(log, encoder, tracker(progress, "encoding item texts"))
    width = 0 if vectors is None else vectors.rows.shape[1]
    name = encoder.hash if encoder else ""
    first = int(rows[begun.split.test].min())

    def replayed(chosen: NDArray[np.int64], ties: Ties, still: int | None = None) -> Examples:
        words = tracker(progress, "replaying events" + (", standing still" if still else ""))
        return replay(log, vectors, name, width, words, ties, still, chosen)

    test = begun.split.test
    known = replayed(rows, ties)
    asked = {"prequential": known.take(test), "static": replayed(rows[test], ties, first)}
    if ties == "instant":
        asked["arrival"] = replayed(rows[test], "arrival")
    return _Asked(known, asked)


def _ours(
    asked: _Asked,
    split: Split,
    config: TrainerConfig,
    kept: Kept,
    progress: Progress | None,
) -> dict[str, Predicted]:
    """Our model's answers, by way of asking."""
    names = ("rating", "distribution", "low", "high")

    def make() -> Arrays:
        data = sampled(Prepared(asked.known, split), config)
        fitted, corrected = fit_network(data, config, progress)
        known = np.concatenate([data.split.train, split.validation])
        network = refit_network(fitted, data, known, config, progress)
        made: Arrays = {}
        for way, examples in asked.test.items():
            told = predict(network, corrected, examples)
            made |= {f"{way} {name}": getattr(told, name) for name in names}
        return made

    made = kept.get(MODEL, make)
    return {way: Predicted(*(made[f"{way} {name}"] for name in names)) for way in asked.test}


def ablated(
    data: Prepared, config: TrainerConfig, kept: Kept, progress: Progress | None = None
) -> dict[str, Any]:
    """The network with each part changed in turn: by part, an `ablations.Ablated` as a mapping.

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


def _peers(
    wanted: Collection[str],
    asked: _Asked,
    split: Split,
    ties: Ties,
    config: TrainerConfig,
    kept: Kept,
    progress: Progress | None,
) -> dict[str, Arrays]:
    """The peers' answers, by name and way of asking."""
    from trainer.peers import ratings  # an extra, and slow to import

    whole = _rated(asked.known, ties)
    train, validation = whole.take(split.train), whole.take(split.validation)
    known = ratings.joined(train, validation)

    def make(name: str, peer: ratings.Peer) -> Arrays:
        settings, told = ratings.settle(
            peer, train, validation, config.seed, kept.trials(f"peer {name}")
        )
        answers: Arrays = {}
        for way, data in asked.test.items():
            # Of rows of one time they know what our states do.
            order: Ties = "arrival" if way == "arrival" else ties
            past = known if way == "static" else _rated(asked.known, order)
            answers[way] = told(_rated(data, order), past)
        return {**answers, "settings": np.array(orjson.dumps(settings).decode())}

    bar = tracker(progress, "tuning and fitting the peers")
    chosen = {name: peer for name, peer in ratings.PEERS.items() if name in wanted}
    found: dict[str, Arrays] = {}
    for done, (name, peer) in enumerate(chosen.items()):
        bar(done, len(chosen))
        found[name] = kept.get(f"peer {name}", lambda name=name, peer=peer: make(name, peer))
    bar(1, 1)
    return found


def _rated(examples: Examples, ties: Ties) -> Any:
    from trainer.peers.ratings import Rated

    events = examples.events
    turn = examples.row if ties == "arrival" else events["time"]
    return Rated(events["user"], events["item"], turn, examples.rating, examples.inputs.features)


def _of_way(theirs: Mapping[str, Arrays], way: str) -> dict[str, Floats]:
    return {name: answers[way] for name, answers in theirs.items()}
