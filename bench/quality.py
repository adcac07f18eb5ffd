"""Everything about how good predictions are, in parts that are kept: `make quality`.

Parts: the evaluation beside peers on each set, the table of fine-tuning methods, the ablations of
the rating network and of the text model, the speed of a long replay, and question (a) alone on
other public sets, of which those count that are in `--others` as their publishers name them. Each
part is a JSON file in `--folder`; one that is there is not made again, so the whole may be run bit
by bit (`--parts`, `--sets`). What a run makes takes the place of what `bench/results/quality.json`
had of it; the rest of that stays, with the day and the machine that it is of. `docs/quality.md`
tells all of it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import orjson
import psutil
import torch
from rich.console import Console
from rich.progress import Progress

from bench.command import exit_code
from bench.quality_page import AS_IT_IS, TEXT_SET, gains, page
from bench.report import RESULTS, machine, write
from bench.rows import make_rows
from model.encoder import TextEncoder
from model.replay import History
from starcast import importers
from starcast.log import LogConfig, configure
from trainer import evaluate as evaluation
from trainer import text as texts
from trainer.config import Method, TextConfig, TrainerConfig
from trainer.data import from_file
from trainer.figures import Evaluated, summary
from trainer.fine_tune import taken
from trainer.gate import difference
from trainer.metrics import scores
from trainer.prepare import cleaned, review_texts
from trainer.text import ReviewTexts
from trainer.train import base_encoder

Source = tuple[Callable[[Sequence[Path], Path], object], tuple[str, ...]]
"""How a set is imported, and its files."""

SETS: Mapping[str, Source] = {
    "Musical Instruments": (
        importers.import_amazon,
        ("amazon_musical_instruments_5/Musical_instruments_reviews.csv.zip",),
    ),
    "Gift Cards": (
        importers.import_amazon,
        (
            "amazon_gift_cards_5_with_meta/Gift_Cards_5.json.gz",
            "amazon_gift_cards_5_with_meta/meta_Gift_Cards.json.gz",
        ),
    ),
    "MovieLens 100K": (
        importers.import_movielens,
        ("ml-100k/ml-100k.inter", "ml-100k/ml-100k.item", "ml-100k/ml-100k.user"),
    ),
}
"""By name; files are below `--data` or the movies' folder."""

OTHERS: Mapping[str, Source] = {
    "Amazon Fashion": (importers.import_amazon, ("AMAZON_FASHION_5.json",)),
    "All Beauty": (importers.import_amazon, ("All_Beauty_5.json.gz",)),
    "Appliances": (importers.import_amazon, ("Appliances_5.json.gz",)),
    "Magazine Subscriptions": (importers.import_amazon, ("Magazine_Subscriptions_5.json.gz",)),
    "MovieLens latest small": (importers.import_movielens, ("ratings.csv", "movies.csv")),
}
"""By name: the small 5-core sets of Amazon 2018 (McAuley), and GroupLens'; below `--others`.

No weight or size was chosen by them, but newcomers' level (decision 21) was built on All Beauty's
storm and looked at on the rest.
"""

METHODS: tuple[Method, ...] = ("full", "top_layers", "lora", "adalora", "prefix", "frozen")
PARTS = ("sets", "methods", "ablations", "worded", "replay", "others")
HALF = "half of the stars"


@dataclass(frozen=True)
class Variant:
    """Another way to fit the text model, and the one that it is held against."""

    changes: Mapping[str, Any]  # of the settings of texts
    beside: str = AS_IT_IS
    hidden: float = 0  # share of train texts, drawn at random, whose stars are taken away


WORDED: Mapping[str, Variant] = {
    AS_IT_IS: Variant({}),
    **{
        f"with {way}": Variant({"fine_tune": {"augment": {"ways": (way,)}}})
        for way in ("delete", "swap", "shift", "reverse", "replace", "punctuate")
    },
    "adapted to the texts first": Variant({"adapt": {"epochs": 1}}),
    "cross-entropy alone": Variant({"fine_tune": {"squared_error": 0}}),
    HALF: Variant({}, AS_IT_IS, 0.5),
    "half, pseudo-labels of the rest": Variant({"pseudo_labels": 0.9}, HALF, 0.5),
    "half, adapted to all": Variant({"adapt": {"epochs": 1}}, HALF, 0.5),
}
"""Ablations of the text model, on validation texts."""

REPLAYED = 10_000_000  # events of the long replay
USERS, ITEMS = 1_000_000, 100_000
BLOCK = 1_000_000  # events made at once


@dataclass(frozen=True)
class Place:
    """Where things lie."""

    folder: Path
    data: Path
    movies: Path
    others: Path
    console: Console

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """A part: made once."""
        path = self.folder / f"{name.lower().replace(' ', '-')}.json"
        if not path.exists():
            self.console.print(f"{name} …")
            began = time.monotonic()
            found = {
                "figures": make(),
                "minutes": round((time.monotonic() - began) / 60, 1),
                "date": datetime.now(UTC).date().isoformat(),
                "machine": machine(),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            option = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
            part = path.with_suffix(".part")
            part.write_bytes(orjson.dumps(found, option=option) + b"\n")
            part.replace(path)
        return orjson.loads(path.read_bytes())

    def events(self, name: str) -> Path:
        """The record file of a set."""
        path = self.folder / f"{name.lower().replace(' ', '-')}.jsonl.gz"
        if not path.exists():
            read, files = {**SETS, **OTHERS}[name]
            if name in OTHERS:
                folder = self.others
            else:
                folder = self.movies if name.startswith("MovieLens") else self.data
            path.parent.mkdir(parents=True, exist_ok=True)
            read([folder / each for each in files], path)
        return path

    def at_hand(self) -> list[str]:
        """The sets of OTHERS whose files are there; the others are named."""
        found: list[str] = []
        for name, (_, files) in OTHERS.items():
            lacking = [each for each in files if not (self.others / each).exists()]
            if lacking:
                self.console.print(f"{name}: left out, {self.others / lacking[0]} is not there")
            else:
                found.append(name)
        return found


# -- parts ---------------------------------------------------------------------------------------


def evaluated(place: Place, name: str) -> dict[str, Any]:
    """The document of `starcast evaluate` with default settings."""
    found = _evaluation(place, name)
    place.console.print(summary(found))
    return found.document


def rated(place: Place, name: str) -> dict[str, Any]:
    """The document of `starcast evaluate` for question (a) alone, encoders as they come."""
    from trainer.peers import ratings  # an extra

    config = TrainerConfig(text=TextConfig(method="none"))
    found = _evaluation(place, name, config, peers=tuple(ratings.PEERS))
    place.console.print(summary(found))
    return found.document


def ablated(place: Place, name: str) -> dict[str, Any]:
    """The rating network without each part in turn, asked for the rows of `evaluated`."""
    return _evaluation(place, name, peers=(), ablate=True).document["ablations"]


def _evaluation(
    place: Place, name: str, config: TrainerConfig | None = None, **options: Any
) -> Evaluated:
    config = config or TrainerConfig()
    events = place.events(name)
    folder = evaluation.folder_of(events, config, "auto", "instant", place.folder / "evaluate")
    with Progress(console=place.console) as progress:
        return evaluation.evaluate(from_file(events), folder, config, progress=progress, **options)


def method(place: Place, name: Method) -> dict[str, Any]:
    """One way to fine-tune, in a process of its own so that its memory is its own."""
    out = place.folder / f"method-{name}.figures"
    command = [sys.executable, "-m", "bench.quality", "--folder", str(place.folder)]
    command += ["--data", str(place.data), "--movies", str(place.movies)]
    run([*command, "--method", name, "--out", str(out)], check=True)
    return orjson.loads(out.read_bytes())


def fitted_by(place: Place, name: Method) -> dict[str, Any]:
    """What a way to fine-tune costs and gives on the newest texts."""
    config = TrainerConfig(text=TextConfig(method=name))
    reviews, base = _read(place, config)
    before, began = psutil.Process().memory_info().rss, time.process_time()
    clock = time.monotonic()
    folder = place.folder / "methods" / name
    with Progress(console=place.console) as progress:
        task = progress.add_task(name, total=None)
        found = texts.fit(
            reviews,
            base,
            config.text,
            folder,
            config.seed,
            lambda done, total: progress.update(task, completed=done, total=total),
            folder / "checkpoint",
        )
    import resource  # not on every system, and of use here alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024
    on_gpu = base.device.type == "cuda"
    return {
        "trained": found.cost.trained,
        "device": torch.cuda.get_device_name(base.device) if on_gpu else "CPU",
        "minutes": round((time.monotonic() - clock) / 60, 2),
        "processor_minutes": round((time.process_time() - began) / 60, 1),
        "peak_device_mb": round(torch.cuda.max_memory_allocated(base.device) / 2**20)
        if on_gpu
        else None,
        "peak_mb": round(peak / 2**20),
        "grown_mb": round((peak - before) / 2**20),
        **asdict(found.scores),
    }


def worded(place: Place, name: str) -> dict[str, Any]:
    """The text model fitted another way: its error, and expected ratings, on validation texts."""
    variant = WORDED[name]
    config = TrainerConfig(text=TextConfig.model_validate({"method": "full", **variant.changes}))
    reviews, base = _read(place, config)
    reviews = without_stars(reviews, variant.hidden, config.seed)
    folder = place.folder / "worded"
    expected = texts.validate(reviews, base, config.text, folder, config.seed)
    rating = reviews.rating[reviews.span == texts.VALIDATION]
    return {"rmse": scores(rating, expected).rmse, "rating": rating, "expected": expected}


def _read(place: Place, config: TrainerConfig) -> tuple[ReviewTexts, TextEncoder]:
    """The texts that ways to fine-tune are compared on, and the encoder that all start from."""
    log = from_file(place.events(TEXT_SET))
    reviews = review_texts(cleaned(log, config).reviews, config.text, config.split)
    base = base_encoder("auto", None, config)
    if reviews is None or base is None:
        raise SystemExit("The packaged encoder is missing: make setup")
    return reviews, base


def without_stars(reviews: ReviewTexts, share: float, seed: int) -> ReviewTexts:
    """Reviews of which a share of the train texts has no stars."""
    drawn = np.random.default_rng(seed).random(len(reviews.span)) < share
    hidden = np.flatnonzero(drawn & (reviews.span == texts.TRAIN))
    kept = np.setdiff1d(np.arange(len(reviews.span)), hidden)
    unrated = [*reviews.unrated, *taken(reviews.texts, hidden)]
    return ReviewTexts(
        taken(reviews.texts, kept), reviews.rating[kept], reviews.span[kept], unrated
    )


def replayed() -> dict[str, Any]:
    """States of ten million events: events a second and the most memory."""
    history = History(batch_events=8_192)
    spent, most = 0.0, 0
    for first in range(0, REPLAYED, BLOCK):
        events = make_rows(BLOCK, USERS, ITEMS, seed=first, first=first)
        began = time.monotonic()
        history.apply(events)
        spent += time.monotonic() - began
        most = max(most, psutil.Process().memory_info().rss)
    return {
        "events": REPLAYED,
        "users": len(history.users.rows),
        "items": len(history.items.rows),
        "events_per_second": round(REPLAYED / spent),
        "peak_mb": round(most / 2**20),
    }


# -- the whole -----------------------------------------------------------------------------------


def compared(variants: Mapping[str, Any]) -> dict[str, Any]:
    """Variants of the text model, each with what its squared error is above that beside it."""
    config = TrainerConfig()
    found: dict[str, Any] = {}
    for name, each in variants.items():
        beside, figures, gap = WORDED[name].beside, each["figures"], None
        if name != beside:
            told = [figures["rating"], figures["expected"], variants[beside]["figures"]["expected"]]
            rating, expected, other = (np.asarray(one, np.float64) for one in told)
            gap = asdict(difference(rating, expected, other, config.gate, config.seed))
        found[name] = each | {"figures": {"rmse": figures["rmse"], "beside": beside, "gap": gap}}
    return found


def kept(path: Path) -> dict[str, Any]:
    """The parts of an earlier run's results."""
    if not path.exists():
        return {}
    found = orjson.loads(path.read_bytes())
    return {part: found[part] for part in PARTS if part in found}


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="bench.quality", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--movies", type=Path, default=Path(".cache/movielens"))
    parser.add_argument("--others", type=Path, default=Path(".cache/others"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS])
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, and write."""
    chosen = read_options(arguments)
    configure(LogConfig(level="warning"))
    place = Place(chosen.folder, chosen.data, chosen.movies, chosen.others, Console(stderr=True))
    if chosen.method:
        chosen.out.write_bytes(orjson.dumps(fitted_by(place, chosen.method)))
        return 0
    others: Sequence[Any] = place.at_hand() if "others" in chosen.parts else ()
    several: Mapping[str, tuple[str, Sequence[Any], Callable[[Place, Any], Any]]] = {
        "sets": ("evaluate", chosen.sets, evaluated),
        "methods": ("method", METHODS, method),
        "ablations": ("ablations", chosen.sets, ablated),
        "worded": ("worded", [*WORDED], worded),
        "others": ("others", others, rated),
    }
    parts = kept(RESULTS / "quality.json")
    for part in chosen.parts:
        if part == "replay":
            parts[part] = place.part("replay", replayed)
            continue
        words, names, make = several[part]
        made = {name: place.part(f"{words} {name}", partial(make, place, name)) for name in names}
        parts[part] = {**parts.get(part, {}), **(compared(made) if part == "worded" else made)}
    if parts.get("sets"):
        parts["gains"] = gains(parts["sets"])
    written = write("quality", parts, "torch", "transformers", "lightgbm", "scikit-learn", "peft")
    Path("docs/quality.md").write_text(page(parts), encoding="utf-8")
    place.console.print(f"Wrote {written} and docs/quality.md")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
