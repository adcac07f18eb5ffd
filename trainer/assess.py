"""How good a model is on the newest rows of a log, beside the baselines on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from model import encoder as encoders
from model.bundle import Bundle
from model.encoder import TextEncoder
from trainer.clean import Step
from trainer.config import TrainerConfig
from trainer.metrics import (
    HISTORY_BUCKETS,
    Calibration,
    Evaluation,
    Floats,
    TextScores,
    calibration,
    evaluate,
    shown,
)
from trainer.models import Predicted, baselines
from trainer.prepare import Prepared


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
    test = data.examples.take(data.split.test)
    rivals = baselines(data.examples, data.split, test, config)
    return Compared(
        test.rating,
        ours,
        rivals,
        evaluate(test.rating, test.history, {"model": ours.rating, **rivals}),
        calibration(test.rating, ours.distribution, ours.low, ours.high),
    )


def bundle_encoder(bundle: Bundle | None, config: TrainerConfig) -> TextEncoder | None:
    """The encoder of a bundle with its star head; None when it has none."""
    if bundle is None or bundle.encoder_folder is None:
        return None
    return encoders.load(bundle.encoder_folder, config.device, bundle.star_head)


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
        errors.add_row(name, *shown(*numbers), style="bold" if name == "model" else None)
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
