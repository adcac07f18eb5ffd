"""What a reader should know of a bundle, in Markdown (Mitchell et al. 2019, "Model cards")."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ModelCard(BaseModel):
    """The facts that a model card states."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(description="where the rows came from")
    data_from: datetime | None = Field(default=None, description="time of the first event")
    data_to: datetime | None = Field(default=None, description="time of the last event")
    rows: dict[str, int] = Field(default_factory=dict, description="how many rows of what")
    settings: dict[str, Any] = Field(default_factory=dict, description="what it was fitted with")
    metrics: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="by model, then by measure, on the test rows"
    )
    calibration: dict[str, float] = Field(
        default_factory=dict, description="how true its distributions and intervals are"
    )
    peers: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="as metrics: of an evaluation beside other models"
    )
    ablations: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="by part: the error without it"
    )
    limits: list[str] = Field(default_factory=list, description="what it must not be used for")
    notes: str = ""


def markdown(card: ModelCard, version: str, encoder: str | None) -> str:
    """The card of a bundle of this version, whose encoder has this hash."""
    window = [time.isoformat(timespec="seconds") for time in (card.data_from, card.data_to) if time]
    facts = {
        "Predicts": "the stars, 1 to 5, that a user will give an item, as a distribution",
        "Data": card.data,
        "Window": " to ".join(window) or "not known",
        **{f"Rows: {name}": f"{count:,}" for name, count in card.rows.items()},
        "Text encoder": encoder or "none",
        **{f"Setting: {name}": value for name, value in card.settings.items()},
    }
    facts |= {name: f"{value:.4f}" for name, value in card.calibration.items()}
    parts = [f"# Model card of {version}", _table(["fact", "value"], map(list, facts.items()))]
    for title, first, rows in (
        ("Results", "model", card.metrics),
        ("Beside its peers", "model", card.peers),
        ("Without each part", "without", card.ablations),
    ):
        if rows:
            parts += [f"## {title}", _measures(first, rows)]
    if card.limits:
        parts += ["## Limits", "\n".join(f"- {limit}" for limit in card.limits)]
    if card.notes:
        parts += ["## Notes", card.notes]
    return "\n\n".join(parts) + "\n"


def _measures(first: str, rows: dict[str, dict[str, float]]) -> str:
    """Rows of measures by name; not every row has all."""
    measures = list(dict.fromkeys(name for values in rows.values() for name in values))
    cells = [
        [row, *(f"{values[name]:.4f}" if name in values else "" for name in measures)]
        for row, values in rows.items()
    ]
    return _table([first, *measures], cells)


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
