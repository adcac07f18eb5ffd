"""The text encoder on texts of mixed length, beside sentence-transformers and plain transformers.

Texts are as shops have them: titles, reviews of 170 to 400 characters, and long ones up to where
the encoder cuts. Every way has the packaged MiniLM's weights (a student: two of its layers,
taught) and turns the same texts into unit vectors on the host, tokenization included: ours as the
`texts` worker calls it, in fp32, in int8 (`trainer.compress`), as a student; on a GPU in bf16 too.
Ways take turns, round by round, and a ratio is the median over rounds of two rates of one round.
With one thread on a CPU, a second is one of processor time (`bench.clock`), but for callers.

The limit is the machine's own rate of matrix products, measured in each round by torch.mm with the
encoder's shapes (in fp32 of 1,024 and of 8,192 rows, of which the faster counts), in int8 by the
encoder's own product of one batch. What an encoder needs is
counted on real tokens, none of padding. For a text of n tokens, with hidden width h, inner width f
and L layers, in multiplications and additions:

    linear layers  L · n · 2 · (4 h² + 2 h f)
    attention      L · 4 · n² · h

which is 21.2 million a token and 9,216 for each pair of tokens with MiniLM. Embeddings, norms,
softmax, GELU and tokenization count as nothing, so they lower `share_of_matrix_rate`.

Beside: tokens a second by length; by token budget, and by callers at once that each wait for one
text's vector through `model.engine` (these two in bf16 on a GPU); how far vectors are from those
in fp32; the error of a star head on them (question b); on a GPU, how fast texts go that are cut
into tokens already; and pairs of user and item a second of the rating network when all that
it reads is there. Prints tables and writes
`results/text.json`, on a GPU `results/text-gpu.json`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import clock, report, ways
from bench.clock import by_processor, seconds
from bench.command import exit_code
from bench.events import World, make_world
from bench.model import packaged_encoder
from bench.pairs import pair_rates
from bench.ways import (
    BF16,
    COMPILED,
    FP32,
    INT8,
    INT8_STATIC,
    SENTENCES,
    STUDENT,
    TRANSFORMERS,
    Shape,
    Vectors,
    Way,
    matrix_rate,
    shape,
)
from model import encoder as encoders
from model import packed, recorded
from model.encoder import TextEncoder, review_text
from model.engine import Engine
from schemas.records import Review
from starcast.log import LogConfig, configure
from starcast.shop import shop
from streams.config import TextsConfig
from trainer.metrics import text_scores
from trainer.text import (
    TEST,
    TRAIN,
    VALIDATION,
    ReviewTexts,
    fit_star_head,
    soft_labels,
)

TITLES, REVIEWS = 0.3, 0.5  # shares of texts; the rest are long
LONGEST_CHARACTERS = 1_500  # of a long text: a few tokens more than the encoder takes
LENGTHS = (16, 32, 64, 128, 256)  # tokens, upper ends of buckets
MATRIX_SECONDS = 0.5  # of each measurement of the machine's own rate
ANSWER_SECONDS = 60.0  # an engine that answers nothing any more ends the benchmark
SATURATING_TOKENS = 8_192  # rows of the machine's own products
CALLED_TEXTS = 1_000  # asked for one at a time, at most
REPLAYS = 50  # of one full batch on a GPU
HELD_TO = {  # the machine's rate, of these ways: the best of products of so many rows
    FP32: (torch.float32, (SATURATING_TOKENS, encoders.CPU_TOKENS)),  # a CPU's caches hold these
    BF16: (torch.bfloat16, (SATURATING_TOKENS,)),
    INT8: (torch.int8, (encoders.CPU_TOKENS,)),
}
USERS, ITEMS = 100, 1_000  # of the shop whose texts these are
L2 = 1e-4  # of all star heads, so that encoders alone differ
PACKAGES = ("numpy", "sentence-transformers", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Settings:
    """How much is measured, and how."""

    texts: int
    rounds: int
    reviews: int
    pairs: int
    budgets: Sequence[int]
    callers: Sequence[int]
    device: str
    threads: int
    compiled: bool
    seed: int


@dataclass(frozen=True)
class Round:
    """Seconds of each way on all texts, and what part of the machine's rate some reached."""

    seconds: Mapping[str, float]
    shares: Mapping[str, float]
    matrix: Mapping[str, float]  # operations a second, around those ways


def make_texts(world: World, count: int, seed: int) -> list[str]:
    """Titles, reviews and long texts in random order."""
    random = np.random.default_rng(seed)
    texts: list[str] = []
    for kind in random.random(count).tolist():
        title, words = world.texts[int(random.integers(len(world.texts)))]
        if kind < TITLES:
            texts.append(title)
            continue
        text = review_text(title, words)
        longest = int(random.integers(len(text), LONGEST_CHARACTERS))
        while kind >= TITLES + REVIEWS and len(text) < longest:
            text += " " + world.texts[int(random.integers(len(world.texts)))][1]
        texts.append(text)
    return texts


def make_reviews(count: int, seed: int) -> ReviewTexts:
    """Rated reviews of the generated shop: 70% to train, 10% to validate, the newest to test."""
    records = (record for _, record in shop(seed, 300, 240, 5 * count))
    rated = [each for each in records if isinstance(each, Review) and each.rating and each.text]
    rated = rated[-count:]
    share = np.arange(len(rated)) / len(rated)
    return ReviewTexts(
        [review_text(each.title, each.text) for each in rated],
        np.array([each.rating for each in rated], np.float64),
        np.select([share < 0.7, share < 0.8], [TRAIN, VALIDATION], TEST).astype(np.int8),
    )


def buckets(tokens: Sequence[int]) -> dict[str, list[int]]:
    """Rows by number of tokens: those above one end of LENGTHS and up to the next."""
    found: dict[str, list[int]] = {}
    for below, end in zip((0, *LENGTHS), LENGTHS, strict=False):
        if rows := [row for row, count in enumerate(tokens) if below < count <= end]:
            found[f"{below + 1} to {end}"] = rows
    return found


def seconds_of(way: Way, texts: Sequence[str], device: torch.device) -> float:
    """How long a way takes; its vectors are on the host then."""
    return seconds(lambda: way.encode(texts), device)


def by_callers(encoder: TextEncoder, texts: Sequence[str], budget: int, callers: int) -> Any:
    """Texts a second and milliseconds that a caller waits, each for one text at a time."""
    waits: list[float] = []
    with Engine[str, Vectors](lambda some: list(encoder.encode(some, budget)), budget) as engine:

        def ask(text: str) -> None:
            asked = time.perf_counter()
            (cost,) = encoder.count_tokens([text])
            engine.submit(text, cost).result(ANSWER_SECONDS)
            waits.append(time.perf_counter() - asked)

        with ThreadPoolExecutor(callers) as pool:
            began = time.perf_counter()
            list(pool.map(ask, texts))
            spent = time.perf_counter() - began
    return {
        "texts_per_second": round(len(texts) / spent, 1),
        "wait_ms_p50": round(1e3 * median(waits), 1),
        "wait_ms_p99": round(1e3 * float(np.quantile(waits, 0.99)), 1),
    }


def make_ways(
    settings: Settings, parent: TextEncoder, texts: Sequence[str], reviews: ReviewTexts, to: Path
) -> list[Way]:
    """All that is measured on the encoder's device, ready; new encoders are written below `to`."""
    budget = TextsConfig().token_budget

    def smaller(name: str) -> TextEncoder:
        return ways.smaller(name, parent, reviews, to, settings.seed)

    found = [
        ways.ours(FP32, parent, budget),
        ways.sentences(parent, torch.float32, texts),
        ways.plain(parent, torch.float32),
    ]
    student = smaller(STUDENT)
    found.append(ways.ours(STUDENT, student, budget))
    if parent.device.type == "cuda":
        half = torch.bfloat16
        found += [
            ways.ours(BF16, ways.in_bf16(parent), budget),
            replace(ways.sentences(parent, half, texts), name=f"{SENTENCES} {BF16}"),
            replace(ways.plain(parent, half), name=f"{TRANSFORMERS} {BF16}"),
            ways.ours(f"{STUDENT} {BF16}", ways.in_bf16(student), budget),
        ]
    else:
        found += [ways.ours(name, smaller(name), budget) for name in (INT8, INT8_STATIC)]
    if settings.compiled:
        found.append(ways.ours(COMPILED, ways.compiled(parent), budget))
    return found


def take_round(
    found: Sequence[Way], texts: Sequence[str], tokens: Sequence[int], device: torch.device
) -> Round:
    """Each way once, and the machine's own rate before and after those that are held to it."""
    spent: dict[str, float] = {}
    shares: dict[str, float] = {}
    matrix: dict[str, float] = {}
    for way in found:
        if way.name not in HELD_TO or way.encoder is None:
            spent[way.name] = seconds_of(way, texts, device)
            continue
        sizes = shape(way.encoder)
        before = best_rate(way.name, sizes, device)
        spent[way.name] = seconds_of(way, texts, device)
        matrix[way.name] = (before + best_rate(way.name, sizes, device)) / 2
        shares[way.name] = sizes.operations(tokens) / spent[way.name] / matrix[way.name]
    return Round(spent, shares, matrix)


def best_rate(way: str, sizes: Shape, device: torch.device) -> float:
    """The machine's own rate that a way is held to, operations a second."""
    dtype, several = HELD_TO[way]
    return max(matrix_rate(sizes, rows, device, dtype, MATRIX_SECONDS) for rows in several)


def ratio(rounds: Sequence[Round], way: str, other: str) -> float:
    """How many times as fast as another a way is, median over rounds."""
    return round(median(each.seconds[other] / each.seconds[way] for each in rounds), 3)


def summary(
    found: Sequence[Way], rounds: Sequence[Round], texts: Sequence[str], tokens: Sequence[int]
) -> dict[str, Any]:
    """Ratios by name, then what each way did with all texts."""
    pairs = {
        "ratio_to_sentence_transformers": (FP32, SENTENCES),
        "ratio_to_transformers": (FP32, TRANSFORMERS),
        "ratio_int8_to_sentence_transformers": (INT8, SENTENCES),
        "ratio_int8_static_to_sentence_transformers": (INT8_STATIC, SENTENCES),
        "ratio_int8_to_fp32": (INT8, FP32),
        "ratio_int8_static_to_fp32": (INT8_STATIC, FP32),
        "ratio_student_to_fp32": (STUDENT, FP32),
        "ratio_compiled_to_fp32": (COMPILED, FP32),
        "ratio_to_sentence_transformers_bf16": (BF16, f"{SENTENCES} {BF16}"),
        "ratio_to_transformers_bf16": (BF16, f"{TRANSFORMERS} {BF16}"),
        "ratio_bf16_to_fp32": (BF16, FP32),
    }
    names = {way.name for way in found}
    figures: dict[str, Any] = {
        name: ratio(rounds, *pair) for name, pair in pairs.items() if names.issuperset(pair)
    }
    for name in rounds[0].shares:
        suffix = "" if name == FP32 else f"_{name}"
        share = median(each.shares[name] for each in rounds)
        rate = median(each.matrix[name] for each in rounds)
        figures[f"share_of_matrix_rate{suffix}"] = round(share, 3)
        figures[f"matrix_gigaflops{suffix}"] = round(rate / 1e9, 1)
    exact = found[0].encode(texts)
    figures["ways"] = {}
    for way in found:
        vectors = way.encode(texts)
        spent = median(each.seconds[way.name] for each in rounds)
        figures["ways"][way.name] = {
            "texts_per_second": round(len(texts) / spent, 1),
            "tokens_per_second": round(sum(tokens) / spent),
            "seconds": [round(each.seconds[way.name], 3) for each in rounds],
            "largest_difference": float(np.abs(vectors - exact).max()),
            "lowest_cosine": float((vectors * exact).sum(1).min()),
            "settings": way.settings,
        }
    return figures


def saturated(
    encoder: TextEncoder, texts: Sequence[str], rounds: int, device: torch.device
) -> dict[str, Any]:
    """How fast a GPU encodes once tokens are cut, and batches that lie there already.

    Those by their size, and as part of the rate of matrix products of as many rows in bfloat16,
    measured after each: medians of so many rounds, and the lowest and highest share.
    """
    graphs = encoder.graphs
    assert graphs is not None  # of an encoder in bf16
    tokens = encoder.cut(texts)
    lengths = np.array([len(each) for each in tokens])
    graphs.warm(recorded.SIZES[-1])
    sizes = shape(encoder)
    found: dict[str, Any] = {"fused": graphs.fused, "resident": {}}
    for size in recorded.SIZES:
        rows = next(packed.batches(np.maximum(lengths, recorded.LEAST_TOKENS), size))
        replay = graphs.filled(tokens[rows])

        def replays(replay: Callable[[], Any] = replay) -> None:
            for _ in range(REPLAYS):
                replay()

        replays()
        spent: list[float] = []
        rates: list[float] = []
        for _ in range(rounds):
            spent.append(seconds(replays, device) / REPLAYS)
            rates.append(matrix_rate(sizes, size, device, torch.bfloat16, MATRIX_SECONDS))
        operations = sizes.operations(lengths[rows].tolist())
        shares = [operations / one / rate for one, rate in zip(spent, rates, strict=True)]
        found["resident"][str(size)] = {
            "tokens_per_second": round(lengths[rows].sum() / median(spent)),
            "share_of_matrix_rate": round(median(shares), 3),
            "lowest": round(min(shares), 3),
            "highest": round(max(shares), 3),
            "matrix_gigaflops": round(median(rates) / 1e9),
        }
    largest = found["resident"][str(recorded.SIZES[-1])]
    whole = seconds(lambda: graphs.encode(tokens, recorded.SIZES[-1]), device)
    return found | {
        "share_of_matrix_rate_saturated": largest["share_of_matrix_rate"],
        "cut_tokens_per_second": round(sum(map(len, tokens)) / whole),
    }


def by_length(
    found: Sequence[Way], texts: Sequence[str], tokens: Sequence[int], device: torch.device
) -> dict[str, dict[str, int]]:
    """Tokens a second of each way by length of texts."""
    rates: dict[str, dict[str, int]] = {}
    for name, rows in buckets(tokens).items():
        some, count = [texts[row] for row in rows], sum(tokens[row] for row in rows)
        rates[name] = {way.name: round(count / seconds_of(way, some, device)) for way in found}
    return rates


def star_errors(found: Sequence[Way], reviews: ReviewTexts) -> dict[str, float]:
    """RMSE of question (b) on the newest reviews, with a head for each encoder of ours."""
    known, newest = reviews.span != TEST, reviews.span == TEST
    labels = soft_labels(reviews.rating[known])
    errors: dict[str, float] = {}
    for way in found:
        if way.encoder is not None:
            vectors = way.encode(reviews.texts)
            head = fit_star_head(vectors[known], labels, L2)
            said = text_scores(reviews.rating[newest], head.stars(vectors[newest]))
            errors[way.name] = round(said.rmse, 4)
    return errors


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The figures side by side."""
    measured: Mapping[str, Mapping[str, Any]] = figures["ways"]
    whole = report.table(
        *("", "tokens/s", "texts/s", "to fp32", "largest difference", "lowest cosine", "RMSE (b)"),
        title="Texts of mixed length",
    )
    for name, each in measured.items():
        error = figures["star_rmse"].get(name)
        whole.add_row(
            name,
            f"{each['tokens_per_second']:,}",
            f"{each['texts_per_second']:,.1f}",
            f"{each['texts_per_second'] / measured[FP32]['texts_per_second']:.2f}",
            f"{each['largest_difference']:.1e}",
            f"{each['lowest_cosine']:.4f}",
            "" if error is None else f"{error:.4f}",
        )
    by_bucket: Mapping[str, Mapping[str, int]] = figures["tokens_per_second_by_length"]
    lengths = report.table("", *by_bucket, title="Tokens a second by tokens of a text")
    for name in measured:
        lengths.add_row(name, *(f"{rates[name]:,}" for rates in by_bucket.values()))
    precision = BF16 if BF16 in measured else FP32
    batches = report.table("tokens a batch", "tokens/s", title=f"By batch, in {precision}")
    for budget, rate in figures["tokens_per_second_by_budget"].items():
        batches.add_row(budget, f"{rate:,}")
    callers = report.table(
        *("callers", "texts/s", "wait p50 ms", "p99 ms"),
        title=f"By callers at once, in {precision}",
    )
    for count, each in figures["by_callers"].items():
        callers.add_row(count, *(f"{each[name]:,.1f}" for name in each))
    return [whole, lengths, batches, callers]


def measure(settings: Settings, console: Console) -> dict[str, Any]:
    """All figures."""
    parent = encoders.load(packaged_encoder(), settings.device)
    texts = make_texts(make_world(USERS, ITEMS, settings.seed), settings.texts, settings.seed)
    reviews = make_reviews(settings.reviews, settings.seed)
    tokens = parent.count_tokens(texts)
    console.print(f"{len(texts)} texts of {sum(tokens):,} tokens on {parent.device}")
    with tempfile.TemporaryDirectory(prefix="starcast-bench-") as name:
        console.print("Making what is measured …")
        found = make_ways(settings, parent, texts, reviews, Path(name))
        for way in found:
            way.encode(texts)  # what is set up at first is not timed
        rounds: list[Round] = []
        for number in range(settings.rounds):
            rounds.append(take_round(found, texts, tokens, parent.device))
            console.print(f"round {number + 1} of {settings.rounds}")
        figures = summary(found, rounds, texts, tokens)
        figures["tokens_per_second_by_length"] = by_length(found, texts, tokens, parent.device)
        best = next((way.encoder for way in found if way.name == BF16), None) or parent
        figures["tokens_per_second_by_budget"] = {
            str(budget): round(
                sum(tokens) / seconds_of(ways.ours(FP32, best, budget), texts, parent.device)
            )
            for budget in settings.budgets
        }
        called = texts[:CALLED_TEXTS]
        figures["by_callers"] = {
            str(count): by_callers(best, called, TextsConfig().token_budget, count)
            for count in settings.callers
        }
        if best.graphs is not None:
            figures |= saturated(best, texts, settings.rounds, parent.device)
        figures["star_rmse"] = star_errors(found, reviews)
    if settings.pairs:
        rates = pair_rates(settings.pairs, settings.device, console)
        figures["pairs_per_second"] = {name: round(rate) for name, rate in rates.items()}
    about = {"processor_time": by_processor(parent.device), "card": card(parent.device)}
    return figures | {"tokens": sum(tokens), "device": str(parent.device), **about}


def card(device: torch.device) -> str | None:
    """The name of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def read_options(arguments: Sequence[str] | None) -> Settings:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="bench.text", description=__doc__)
    parser.add_argument("--texts", type=int, default=240, help="texts of mixed length")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reviews", type=int, default=400, help="for the student and star heads")
    parser.add_argument("--pairs", type=int, default=200_000, help="0: the network is left out")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512, 1_024, 32_768])
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 64])
    clock.add_options(parser)
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile too; takes minutes to compile"
    )
    parser.add_argument("--seed", type=int, default=7)
    return Settings(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    settings = read_options(arguments)
    configure(LogConfig(level="warning"))
    clock.take_threads(settings.threads)
    console = Console()
    figures = measure(settings, console)
    for each in tables(figures):
        console.print(each)
    for name, value in figures.items():
        if name.startswith(("ratio", "share", "matrix", "pairs")):
            console.print(f"{name}: {value}")
    about = {"settings": asdict(settings) | {"torch_threads": torch.get_num_threads()}}
    name = "text-gpu" if figures["card"] else "text"
    path = report.write(name, figures | about, *PACKAGES)
    console.print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
