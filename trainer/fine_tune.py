"""Fine-tuning: the encoder and a head of stars fitted together, in full or by a few weights.

Of logits z (n, 5) with p = softmax(z), labels y (n, 5) and r = Σ k·y_k, the loss is the mean of

    cross_entropy · (−Σ y_k ln p_k) + squared_error · (Σ k·p_k − r)² + ordinal · CORAL

where CORAL is the sum of four binary cross entropies, of "more than k stars" for k = 1 to 4, whose
logits share all but their offsets (Cao, Mirjalili and Raschka 2020, "Rank Consistent Ordinal
Regression", section 3.3). A fractional rating is a soft label in all three.

A step takes texts at random, in parts of like length whose gradients add up (`batches`). What is
kept is the mean of the weights over the last steps (Izmailov et al. 2018, "Averaging Weights Leads
to Wider Optima and Better Generalization", section 3). Every draw is a function of the seed and the
step alone, so a fit that was killed goes on from its last checkpoint to the same weights. Processes
that `torchrun` or `accelerate launch` started share each batch and average gradients.
"""

import logging
import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.optim import swa_utils

from model import adapters
from model import encoder as encoders
from model.encoder import StarHead, TextEncoder
from model.state import STARS
from trainer import batches, checkpoints, methods
from trainer.augment import Vocabulary, translate, variants
from trainer.config import FineTuneConfig, Method, TextConfig
from trainer.exceptions import DivergedError, TrainerError
from trainer.progress import OnProgress
from trainer.rates import schedule
from trainer.tracking import Note, unnoted

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_RANKS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of peft's allocator


@dataclass(frozen=True)
class Labelled:
    """n texts with their stars."""

    texts: Sequence[str]
    labels: NDArray[np.float32]  # (n, 5): distributions over stars

    def __len__(self) -> int:
        return len(self.texts)


class _Reader(nn.Module):
    """Encoder and head as one module, so that processes average the gradients of both."""

    def __init__(self, encoder: TextEncoder, head: StarHead, config: FineTuneConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.model = encoder.model
        self.classes = nn.Linear(encoder.hidden, STARS)
        with torch.no_grad():
            self.classes.weight.copy_(torch.from_numpy(head.weight))
            self.classes.bias.copy_(torch.from_numpy(head.bias))
        self.ranks = nn.Linear(encoder.hidden, 1, bias=False) if config.ordinal else None
        self.cuts = nn.Parameter(torch.zeros(STARS - 1)) if config.ordinal else None

    def forward(self, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits of stars (n, 5) and, for CORAL, of more than 1 to 4 stars (n, 4)."""
        vectors = self.encoder.embed(tokens)
        ranks = None
        if self.ranks is not None and self.cuts is not None:
            ranks = self.ranks(vectors) + self.cuts
        return self.classes(vectors), ranks

    def head(self) -> StarHead:
        """The head of stars as it stands."""
        weight, bias = (each.detach().float().cpu().numpy() for each in self.classes.parameters())
        return StarHead(weight, bias)

    def added(self) -> list[nn.Parameter]:
        """What the head has to learn."""
        return [each for name, each in self.named_parameters() if not name.startswith("model.")]


def loss_of(logits: Tensor, ranks: Tensor | None, labels: Tensor, config: FineTuneConfig) -> Tensor:
    """The loss of each row (n), as the module's head says."""
    stars = torch.arange(1, STARS + 1, dtype=labels.dtype, device=labels.device)
    smooth = labels * (1 - config.label_smoothing) + config.label_smoothing / STARS
    loss = config.cross_entropy * nn.functional.cross_entropy(logits, smooth, reduction="none")
    if config.squared_error:
        loss = loss + config.squared_error * (logits.softmax(1) @ stars - labels @ stars).square()
    if ranks is not None:
        above = labels.flip(1).cumsum(1).flip(1)[:, 1:]  # (n, 4): share of more than k stars
        entropy = nn.functional.binary_cross_entropy_with_logits(ranks, above, reduction="none")
        loss = loss + config.ordinal * entropy.sum(1)
    return loss


@dataclass(frozen=True)
class Cost:
    """What a fit took."""

    trained: int  # weights that were fitted, the head's too
    steps: int


@dataclass(frozen=True)
class Tuned:
    """What a fit gave."""

    encoder: TextEncoder
    head: StarHead | None  # none: a loss of ranks alone does not teach one
    cost: Cost


def fine_tune(
    train: Labelled,
    validation: Labelled,
    encoder: TextEncoder,
    head: StarHead,
    config: TextConfig,
    folder: Path,
    seed: int,
    on_progress: OnProgress,
    checkpoint: Path | None = None,
    note: Note = unnoted,
) -> Tuned:
    """An encoder and its head, fitted to labelled texts.

    Args:
        train: what is learnt from.
        validation: learnt from too, unless `patience` makes it say when to end.
        encoder: to start from; it is not changed.
        head: to start from.
        config: the method and its settings.
        folder: where the new encoder is written.
        seed: of dropout, of the order of texts and of their variants.
        on_progress: called with steps done and steps in all.
        checkpoint: a file to go on from, and to write every half minute and in the end;
            who calls deletes it when the result is safe. All processes go on from it, or none.
        note: where the loss is told.

    Raises:
        EncoderError: the encoder has no layers that the method could name.
        TrainerError: the encoder does not take the method; the checkpoint is of another fit; the
            loss came to no number.
    """
    tuning = config.fine_tune
    require_plain(encoder)
    # A second copy is loaded, for the given encoder stays as it is.
    base = encoders.load(encoder.folder, str(encoder.device))
    rows = train if tuning.patience else joined(train, validation)
    torch.manual_seed(seed)
    with _processes(base.device) as (rank, count):
        steps = tuning.epochs * len(_epoch(rows, tuning, seed, 0))
        base = base.holding(methods.trainable(base, config.method, tuning, steps))
        reader = _Reader(base, head, tuning).to(base.device)
        fit = _Fit(reader, config, seed, steps, rank, count)
        fit.run(rows, validation, on_progress, checkpoint, note)
    trained = sum(each.numel() for each in reader.parameters() if each.requires_grad)
    methods.write(base, config.method, folder)
    found = encoders.load(folder, str(encoder.device))
    taught = tuning.cross_entropy or tuning.squared_error
    return Tuned(found, reader.head() if taught else None, Cost(trained, fit.step))


def require_plain(encoder: TextEncoder) -> None:
    """Raise TrainerError where an encoder is more than weights that can be fitted."""
    if encoder.extended:
        raise TrainerError(
            f"{encoder.folder} has adapters, virtual tokens or eight-bit weights, which are not "
            "fitted again: start from a plain encoder (models.encoder), or set trainer.text.method "
            "to frozen"
        )


def taken(texts: Sequence[str], rows: NDArray[np.int64]) -> list[str]:
    """The texts of these rows."""
    return [texts[row] for row in map(int, rows)]


def joined(first: Labelled, second: Labelled) -> Labelled:
    """The texts of both."""
    return Labelled([*first.texts, *second.texts], np.concatenate([first.labels, second.labels]))


class _Fit:
    """One fit, which knows its step; what else it needs follows from the seed and the step."""

    def __init__(
        self, reader: _Reader, config: TextConfig, seed: int, steps: int, rank: int, count: int
    ) -> None:
        self.step = 0
        self._reader = reader
        self._method = config.method
        self._config = config.fine_tune
        self._seed = seed
        self._rank, self._count = rank, count
        self._device = reader.encoder.device
        self._weights = [each for each in reader.parameters() if each.requires_grad]
        groups = _groups(reader, config.method, self._config)
        self._optimizer = torch.optim.AdamW(groups, fused=True)
        self._schedule = schedule(
            self._optimizer, steps, self._config.warm_up, self._config.schedule
        )
        self._scaler = torch.amp.GradScaler(enabled=self._config.precision == "fp16")
        called: nn.Module = reader
        if count > 1:
            called = nn.parallel.DistributedDataParallel(reader, find_unused_parameters=True)
        if self._config.compile:
            called = cast(nn.Module, torch.compile(called, dynamic=True))
        self._called = called
        self._steps = steps
        # A mean would have some of the ranks that AdaLoRA takes away.
        whole = not self._config.patience and config.method != "adalora"
        kept = self._config.averaged if whole else 0.0
        self._averaged_from = steps - int(steps * kept)  # as many steps are not averaged
        self._averaged: list[Tensor] = []  # as `_weights`, once there are some
        self._translated: list[str] | None = None  # there and back: the same in every epoch
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._waited = 0
        self._ended = False

    def run(
        self,
        rows: Labelled,
        validation: Labelled,
        on_progress: OnProgress,
        checkpoint: Path | None,
        note: Note,
    ) -> None:
        """All steps that are left, or those until validation says to end."""
        self._resume(checkpoint)
        saved = time.monotonic()
        by_epoch = len(_epoch(rows, self._config, self._seed, 0))
        while self.step < self._steps and not self._ended:
            epoch, first = divmod(self.step, by_epoch)
            varied = self._varied(rows, epoch)
            for batch in _epoch(rows, self._config, self._seed, epoch)[first:]:
                loss = self._take(varied, batch)
                # In half precision the scaler leaves such a step out.
                if not math.isfinite(loss) and not self._scaler.is_enabled():
                    raise DivergedError(
                        f"the fit of the encoder came to no number in step {self.step} of "
                        f"{self._steps}: lower trainer.text.fine_tune's rates or weight_decay"
                    )
                note("text/loss", loss, self.step)
                on_progress(self.step, self._steps)
                # After an epoch validation may end it: what goes on from here would not ask.
                judged = self._config.patience and self.step % by_epoch == 0
                due = time.monotonic() - saved > checkpoints.CHECKPOINT_SECONDS
                if checkpoint is not None and due and not judged:
                    self._save(checkpoint)
                    saved = time.monotonic()
            self._ended = bool(self._config.patience) and self._enough(validation, note)
        self._ended = True
        if checkpoint is not None:
            self._save(checkpoint)
        if self._best is not None:
            self._reader.load_state_dict(self._best[1], strict=False)
        with torch.no_grad():
            for each, averaged in zip(self._weights, self._averaged, strict=False):
                each.copy_(averaged)
        self._reader.eval()

    def _take(self, rows: Labelled, batch: NDArray[np.int64]) -> float:
        """One step on a batch, of all parts and processes; returns the loss."""
        torch.manual_seed(seed_of(self._seed, self.step, self._rank))
        self._reader.train()
        mine, share = batch[self._rank :: self._count], self._count / len(batch)
        if not len(mine):  # the others wait for its gradients all the same
            mine, share = batch[:1], 0.0
        tokens = self._reader.encoder.count_tokens(taken(rows.texts, mine))
        parts = self._parts(tokens)
        total = 0.0
        for number, part in enumerate(parts):
            chosen = mine[part]
            last = number == len(parts) - 1
            alone = self._count > 1 and not last  # gradients are averaged once a step
            with cast(Any, self._called).no_sync() if alone else nullcontext():
                loss = self._losses(rows, chosen).sum() * share
                total += float(loss.detach())
                self._scaler.scale(loss).backward()  # pyright: ignore[reportUnknownMemberType]
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._weights, self._config.clip)
        self._scaler.step(self._optimizer)  # pyright: ignore[reportUnknownMemberType]
        self._scaler.update()
        self._schedule.step()
        if self._method == "adalora":
            cast(Any, self._reader.model).base_model.update_and_allocate(self.step)
        self._optimizer.zero_grad()
        self.step += 1
        if self.step > self._averaged_from:
            self._average()
        return total

    def _average(self) -> None:
        """Take the weights of this step into their mean."""
        weights = [each.detach() for each in self._weights]
        if not self._averaged:
            self._averaged = [each.clone() for each in weights]
        else:
            taken_in = self.step - self._averaged_from - 1
            swa_utils.get_swa_multi_avg_fn()(self._averaged, weights, taken_in)

    def _parts(self, tokens: Sequence[int]) -> list[batches.Rows]:
        budget, overhead = self._config.token_budget, batches.overhead(self._device)
        return list(batches.parts(np.asarray(tokens), budget, overhead))

    def _losses(self, rows: Labelled, chosen: NDArray[np.int64]) -> Tensor:
        tokens = self._reader.encoder.tokens(taken(rows.texts, chosen))
        labels = torch.from_numpy(rows.labels[chosen]).to(self._device)
        dtype = _DTYPES[self._config.precision]
        low = dtype is not torch.float32
        with torch.autocast(self._device.type, dtype) if low else nullcontext():
            logits, ranks = self._called(tokens)
        return loss_of(
            logits.float(), None if ranks is None else ranks.float(), labels, self._config
        )

    def _varied(self, rows: Labelled, epoch: int) -> Labelled:
        """The texts of an epoch: as they are, and their variants."""
        config = self._config.augment
        if not config.ways:
            return rows
        random = np.random.default_rng([self._seed, epoch])
        vocabulary = Vocabulary.of(rows.texts)
        if "translate" in config.ways and config.there and config.back and not self._translated:
            there, back = Path(config.there), Path(config.back)
            self._translated = translate(rows.texts, there, back, str(self._device))
        texts = [*rows.texts]
        for _ in range(config.variants):
            texts += variants(rows.texts, config, vocabulary, random, self._translated)
        return Labelled(texts, np.tile(rows.labels, (1 + config.variants, 1)))

    def _enough(self, validation: Labelled, note: Note) -> bool:
        """Whether the loss on validation has not fallen for long enough."""
        self._reader.eval()
        with torch.no_grad():
            parts = self._parts(self._reader.encoder.count_tokens(validation.texts))
            loss = sum(float(self._losses(validation, part).sum()) for part in parts)
        note("text/validation_loss", loss / max(len(validation), 1), self.step)
        if self._best is None or loss < self._best[0]:
            state = {name: each.detach().clone() for name, each in self._learnt()}
            self._best, self._waited = (loss, state), 0
        else:
            self._waited += 1
        return self._waited >= self._config.patience

    def _learnt(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, each) for n, each in self._reader.named_parameters() if each.requires_grad)

    def _save(self, checkpoint: Path) -> None:
        if self._rank:
            return
        state = {
            "step": self.step,
            "steps": self._steps,
            "weights": {name: each.detach() for name, each in self._learnt()},
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "averaged": self._averaged,
            "best": self._best,
            "waited": self._waited,
            "ended": self._ended,
            "ranks": {name: getattr(self._ranks, name) for name in _RANKS} if self._ranks else None,
            "kept_ranks": self._ranks.peft_config.rank_pattern if self._ranks else None,
        }
        checkpoints.save(checkpoint, state)

    def _resume(self, checkpoint: Path | None) -> None:
        if checkpoint is None or not self._all_have(checkpoint):
            return
        state = checkpoints.load(checkpoint, self._device)
        same = state["steps"] == self._steps and "ended" in state  # else its steps were others
        if not same or state["weights"].keys() != {name for name, _ in self._learnt()}:
            raise TrainerError(f"{checkpoint} is of another fit; delete it to begin anew")
        self._reader.load_state_dict(state["weights"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.step, self._averaged = state["step"], state["averaged"]
        self._best, self._waited, self._ended = state["best"], state["waited"], state["ended"]
        for name, value in (state["ranks"] or {}).items():
            setattr(self._ranks, name, value)
        if self._ranks:
            self._ranks.peft_config.rank_pattern = state["kept_ranks"]

    def _all_have(self, checkpoint: Path) -> bool:
        """Whether all processes see it; else they would not take the same steps."""
        seen = torch.tensor(int(checkpoint.exists()), device=self._device)
        if self._count > 1:
            distributed.all_reduce(seen, distributed.ReduceOp.MIN)
            if not seen and checkpoint.exists():
                logger.warning("%s is not seen by all processes; the fit begins anew", checkpoint)
        return bool(seen)

    @property
    def _ranks(self) -> Any:
        """What AdaLoRA remembers of its factors; None by other methods."""
        if self._method != "adalora":
            return None
        return cast(Any, self._reader.model).base_model.rankallocator


def seed_of(*parts: int) -> int:
    """A seed for what these numbers name, such as a fit's seed and a step."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _epoch(rows: Labelled, config: FineTuneConfig, seed: int, epoch: int) -> list[batches.Rows]:
    """The steps of an epoch: all rows, and their variants."""
    copies = 1 + (config.augment.variants if config.augment.ways else 0)
    random = np.random.default_rng([seed, epoch])
    return batches.shuffled(copies * len(rows), config.batch_texts, random)


def _groups(reader: _Reader, method: Method, config: FineTuneConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: the head, what a method adds, or each layer with its own rate."""
    head = {"params": reader.added(), "lr": config.head_learning_rate, "weight_decay": 0.0}
    if method not in methods.IN_FULL:
        weights = [each for each in reader.model.parameters() if each.requires_grad]
        return [
            head,
            {
                "params": weights,
                "lr": config.adapter_learning_rate,
                "weight_decay": config.weight_decay,
            },
        ]
    stack = adapters.layers(reader.model)
    depth = {id(each): at for at, layer in enumerate(stack) for each in layer.parameters()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for each in reader.model.parameters():
        if each.requires_grad:
            # Offsets and norms do not decay; embeddings lie below all layers.
            groups.setdefault((depth.get(id(each), -1), each.ndim > 1), []).append(each)
    return [head] + [
        {
            "params": weights,
            "lr": config.learning_rate * config.layer_decay ** (len(stack) - 1 - layer),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (layer, decays), weights in groups.items()
    ]


@contextmanager
def _processes(device: torch.device) -> Generator[tuple[int, int]]:
    """This process's number and how many fit together, as their launcher says."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield 0, 1
        return
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", device_id=device if on_gpu else None
    )
    try:
        yield distributed.get_rank(), count
    finally:
        distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one of several that writes what all have found."""
    return int(os.environ.get("RANK", "0")) == 0
