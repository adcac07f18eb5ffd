"""Fine-tuning beside `transformers.Trainer` and a plain loop, and how fast a history is replayed.

**Fine-tuning.** Three trainers fit the packaged MiniLM, in full, and a head of five stars to the
same texts of mixed length: the same loss, batch size, epochs, AdamW, learning rate that falls
linearly, and clipping, in fp32. Ours is `trainer.fine_tune` with its default settings.
`transformers.Trainer` gets its own best: batches of like length (`group_by_length`), padded to
their longest. The plain loop takes shuffled batches, padded likewise, as tutorials have it. Timed
is from the end of the first step to that of the last; the peers' texts are tokens before that, ours
are turned into tokens in each step. Rates of the head and of lower layers are ours alone (they cost
no time), so the error on texts not seen shows that all learn, not which learns best.

**Replay.** Events of users and items by Zipf's law (`bench.rows`) go through
`model.replay.History`: `apply`, which keeps states alone, and `run`, which also gives what a
prediction would be made from, in batches of 8,192. The limit is the bare copying of the same
states: for each batch, distinct users' and items' rows are taken from their tables and put back.

Time is as `bench.clock` says. Prints tables and writes `results/train.json`.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import clock, report
from bench.command import exit_code
from bench.model import packaged_encoder
from bench.rows import make_item_tables, make_rows
from bench.text import make_reviews
from bench.ways import model_of_transformers
from model import encoder as encoders
from model.encoder import WIDTH, StarHead, TextEncoder
from model.events import Rows, opaque
from model.lookups import Store
from model.replay import History
from model.state import ITEM, STARS, USER
from starcast.log import LogConfig, configure
from trainer.config import FineTuneConfig, TextConfig
from trainer.fine_tune import Labelled, fine_tune, loss_of, taken
from trainer.metrics import text_scores
from trainer.text import TEST, ReviewTexts, encode, soft_labels

OURS, TRAINER, PLAIN = "starcast", "transformers.Trainer", "plain loop"
LAST_REVIEW = 0.35  # odds that a text ends with a review, and none of the same stars follows
MOST_REVIEWS = 8  # joined in one text: more than the encoder takes
BATCH_EVENTS = 8_192
PACKAGES = ("accelerate", "numba", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Settings:
    """How much is measured, and how."""

    texts: int
    epochs: int
    rounds: int
    events: int
    users: int
    items: int
    device: str
    threads: int
    seed: int


@dataclass(frozen=True)
class Fitted:
    """What one trainer did."""

    samples_per_second: float
    rmse: float  # on texts not seen


class Steps:
    """Notes when each step was done."""

    def __init__(self, device: torch.device) -> None:
        self._now = clock.reader(device)
        self.ends: list[float] = []

    def done(self, *_: object) -> None:
        """A step was done."""
        self.ends.append(self._now())

    def rate(self, samples: int) -> float:
        """Samples a second after the first step, when `samples` were in all steps."""
        share = (len(self.ends) - 1) / len(self.ends)
        return samples * share / (self.ends[-1] - self.ends[0])


class Reader(nn.Module):
    """Encoder and head for the peers, with our loss."""

    def __init__(self, encoder: TextEncoder, config: FineTuneConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.model = encoder.model
        self.classes = nn.Linear(encoder.hidden, STARS)
        nn.init.zeros_(self.classes.weight)
        nn.init.zeros_(self.classes.bias)
        self._config = config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Loss and logits."""
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits = self.classes(self.encoder.embed(tokens))
        return {"loss": loss_of(logits, None, labels, self._config).mean(), "logits": logits}

    def head(self) -> StarHead:
        """The head as it stands."""
        weight, bias = (each.detach().cpu().numpy() for each in self.classes.parameters())
        return StarHead(weight, bias)


def lengthened(reviews: ReviewTexts, seed: int) -> ReviewTexts:
    """Texts of mixed length: each review is followed by none or more of the same stars."""
    random = np.random.default_rng(seed)
    texts: list[str] = []
    for text, rating in zip(reviews.texts, reviews.rating.tolist(), strict=True):
        alike = np.flatnonzero(reviews.rating == rating)
        more = min(int(random.geometric(LAST_REVIEW)), MOST_REVIEWS) - 1
        texts.append(" ".join([text, *taken(reviews.texts, random.choice(alike, more))]))
    return replace(reviews, texts=texts)


def by_us(train: Labelled, base: TextEncoder, config: TextConfig, seed: int, folder: Path) -> Any:
    """Our trainer: its encoder, its head and its rate."""
    steps = Steps(base.device)
    none = Labelled([], np.empty((0, STARS), np.float32))
    empty = StarHead(np.zeros((STARS, base.hidden), np.float32), np.zeros(STARS, np.float32))
    tuned = fine_tune(train, none, base, empty, config, folder, seed, steps.done)
    assert tuned.head is not None  # its loss teaches one
    return tuned.encoder, tuned.head, steps.rate(len(train) * config.fine_tune.epochs)


def by_trainer(
    train: Labelled, base: TextEncoder, config: TextConfig, seed: int, folder: Path
) -> Any:
    """`transformers.Trainer` with batches of like length."""
    transformers: Any = importlib.import_module("transformers")
    tuning, steps = config.fine_tune, Steps(base.device)
    reader = Reader(replace(base, model=model_of_transformers(base)), tuning)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            steps.done()

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=tuning.batch_texts,
        num_train_epochs=tuning.epochs,
        learning_rate=tuning.learning_rate,
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip,
        warmup_steps=tuning.warm_up,  # below 1, a share of all steps
        lr_scheduler_type=tuning.schedule,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=base.device.type == "cpu",
    )
    trainer = transformers.Trainer(
        model=reader,
        args=arguments,
        train_dataset=rows_of(train, base),
        data_collator=collator(base),
        callbacks=[Watch()],
    )
    trainer.train()
    return reader.encoder, reader.head(), steps.rate(len(train) * tuning.epochs)


def by_plain_loop(
    train: Labelled, base: TextEncoder, config: TextConfig, seed: int, folder: Path
) -> Any:
    """A loop as tutorials have it."""
    tuning, steps = config.fine_tune, Steps(base.device)
    torch.manual_seed(seed)
    own = replace(base, model=model_of_transformers(base))
    reader = Reader(own, tuning).to(base.device)
    rows: Any = rows_of(train, base)
    batches = torch.utils.data.DataLoader(
        rows, tuning.batch_texts, shuffle=True, collate_fn=collator(base)
    )
    total = tuning.epochs * len(batches)
    optimizer = torch.optim.AdamW(
        reader.parameters(), lr=tuning.learning_rate, weight_decay=tuning.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    reader.train()
    for _ in range(tuning.epochs):
        for batch in batches:
            loss = reader(**{name: each.to(base.device) for name, each in batch.items()})["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), tuning.clip)
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]
            schedule.step()
            steps.done()
    return reader.encoder, reader.head(), steps.rate(len(train) * tuning.epochs)


TRAINERS: Mapping[str, Callable[[Labelled, TextEncoder, TextConfig, int, Path], Any]] = {
    OURS: by_us,
    TRAINER: by_trainer,
    PLAIN: by_plain_loop,
}


def rows_of(train: Labelled, base: TextEncoder) -> list[dict[str, Any]]:
    """Texts as tokens with their labels."""
    cut = base.tokenizer(list(train.texts), truncation=True, max_length=base.longest_tokens)
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in zip(cut["input_ids"], train.labels.tolist(), strict=True)
    ]


def collator(base: TextEncoder) -> Any:
    """What pads a batch to its longest text."""
    transformers: Any = importlib.import_module("transformers")
    return transformers.DataCollatorWithPadding(base.tokenizer)


def fit(way: str, reviews: ReviewTexts, base: TextEncoder, config: TextConfig, seed: int) -> Fitted:
    """One fit by one trainer, and how well it reads the newest texts."""
    known, newest = np.flatnonzero(reviews.span != TEST), np.flatnonzero(reviews.span == TEST)
    train = Labelled(taken(reviews.texts, known), soft_labels(reviews.rating[known]))
    with tempfile.TemporaryDirectory(prefix="starcast-bench-") as name:
        encoder, head, rate = TRAINERS[way](train, base, config, seed, Path(name) / "tuned")
        vectors = encode(encoder, taken(reviews.texts, newest), lambda done, total: None)
    said = text_scores(reviews.rating[newest], head.stars(vectors))
    return Fitted(rate, said.rmse)


def replays(settings: Settings) -> dict[str, float]:
    """Events a second of each way to replay a history."""
    events = make_rows(settings.events, settings.users, settings.items, settings.seed)
    attributes, vectors = make_item_tables(settings.items, WIDTH, settings.seed)
    cpu = torch.device("cpu")

    def history() -> History:
        return History(attributes, vectors=vectors, batch_events=BATCH_EVENTS)

    def run(events: Rows) -> None:
        for _ in history().run(events):
            pass

    ways: dict[str, Callable[[Rows], None]] = {
        "apply": lambda events: history().apply(events),
        "run": run,
        "bare": copy_states,
    }
    found: dict[str, float] = {}
    for name, way in ways.items():
        way(events[: 2 * BATCH_EVENTS])  # what is compiled at first is not timed
        found[name] = len(events) / clock.seconds(lambda way=way: way(events), cpu)
    return found


def copy_states(events: Rows) -> None:
    """Take each batch's states of users and items from their tables, and put them back."""
    users, items = Store(USER), Store(ITEM)
    for batch in batches_of(events):
        for store, hashes in ((users, batch["user"]), (items, batch["item"])):
            rows, _ = store.distinct(hashes)
            taken_rows = store.rows.take(rows)
            opaque(store.rows)[rows] = opaque(taken_rows)


def batches_of(events: Rows) -> Iterator[Rows]:
    """The events, a batch at a time."""
    for first in range(0, len(events), BATCH_EVENTS):
        yield events[first : first + BATCH_EVENTS]


def summary(
    fits: Mapping[str, Sequence[Fitted]], replayed: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Ratios by name, medians over rounds, then rates."""

    def fit_ratio(other: str) -> float:
        pairs = zip(fits[OURS], fits[other], strict=True)
        return round(median(a.samples_per_second / b.samples_per_second for a, b in pairs), 3)

    def replay_ratio(way: str, other: str) -> float:
        return round(median(each[way] / each[other] for each in replayed), 3)

    return {
        "ratio_to_trainer": fit_ratio(TRAINER),
        "ratio_to_plain_loop": fit_ratio(PLAIN),
        "ratio_apply_to_bare": replay_ratio("apply", "bare"),
        "ratio_run_to_apply": replay_ratio("run", "apply"),
        "samples_per_second": {
            name: [round(each.samples_per_second, 2) for each in fitted]
            for name, fitted in fits.items()
        },
        "rmse": {
            name: round(median(each.rmse for each in fitted), 4) for name, fitted in fits.items()
        },
        "events_per_second": {
            name: [round(each[name]) for each in replayed] for name in replayed[0]
        },
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The figures side by side."""
    fitting = report.table("", "samples/s", "RMSE (b)", title="Fine-tuning in full")
    for name, rates in figures["samples_per_second"].items():
        fitting.add_row(name, f"{median(rates):.1f}", f"{figures['rmse'][name]:.4f}")
    replaying = report.table("", "events/s", title="Replay of a history")
    for name, rates in figures["events_per_second"].items():
        replaying.add_row(name, f"{median(rates):,.0f}")
    return [fitting, replaying]


def measure(settings: Settings, console: Console) -> dict[str, Any]:
    """All figures."""
    base = encoders.load(packaged_encoder(), settings.device)
    config = TextConfig(method="full", fine_tune=FineTuneConfig(epochs=settings.epochs))
    reviews = lengthened(make_reviews(settings.texts, settings.seed), settings.seed)
    tokens = base.count_tokens(reviews.texts)
    console.print(
        f"{len(tokens)} texts, {sum(tokens):,} tokens, {min(tokens)} to {max(tokens)} each, "
        f"on {base.device}"
    )
    fits: dict[str, list[Fitted]] = {name: [] for name in TRAINERS}
    replayed: list[dict[str, float]] = []
    for _ in range(settings.rounds):
        for name, fitted in fits.items():
            fitted.append(fit(name, reviews, base, config, settings.seed))
            console.print(f"{name}: {fitted[-1].samples_per_second:.1f} samples/s")
        replayed.append(replays(settings))
    about = {"device": str(base.device), "processor_time": clock.by_processor(base.device)}
    return summary(fits, replayed) | about


def read_options(arguments: Sequence[str] | None) -> Settings:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="bench.train", description=__doc__)
    parser.add_argument("--texts", type=int, default=300, help="the newest fifth is not learnt")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=1_000_000, help="of the replayed history")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=10_000)
    clock.add_options(parser)
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
        if name.startswith("ratio"):
            console.print(f"{name}: {value}")
    about = {"settings": asdict(settings) | {"torch_threads": torch.get_num_threads()}}
    path = report.write("train", figures | about, *PACKAGES)
    console.print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
