"""How good a model is on the newest rows of a log, beside the baselines on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from rich.console import Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from model import encoder as encoders
from model.bundle import Bundle
from model.calibration import Calibration as BundleCalibration
from model.encoder import TextEncoder
from trainer import text
from trainer.clean import Step
from trainer.config import TrainerConfig
from trainer.data import Log
from trainer.fine_tune import taken
from trainer.metrics import (
    HISTORY_BUCKETS,
    Calibration,
    Evaluation,
    Floats,
    TextScores,
    calibration,
    evaluate,
    text_scores,
)
from trainer.models import Predicted, baselines, predict
from trainer.prepare import Prepared, cleaned, item_vectors, prepared, review_texts
from trainer.progress import tracker


@dataclass(frozen=True)
class Assessment:
    """A model on the test rows of a log."""

    evaluations: dict[str, Evaluation]  # question (a): "model" and the baselines
    calibration: Calibration  # of the model
    text: TextScores | None  # question (b)
    steps: tuple[Step, ...]  # of cleaning
    rows: dict[str, int]


@dataclass(frozen=True)
class Compared:
    """The test rows with what every model says of them."""

    rating: Floats  # (n)
    ours: Predicted
    rivals: dict[str, Floats]
    evaluations: dict[str, Evaluation]
    calibration: Calibration


def compare(data: Prepared, ours: Predicted, config: TrainerConfig) -> Compared:
    """Predictions of the test rows beside the baselines', which are fitted here."""
    test = data.split.test
    rating = data.examples.rating[test]
    rivals = baselines(data.examples, data.split, test, config)
    return Compared(
        rating,
        ours,
        rivals,
        evaluate(rating, data.examples.history[test], {"model": ours.rating, **rivals}),
        calibration(rating, ours.distribution, ours.low, ours.high),
    )


def assess(
    log: Log,
    bundle: Bundle | None,
    config: TrainerConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Assessment:
    """Score a bundle, or the cold-start ladder when it is None, on a log's newest rows.

    The bundle may have been fitted on these very rows; its metrics say up to when it was
    (`window`). Raises TrainerError when there are too few rated rows.
    """
    config = config or TrainerConfig()
    if config.threads:
        torch.set_num_threads(config.threads)
    found = cleaned(log, config)
    encoder = bundle_encoder(bundle, config)
    vectors = item_vectors(log, encoder, tracker(progress, "encoding item texts"))
    data = prepared(
        log,
        found.reviews,
        vectors,
        encoder.hash if encoder else "",
        config,
        tracker(progress, "replaying events"),
    )
    ours = predict(
        bundle.network if bundle else None,
        bundle.calibration if bundle else BundleCalibration(),
        data.examples,
        data.split.test,
    )
    compared = compare(data, ours, config)
    return Assessment(
        compared.evaluations,
        compared.calibration,
        _read_texts(found.reviews, encoder, config, progress),
        found.steps,
        {"events": len(log), "rated": log.rated, "test": len(data.split.test)},
    )


def bundle_encoder(bundle: Bundle | None, config: TrainerConfig) -> TextEncoder | None:
    """The encoder of a bundle with its star head; None when it has none."""
    if bundle is None or bundle.encoder_folder is None:
        return None
    return encoders.load(bundle.encoder_folder, config.device, bundle.star_head)


def _read_texts(
    reviews: pl.DataFrame,
    encoder: TextEncoder | None,
    config: TrainerConfig,
    progress: Progress | None,
) -> TextScores | None:
    """Question (b) on the newest texts."""
    texts = review_texts(reviews, config.text, config.split)
    if encoder is None or encoder.star_head is None or texts is None:
        return None
    test = texts.span == text.TEST
    chosen = taken(texts.texts, np.flatnonzero(test))
    bar = tracker(progress, "reading review texts")
    shares = text.stars(encoder.star_head, text.encode(encoder, chosen, bar))
    return text_scores(texts.rating[test], shares)


def summary(result: Assessment) -> RenderableType:
    """Tables for the console: what cleaning did, and the error of each model."""
    parts: list[RenderableType] = []
    worked = [step for step in result.steps if step.rows]
    if worked:
        cleaning = Table("cleaning", "rows", "effect", "for example", title_justify="left")
        for step in worked:
            effect = "dropped" if step.dropped else "mended"
            cleaning.add_row(step.rule, f"{step.rows:,}", effect, _named(step.examples))
        parts.append(cleaning)
    buckets = [name for name, _, _ in HISTORY_BUCKETS]
    rows = result.evaluations["model"].all.rows
    errors = Table(
        f"newest {rows:,} rated rows", "RMSE", "MSE", "MAE", *(f"RMSE {b}" for b in buckets)
    )
    for name, found in result.evaluations.items():
        numbers = [found.all.rmse, found.all.mse, found.all.mae]
        numbers += [found.buckets[bucket].rmse for bucket in buckets]
        cells = ["–" if np.isnan(number) else f"{number:.4f}" for number in numbers]
        errors.add_row(name, *cells, style="bold" if name == "model" else None)
    parts.append(errors)
    parts.append(
        f"calibration error {result.calibration.ece:.3f}, 80% intervals hold "
        f"{result.calibration.coverage:.1%}"
    )
    if result.text:
        parts.append(
            f"another question, stars read off {result.text.rows:,} review texts: RMSE "
            f"{result.text.rmse:.4f}, accuracy {result.text.accuracy:.1%}"
        )
    return Group(*parts)


def _named(ids: Sequence[str]) -> Text:
    """Ids from outside, for a terminal: as they are, but for what steers it or the console."""
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in ", ".join(ids)))
