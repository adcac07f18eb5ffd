"""What an evaluation found: the figures of every model, and tables of them for the console."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from model.ids import Hashes
from trainer import evaluate_texts
from trainer.clean import Step
from trainer.config import TrainerConfig
from trainer.data import Examples
from trainer.gate import difference
from trainer.metrics import (
    HISTORY_BUCKETS,
    Calibration,
    Floats,
    by_history,
    by_rating,
    scores,
    shown,
    shown_difference,
)
from trainer.report import reliability

MODEL = "model"  # ours, among the names of all


@dataclass(frozen=True)
class Evaluated:
    """What was measured; `document` is what the command writes."""

    document: dict[str, Any]
    steps: tuple[Step, ...]  # of cleaning

    @property
    def plot(self) -> str:
        """Whether what the model claims happens as often, as SVG."""
        return reliability(Calibration(**self.document["calibration"]))


def errors(
    examples: Examples, models: Mapping[str, Floats], config: TrainerConfig
) -> dict[str, Any]:
    """The errors of every model's ratings (n) of the examples (n), and ours beside each."""
    rating = examples.rating
    masks = {
        "buckets": by_history(examples.history),
        "item_buckets": by_history(examples.item_history),
        "ratings": by_rating(rating),
    }
    users = examples.events["user"]
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
            bucket: _gap(rating[mask], models[MODEL][mask], clipped[mask], users[mask], config)
            for bucket, mask in {"all": np.ones(len(rating), bool), **masks["buckets"]}.items()
            if mask.any()
        }
    return found


def _gap(
    rating: Floats, model: Floats, other: Floats, users: Hashes, config: TrainerConfig
) -> dict[str, Any]:
    """A `Difference` by rows, and its interval by users."""
    by_rows, by_users = (
        difference(rating, model, other, config.gate, config.seed, drawn) for drawn in (None, users)
    )
    return {**asdict(by_rows), "by_users": {"low": by_users.low, "high": by_users.high}}


def gained(block: Mapping[str, Any]) -> dict[str, Any] | None:
    """Ours beside the best peer: 1 − RMSE / RMSE; None without peers, or where it has no error."""
    others = {name: figures["rmse"] for name, figures in block.items() if name != MODEL}
    best = min(others, key=lambda name: others[name], default=None)
    if best is None or not others[best]:
        return None
    return {"best_peer": best, "gain": 1 - block[MODEL]["rmse"] / others[best]}


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
            "by users",
            title_justify="left",
        )
        for name, figures in sorted(block.items(), key=lambda each: each[1]["rmse"]):
            numbers = [figures["rmse"], figures["mae"]]
            numbers += [figures["buckets"][bucket]["rmse"] for bucket in buckets]
            gap = figures.get("model_minus_this", {}).get("all", {})
            told = [shown_difference(each) for each in (gap, gap.get("by_users"))]
            table.add_row(name, *shown(*numbers), *told, style="bold" if name == MODEL else None)
        parts.append(table)
    if document["gain"]:
        gain = document["gain"]
        parts.append(f"prequential: {gain['gain']:+.2%} beside the best peer, {gain['best_peer']}")
    parts += [_text_table(part, document[part]) for part in evaluate_texts.PARTS if document[part]]
    ece, coverage = document["calibration"]["ece"], document["calibration"]["coverage"]
    parts.append(f"calibration error {ece:.3f}, 80% intervals hold {coverage:.1%}")
    return Group(*parts)


def _text_table(part: str, block: Mapping[str, Any]) -> Table:
    metrics = ("rmse", "mae", "accuracy", "off_by_one", "macro_f1")
    titles = ("RMSE", "MAE", "accuracy", "off by one at most", "macro-F1")
    table = Table(part.replace("_", ": "), "rows", *titles)
    for name, figures in sorted(block.items(), key=lambda each: each[1]["rmse"]):
        style = "bold" if name == MODEL else None
        numbers = shown(*(figures[metric] for metric in metrics))
        table.add_row(name, str(figures["rows"]), *numbers, style=style)
    return table
