"""The page `docs/quality.md`, of what `bench.quality` has measured."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from trainer.metrics import shown_difference

Part = Mapping[str, Any]  # `figures` and, of later ones, the day that they are of

TEXT_SET = "Musical Instruments"  # whose texts the text models are compared on
AS_IT_IS = "as it is"  # the text model that others are held against
HEADER = """\
# How good predictions are

Made by `make quality` from `bench/results/quality.json`. Question (a) is what a user
will rate an item before the review exists; question (b) is how many stars a review's
text means.
Newest 10% of the rated rows; peers tuned with 20 trials on the 10% before. Intervals
of 95% are by drawing rows and, where it says so, by drawing users: ratings of one user
go together, so that rows alone seem to tell more than they do.
"""
TEXTS = {"text": "whole review", "text_title": "title alone", "text_body": "text alone"}


def page(parts: Mapping[str, Any]) -> str:
    """The page, of those parts that are there."""
    sections = [HEADER, *_sets(parts.get("sets", {}))]
    if others := parts.get("others"):
        sections += _others(others)
    if methods := parts.get("methods"):
        sections += [f"## Fine-tuning MiniLM on {TEXT_SET}\n", _methods(methods)]
    for name, each in parts.get("ablations", {}).items():
        sections += [f"## What each part of the network is worth on {name}\n", _ablations(each)]
    if variants := parts.get("worded"):
        sections += [
            f"## Variants of the text model, on validation texts of {TEXT_SET}\n",
            _variants(variants),
        ]
    if replay := parts.get("replay"):
        found = replay["figures"]
        sections += [
            "## A long replay\n",
            f"{found['events']:,} events of {found['users']:,} users and {found['items']:,} items: "
            f"{found['events_per_second']:,} events/s, {found['peak_mb']:,} MB at most.\n",
        ]
    return "\n".join(sections)


def gains(sets: Mapping[str, Part]) -> dict[str, Any]:
    """Ours beside the best peer of each set, and the mean."""
    found = {name: each["figures"]["gain"] for name, each in sets.items()}
    told = [each["gain"] for each in found.values() if each]
    return {"by_set": found, "mean": float(np.mean(told)) if told else None}


def _sets(sets: Mapping[str, Part]) -> Iterator[str]:
    for name, each in sets.items():
        figures = each["figures"]
        day = f", measured {each['date']}" if "date" in each else ""
        yield f"## {name}\n"
        yield f"{figures['rows']['test']:,} test rows{day}.\n"
        for way, block in figures["rating"].items():
            yield _ratings(way, block)
        for part, title in TEXTS.items():
            if figures[part]:
                yield _texts(title, figures[part])
    if sets and (mean := gains(sets)["mean"]) is not None:
        yield f"Mean gain over the best peer of each set, prequential: {mean:+.2%}.\n"


def _others(parts: Mapping[str, Part]) -> Iterator[str]:
    """Question (a) on other public sets."""
    yield "## Other public sets, question (a) alone\n"
    rows: list[str] = []
    for name, each in parts.items():
        figures = each["figures"]
        block, beside = figures["rating"]["prequential"], "|||"
        if gain := figures["gain"]:
            best = block[gain["best_peer"]]
            beside = f"{gain['best_peer']} {best['rmse']:.4f}|{gain['gain']:+.2%}|{_gaps(best)}"
        tested = f"{figures['rows']['test']:,}|{block['model']['rmse']:.4f}"
        rows.append(f"{name}|{tested}|{beside}")
    yield _table("prequential|test rows|model|best peer|gain|model − this (95%)|by users", rows)
    mean = gains(parts)["mean"]
    yield (
        ("" if mean is None else f"Mean gain over the best peer: {mean:+.2%}. ")
        + "Newcomers' level was\nbuilt on All Beauty's storm, and looked at on the others "
        "(decision 21).\n"
    )


def _ratings(way: str, block: Mapping[str, Any]) -> str:
    rows: list[str] = []
    for name, each in _by_error(block):
        rows.append(f"{name}|{each['rmse']:.4f}|{each['mae']:.4f}|{_gaps(each)}")
    return _table(f"{way}|RMSE|MAE|model − this, squared error (95%)|by users", rows)


def _texts(title: str, block: Mapping[str, Any]) -> str:
    rows = [
        f"{reader}|{each['rows']:,}|{each['rmse']:.4f}|{each['mae']:.4f}|"
        f"{each['accuracy']:.1%}|{each['off_by_one']:.1%}|{each['macro_f1']:.3f}"
        for reader, each in _by_error(block)
    ]
    return _table(f"{title}|rows|RMSE|MAE|accuracy|off by one at most|macro-F1", rows)


def _methods(methods: Mapping[str, Part]) -> str:
    rows = [
        f"{name}|{found['trained']:,}|{found['device']}|{found['minutes']}|"
        f"{found['processor_minutes']}|{found['peak_mb']:,}|{found['peak_device_mb'] or ''}|"
        f"{found['rmse']:.4f}|{found['accuracy']:.1%}"
        for name, found in _figures(methods)
    ]
    return _table(
        "method|trained weights|on|minutes|of a core|peak MB|of the GPU|RMSE|accuracy", rows
    )


def _ablations(part: Part) -> str:
    rows = [
        f"{name}|{found['rmse']:.4f}|{shown_difference(found['cost'])}"
        for name, found in part["figures"].items()
    ]
    return _table("without, or + with|RMSE|squared error more, 95% interval", rows)


def _variants(variants: Mapping[str, Part]) -> str:
    rows: list[str] = []
    for name, found in _figures(variants):
        than = f" than {found['beside']}" if found["gap"] and found["beside"] != AS_IT_IS else ""
        rows.append(f"{name}|{found['rmse']:.4f}|{shown_difference(found['gap'])}{than}")
    return _table("fine-tuned|RMSE|squared error more, 95% interval", rows)


def _figures(parts: Mapping[str, Part]) -> Iterator[tuple[str, Any]]:
    return ((name, each["figures"]) for name, each in parts.items())


def _by_error(block: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(block.items(), key=lambda found: found[1]["rmse"])


def _gaps(peer: Mapping[str, Any]) -> str:
    """Ours less a peer, with intervals by rows and by users, in two cells."""
    gap = peer.get("model_minus_this", {}).get("all", {})
    return "|".join(shown_difference(each) for each in (gap, gap.get("by_users")))


def _table(headings: str, rows: Iterable[str]) -> str:
    """Markdown, of cells that stand apart by |."""
    first, *rest = (f"| {row.replace('|', ' | ')} |" for row in (headings, *rows))
    return "\n".join([first, "|---" * len(headings.split("|")) + "|", *rest]) + "\n"
