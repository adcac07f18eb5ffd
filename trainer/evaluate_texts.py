"""Question (b) of `evaluate`: how many stars does a review's text mean, to us and to the peers.

Everybody is fitted to whole reviews, and asked for these, for titles alone and for texts alone.
"""

import logging
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson
import polars as pl
from numpy.typing import NDArray
from rich.progress import Progress

from model import encoder as encoders
from model.encoder import StarHead, TextEncoder
from trainer import checkpoints, text
from trainer.clean import EXAMPLES, Step
from trainer.config import TrainerConfig
from trainer.copies import copies
from trainer.fine_tune import taken
from trainer.kept import Arrays, Kept
from trainer.metrics import Floats, TextScores, class_scores
from trainer.prepare import joined_texts, with_words
from trainer.progress import OnProgress, tracker
from trainer.split import Split
from trainer.text import TEST, TRAIN, VALIDATION, ReviewTexts

logger = logging.getLogger(__name__)

PARTS = ("text", "text_title", "text_body")  # whole reviews, titles alone, texts alone


@dataclass(frozen=True)
class Worded:
    """Review texts, whole, and their parts ("" where one is missing)."""

    whole: ReviewTexts
    titles: list[str]
    bodies: list[str]

    def part(self, name: str) -> list[str]:
        """The texts as one of `PARTS` has them."""
        return {"text": [*self.whole.texts], "text_title": self.titles, "text_body": self.bodies}[
            name
        ]


def texts_of(
    reviews: pl.DataFrame, split: Split, config: TrainerConfig
) -> tuple[Worded | None, Step]:
    """The texts of cleaned reviews under the split of all, but those that copy older ones.

    None where they are few, or a span has none: to fit to, to choose by, or to be asked.
    """
    span = np.full(reviews.height, TRAIN, np.int8)
    span[split.validation], span[split.test] = VALIDATION, TEST
    table = with_words(reviews.with_columns(pl.Series("span", span)))
    texts = joined_texts(table)
    tested = table["span"].to_numpy() == TEST
    newer = np.flatnonzero(tested)
    older = taken(texts, np.flatnonzero(~tested))
    copied = newer[copies(older, taken(texts, newer))]
    examples = tuple(table["event_id"][copied[:EXAMPLES].tolist()].to_list())
    step = Step("test text that repeats an older one: not asked for", True, len(copied), examples)
    good = np.setdiff1d(np.arange(len(texts)), copied)
    table = table[good.tolist()]
    if len(good) < config.text.least_texts or table["span"].n_unique() < 3:
        return None, step
    whole = ReviewTexts(
        taken(texts, good),
        table["rating"].to_numpy(),
        table["span"].to_numpy(),
    )
    titles, bodies = ([each or "" for each in table[name]] for name in ("title", "text"))
    return Worded(whole, titles, bodies), step


def ours(
    worded: Worded | None,
    unrated: Sequence[str],
    base: TextEncoder | None,
    config: TrainerConfig,
    kept: Kept,
    progress: Progress | None,
) -> tuple[Arrays | None, TextEncoder | None]:
    """Our star head's answers for the test texts, and the encoder that it reads with."""
    if worded is None or base is None or config.text.method == "none":
        return None, base
    whole = worded.whole
    test = np.flatnonzero(whole.span == TEST)
    known = np.flatnonzero(whole.span != TEST)
    rows = np.concatenate([known[-config.text.limit :], test])
    used = ReviewTexts(taken(whole.texts, rows), whole.rating[rows], whole.span[rows], unrated)
    bar = tracker(progress, "reading review texts")

    def make() -> Arrays:
        folder = kept.folder / "encoder"
        checkpoint = kept.folder / "checkpoint"
        found = text.fit(used, base, config.text, folder, config.seed, bar, checkpoint)
        where = found.encoder.folder
        answers: Arrays = {
            "encoder": np.array(where.name if where.is_relative_to(folder) else ""),
        }
        return answers | read(worded, found.encoder, found.judged, bar)

    answers = kept.get("text model", make)
    checkpoints.drop(kept.folder / "checkpoint")
    name = str(answers["encoder"])
    if not name:
        return answers, base
    folder = kept.folder / "encoder" / name
    return answers, encoders.load(folder, config.device)


def read(worded: Worded, encoder: TextEncoder, head: StarHead, on_progress: OnProgress) -> Arrays:
    """What a star head says of the test texts, and of each of their parts."""
    test = np.flatnonzero(worded.whole.span == TEST)
    answers: Arrays = {}
    for part in PARTS:
        vectors = text.encode(encoder, taken(worded.part(part), test), on_progress)
        shares = head.stars(vectors)
        answers[part] = shares @ np.arange(1.0, 6.0)
        answers[f"{part} stars"] = shares.argmax(1) + 1
    return answers


def peers(
    wanted: Collection[str],
    worded: Worded,
    base: TextEncoder,
    config: TrainerConfig,
    kept: Kept,
    progress: Progress | None,
) -> dict[str, Arrays]:
    """The peers' answers for the test texts; of those that can be fitted to these texts."""
    from trainer.peers import texts  # an extra

    chosen = {name: peer for name, peer in texts.TEXT_PEERS.items() if name in wanted}
    if not chosen and texts.PLAIN not in wanted:
        return {}
    whole, spans = worded.whole, worded.whole.span
    test = np.flatnonzero(spans == TEST)
    # A plain fine-tune reads words.
    vectors = _vectors(worded, base, kept, progress) if chosen else {}

    def those(span: int) -> texts.RatedTexts:
        chosen = np.flatnonzero(spans == span)
        return texts.RatedTexts(
            taken(whole.texts, chosen),
            whole.rating[chosen],
            vectors["text"][chosen],
        )

    def make(name: str, peer: texts.TextPeer) -> Arrays:
        settings, read = texts.settle(
            peer, those(TRAIN), those(VALIDATION), config.seed, kept.trials(f"text peer {name}")
        )
        told = (
            read(
                taken(worded.part(part), test),
                vectors[part][test] if part == "text" else vectors[part],
            )
            for part in PARTS
        )
        return {"settings": np.array(orjson.dumps(settings).decode()), **_answers(told)}

    bar = tracker(progress, "fitting the peers that read texts")
    every = len(chosen) + (texts.PLAIN in wanted)
    found: dict[str, Arrays] = {}
    for done, (name, peer) in enumerate(chosen.items()):
        bar(done, every)
        try:
            found[name] = kept.get(
                f"text peer {name}", lambda name=name, peer=peer: make(name, peer)
            )
        except ValueError as error:  # all stars are alike, or no word occurs twice
            logger.warning("peer %s takes no such texts and tells their mean: %s", name, error)
            found[name] = _mean(whole.rating[spans != TEST], len(test))
    bar(len(chosen), every)
    if texts.PLAIN in wanted:
        found[texts.PLAIN] = _finetuned(worded, base, config.seed, kept)
        bar(1, 1)
    return found


def _mean(known: Floats, count: int) -> Arrays:
    """What `count` texts are said to mean by who knows nothing but these ratings (n)."""
    mean = np.full(count, known.mean())
    return _answers((mean, np.rint(mean).astype(np.int64)) for _ in PARTS)


def _vectors(
    worded: Worded, base: TextEncoder, kept: Kept, progress: Progress | None
) -> dict[str, NDArray[np.float32]]:
    """Vectors of all reviews, and of the parts of those that are tested, (n, hidden) each."""
    test = np.flatnonzero(worded.whole.span == TEST)

    def make(part: str) -> Arrays:
        words = worded.part(part) if part == "text" else taken(worded.part(part), test)
        bar = tracker(progress, "encoding texts for the peers")
        return {"vectors": text.encode(base, words, bar)}

    return {
        part: kept.get(f"vectors {part}", lambda part=part: make(part))["vectors"] for part in PARTS
    }


def _finetuned(worded: Worded, base: TextEncoder, seed: int, kept: Kept) -> Arrays:
    """What a plain fine-tune says of the test texts."""
    from trainer.peers import texts  # an extra

    whole, spans = worded.whole, worded.whole.span
    known, test = np.flatnonzero(spans != TEST), np.flatnonzero(spans == TEST)
    scratch = kept.folder / "plain"

    def make() -> Arrays:
        told = texts.finetune_plain(
            base.folder,
            taken(whole.texts, known),
            whole.rating[known],
            [taken(worded.part(part), test) for part in PARTS],
            base.longest_tokens,
            seed,
            scratch,
        )
        return _answers(told)

    answers = kept.get(f"text peer {texts.PLAIN}", make)
    shutil.rmtree(scratch, ignore_errors=True)  # hundreds of megabytes, of no more use
    return answers


def _answers(told: Iterable[tuple[Floats, NDArray[np.int64]]]) -> Arrays:
    """What is told of each part, in the order of PARTS: expected ratings, and whole stars."""
    answers: Arrays = {}
    for part, (expected, stars) in zip(PARTS, told, strict=True):
        answers[part], answers[f"{part} stars"] = expected, stars
    return answers


def blocks(worded: Worded | None, texts: Mapping[str, Arrays]) -> dict[str, dict[str, Any]]:
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
            if words.any()  # many shops have no titles
        }
    return found


def _part_scores(
    rating: Floats, answers: Arrays, part: str, words: NDArray[np.bool_]
) -> TextScores:
    return class_scores(rating, answers[part][words], answers[f"{part} stars"][words])
