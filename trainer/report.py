"""The report of one training: one HTML file with tables and plots that needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import altair
import jinja2
import numpy as np
import polars as pl
import vl_convert
from numpy.typing import NDArray

from trainer.assess import Compared
from trainer.clean import Step
from trainer.gate import Verdict
from trainer.metrics import (
    HISTORY_BUCKETS,
    Calibration,
    Evaluation,
    Floats,
    TextScores,
    rmse,
    shown,
)

_WIDTH = 640
_HEIGHT = 260
_TIME_BINS = 24
_MODEL_COLOUR = "#2563a8"


@dataclass(frozen=True)
class Table:
    """One table of the report; the first cell of a row names it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """One plot of the report, as SVG."""

    title: str
    svg: str
    note: str


def render(
    version: str,
    facts: Mapping[str, str],
    steps: Sequence[Step],
    compared: Compared,
    time: NDArray[np.int64],
    text: TextScores | None,
    verdict: Verdict,
) -> str:
    """The whole page.

    Args:
        version: of the bundle.
        facts: what was learnt from and how, in words.
        steps: what cleaning did.
        compared: every model on the newest rows.
        time: (n) of those rows, in milliseconds since the epoch.
        text: of question (b), or None when no star head was fitted.
        verdict: of the gate.
    """
    evaluations, calibration = compared.evaluations, compared.calibration
    predictions = {"model": compared.ours.rating, **compared.rivals}
    tables = [
        _errors(evaluations),
        _history(evaluations),
        Table(
            "Question (b): stars that a review's text means",
            ("", "rows", "RMSE", "MAE", "accuracy"),
            [("star head", f"{text.rows:,}", *shown(text.rmse, text.mae, text.accuracy))]
            if text
            else [("no star head was fitted", "", "", "", "")],
            "Read off the text after it was written. Never compare it with question (a).",
        ),
        Table("Data and settings", ("", ""), list(facts.items())),
        Table(
            "Cleaning",
            ("rule", "rows", "effect", "for example"),
            [
                (
                    step.rule,
                    f"{step.rows:,}",
                    "dropped" if step.dropped else "mended",
                    ", ".join(step.examples),
                )
                for step in steps
            ],
            "Dropped rows are not learnt from; states see every event, as they do in service.",
        ),
    ]
    figures = [
        Figure(
            "Error by model",
            _bars(evaluations),
            "RMSE on the newest rows, the same for every model; lower is better.",
        ),
        Figure(
            "Error by the user's history",
            _history_lines(evaluations),
            "RMSE by the number of ratings that the user had given before.",
        ),
        Figure(
            "Reliability",
            reliability(calibration),
            f"Claimed and observed probability of at least k stars. Expected calibration error "
            f"{calibration.ece:.3f}; 80% intervals hold {calibration.coverage:.1%}.",
        ),
        Figure(
            "Ratings, true and predicted",
            _histogram(compared),
            "Predicted ratings are means, so they spread less than true ones.",
        ),
        Figure(
            "Error over time",
            _over_time(time, compared.rating, predictions),
            "RMSE in spans of equally many rows.",
        ),
    ]
    template = resources.files("trainer").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    written = datetime.now(UTC).isoformat(timespec="seconds")
    return environment.from_string(template).render(
        title=f"Starcast model {version}",
        subtitle=f"Written {written}. Question (a): what a user will rate an item, before the "
        "review exists.",
        verdict=verdict,
        tables=tables,
        figures=figures,
    )


def _errors(evaluations: Mapping[str, Evaluation]) -> Table:
    return Table(
        "Question (a): error on the newest rows",
        ("model", "rows", "RMSE", "MSE", "MAE"),
        [
            (name, f"{e.all.rows:,}", *shown(e.all.rmse, e.all.mse, e.all.mae))
            for name, e in evaluations.items()
        ],
        "All on the same rows, each predicted before its own stars were seen.",
    )


def _history(evaluations: Mapping[str, Evaluation]) -> Table:
    names = [name for name, _, _ in HISTORY_BUCKETS]
    first = next(iter(evaluations.values()))
    return Table(
        "RMSE by the user's history",
        ("ratings before", *names),
        [
            ("rows", *(f"{first.buckets[name].rows:,}" for name in names)),
            *(
                (model, *shown(*(e.buckets[name].rmse for name in names)))
                for model, e in evaluations.items()
            ),
        ],
    )


def _svg(chart: Any) -> str:
    specification = chart.properties(width=_WIDTH, height=_HEIGHT).to_json()
    return vl_convert.vegalite_to_svg(specification, allowed_base_urls=[])


def _bars(evaluations: Mapping[str, Evaluation]) -> str:
    rows = pl.DataFrame(
        {
            "model": list(evaluations),
            "RMSE": [e.all.rmse for e in evaluations.values()],
        }
    )
    base = altair.Chart(rows).encode(
        y=altair.Y("model:N", sort="x", title=None),
        x=altair.X("RMSE:Q", scale=altair.Scale(zero=True)),
    )
    bars = base.mark_bar().encode(
        color=altair.condition(
            altair.datum.model == "model", altair.value(_MODEL_COLOUR), altair.value("#b4bfcc")
        )
    )
    return _svg(
        bars + base.mark_text(align="left", dx=4).encode(text=altair.Text("RMSE:Q", format=".4f"))
    )


def _history_lines(evaluations: Mapping[str, Evaluation]) -> str:
    names = [name for name, _, _ in HISTORY_BUCKETS]
    rows = pl.DataFrame(
        [
            {"model": model, "ratings before": name, "RMSE": e.buckets[name].rmse}
            for model, e in evaluations.items()
            for name in names
            if e.buckets[name].rows
        ]
    )
    chart = (
        altair.Chart(rows)
        .mark_line(point=True)
        .encode(
            x=altair.X("ratings before:O", sort=names),
            y=altair.Y("RMSE:Q", scale=altair.Scale(zero=False)),
            color="model:N",
        )
    )
    return _svg(chart)


def reliability(calibration: Calibration) -> str:
    """Claimed beside observed probabilities of at least k stars, as SVG."""
    rows = pl.DataFrame(calibration.bins, schema=["claimed", "observed", "rows"], orient="row")
    square = altair.Scale(domain=[0, 1])
    points = (
        altair.Chart(rows)
        .mark_circle(color=_MODEL_COLOUR)
        .encode(
            x=altair.X("claimed:Q", scale=square),
            y=altair.Y("observed:Q", scale=square),
            size=altair.Size("rows:Q", legend=None),
        )
    )
    ideal = (
        altair.Chart(pl.DataFrame({"claimed": [0.0, 1.0], "observed": [0.0, 1.0]}))
        .mark_line(color="#8a97a6", strokeDash=[4, 4])
        .encode(x="claimed:Q", y="observed:Q")
    )
    return _svg(ideal + points)


def _histogram(compared: Compared) -> str:
    edges = np.linspace(1, 5, 17)
    frames = [
        pl.DataFrame(
            {
                "stars": (edges[:-1] + edges[1:]) / 2,
                "share": np.histogram(values, edges)[0] / max(len(values), 1),
                "of": name,
            }
        )
        for name, values in (
            ("true", compared.rating),
            ("predicted", compared.ours.rating),
        )
    ]
    chart = (
        altair.Chart(pl.concat(frames))
        .mark_bar(opacity=0.6, size=26)
        .encode(
            x=altair.X("stars:Q", scale=altair.Scale(domain=[1, 5])),
            y=altair.Y("share:Q", stack=None, axis=altair.Axis(format="%")),
            color="of:N",
        )
    )
    return _svg(chart)


def _over_time(time: NDArray[np.int64], rating: Floats, predictions: Mapping[str, Floats]) -> str:
    order = np.argsort(time, kind="stable")
    spans = np.array_split(order, min(_TIME_BINS, max(len(order) // 20, 1)))
    rows = pl.DataFrame(
        [
            {
                "time": int(time[span[-1]]),
                "RMSE": rmse(rating[span], values[span]),
                "model": name,
            }
            for name, values in predictions.items()
            for span in spans
        ]
    ).with_columns(pl.col("time").cast(pl.Datetime("ms", "UTC")))
    chart = (
        altair.Chart(rows)
        .mark_line(point=True)
        .encode(
            x=altair.X("time:T", title="event time"),
            y=altair.Y("RMSE:Q", scale=altair.Scale(zero=False)),
            color="model:N",
        )
    )
    return _svg(chart)
