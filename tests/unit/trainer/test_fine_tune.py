"""Fine-tuning, by every method, and what it does when killed or shared."""

import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from model import encoder as encoders
from model.encoder import StarHead, TextEncoder
from tests.unit.trainer.shop import WORDS
from trainer import checkpoints
from trainer import fine_tune as module
from trainer.config import AugmentConfig, FineTuneConfig, Method, TextConfig
from trainer.exceptions import TrainerError
from trainer.fine_tune import Cost, Labelled, Tuned, fine_tune, loss_of

METHODS: list[Method] = [
    each for each in get_args(Method) if each not in ("auto", "none", "frozen")
]


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> TextEncoder:
    return encoders.load(encoder_folder, "cpu")


def labelled(count: int = 96, seed: int = 0) -> Labelled:
    """Texts whose only telling word says the stars."""
    stars = np.random.default_rng(seed).integers(0, 5, count)
    texts = [f"{WORDS[star]} thing" for star in stars.tolist()]
    return Labelled(texts, np.eye(5, dtype=np.float32)[stars])


def tune(encoder: TextEncoder, folder: Path, **settings: Any) -> tuple[TextEncoder, Cost]:
    method = settings.pop("method", "full")
    checkpoint = settings.pop("checkpoint", None)
    settings = {"epochs": 1, "batch_texts": 16, "learning_rate": 1e-3, **settings}
    config = TextConfig(method=method, fine_tune=FineTuneConfig(**settings))
    found = tuned(encoder, folder, config, checkpoint)
    return found.encoder, found.cost


def tuned(
    encoder: TextEncoder, folder: Path, config: TextConfig, checkpoint: Path | None = None
) -> Tuned:
    head = StarHead(np.zeros((5, encoder.hidden), np.float32), np.zeros(5, np.float32))
    return fine_tune(
        labelled(),
        labelled(32, 1),
        encoder,
        head,
        config,
        folder,
        7,
        lambda done, total: None,
        checkpoint,
    )


def words(encoder: TextEncoder) -> Any:
    return encoder.encode([f"{word} thing" for word in WORDS])


def test_the_loss_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.2]]))
    labels = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]])
    config = FineTuneConfig(cross_entropy=1, squared_error=2)
    # Expected 3.2 stars of 3.5.
    wanted = -0.5 * np.log(0.3) - 0.5 * np.log(0.2) + 2 * 0.3**2
    assert loss_of(logits, None, labels, config).tolist() == pytest.approx([wanted], abs=1e-5)
    ranks = torch.tensor([[2.0, 1.0, 0.0, -1.0]])  # more than 1, 2, 3, 4 stars
    above = 1 / (1 + np.exp([-2.0, -1.0, 0.0, 1.0]))
    truth = np.array([1, 1, 0.5, 0])
    wanted = -(truth * np.log(above) + (1 - truth) * np.log(1 - above)).sum()
    config = FineTuneConfig(cross_entropy=0, squared_error=0, ordinal=1)
    assert loss_of(logits, ranks, labels, config).tolist() == pytest.approx([wanted], abs=1e-5)


def test_smooth_labels_by_hand() -> None:
    logits = torch.zeros((1, 5))
    logits[0, 0] = 1
    labels = torch.eye(5)[:1]
    config = FineTuneConfig(squared_error=0, label_smoothing=0.5)
    logs = np.log(np.exp([1, 0, 0, 0, 0]) / np.exp([1, 0, 0, 0, 0]).sum())
    wanted = -(np.array([0.6, 0.1, 0.1, 0.1, 0.1]) * logs).sum()
    assert loss_of(logits, None, labels, config).tolist() == pytest.approx([wanted], abs=1e-5)


def test_without_a_loss_there_is_nothing_to_learn() -> None:
    with pytest.raises(ValidationError, match="must be above 0"):
        FineTuneConfig(cross_entropy=0, squared_error=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_an_encoder_that_reads_otherwise(
    method: Method, encoder: TextEncoder, tmp_path: Path
) -> None:
    before = words(encoder)
    found, cost = tune(encoder, tmp_path / "new", method=method, top_layers=1)
    assert (words(encoder) == before).all()
    assert found.hash != encoder.hash
    assert not np.allclose(words(found), before, atol=1e-5)
    again = encoders.load(tmp_path / "new", "cpu")
    assert again.hash == found.hash
    assert np.allclose(words(again), words(found))
    whole = sum(each.numel() for each in encoder.model.parameters())
    head = 5 * (encoder.hidden + 1)
    assert (cost.trained == whole + head) == (method == "full")
    assert head < cost.trained <= whole + head
    assert cost.steps == 8  # of 128 texts, 16 a step


def test_top_layers_leave_the_layers_below_as_they_are(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    found, _ = tune(encoder, tmp_path / "new", method="top_layers", top_layers=1)
    old, new = encoder.model.state_dict(), found.model.state_dict()
    changed = {name for name in old if not (old[name] == new[name]).all()}
    assert changed
    assert all(name.startswith("encoder.layer.1.") for name in changed)


def test_texts_are_translated_once_for_all_epochs(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def translate(texts: list[str], *_: object) -> list[str]:
        asked.append(len(texts))
        return texts

    monkeypatch.setattr(module, "translate", translate)
    augment = AugmentConfig(ways=("translate",), there="a", back="b")
    _, cost = tune(encoder, tmp_path / "new", epochs=3, augment=augment)
    assert (asked, cost.steps) == ([128], 3 * 16)


def test_layers_below_learn_less(encoder: TextEncoder, tmp_path: Path) -> None:
    found, _ = tune(encoder, tmp_path / "new", layer_decay=0.01)
    old, new = encoder.model.state_dict(), found.model.state_dict()

    def moved(layer: str) -> float:
        names = [name for name in old if name.startswith(layer) and name.endswith("dense.weight")]
        return float(np.mean([(new[name] - old[name]).abs().mean() for name in names]))

    assert moved("encoder.layer.0.") < 0.1 * moved("encoder.layer.1.")


@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 64},
        {"checkpointing": True},
    ],
)
def test_a_batch_in_parts_gives_the_same(
    settings: dict[str, Any], encoder: TextEncoder, tmp_path: Path
) -> None:
    one, _ = tune(encoder, tmp_path / "one", dropout=0)
    parts, _ = tune(encoder, tmp_path / "parts", dropout=0, **settings)
    assert np.allclose(words(one), words(parts), atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"squared_error": 1.0, "ordinal": 1.0}, {"precision": "bf16"}]
)
def test_other_losses_and_precisions_learn(
    settings: dict[str, Any], encoder: TextEncoder, tmp_path: Path
) -> None:
    found, _ = tune(encoder, tmp_path / "new", **settings)
    assert np.isfinite(words(found)).all()
    assert not np.allclose(words(found), words(encoder), atol=1e-4)


def test_the_head_is_what_was_taught(encoder: TextEncoder, tmp_path: Path) -> None:
    # The head starts from nothing here, and so needs large steps.
    tuning = FineTuneConfig(epochs=12, learning_rate=3e-3, head_learning_rate=0.1)
    found = tuned(encoder, tmp_path / "new", TextConfig(method="full", fine_tune=tuning))
    assert found.head is not None
    rows = labelled(50, 4)
    likeliest = (found.encoder.encode(rows.texts) @ found.head.weight.T + found.head.bias).argmax(1)
    assert (likeliest == rows.labels.argmax(1)).mean() > 0.9
    ranks = tuning.model_copy(update={"cross_entropy": 0.0, "squared_error": 0.0, "ordinal": 1.0})
    assert tuned(encoder, tmp_path / "r", TextConfig(method="full", fine_tune=ranks)).head is None


def test_weights_of_the_last_steps_are_averaged(encoder: TextEncoder, tmp_path: Path) -> None:
    """All 128 texts in a step, so that epochs are steps: of four, the last two count."""

    def biases(epochs: int, averaged: float) -> NDArray[np.float32]:
        tuning = FineTuneConfig(
            epochs=epochs,
            averaged=averaged,
            batch_texts=128,
            dropout=0,
            warm_up=0,
            schedule="constant",
        )
        config = TextConfig(method="full", fine_tune=tuning)
        found = tuned(encoder, tmp_path / f"{epochs} {averaged}", config)
        assert found.head is not None
        return found.head.bias

    third, fourth = biases(3, 0), biases(4, 0)
    assert not np.allclose(third, fourth, atol=1e-5)
    assert np.allclose(biases(4, 0.5), (third + fourth) / 2, atol=1e-6)


def test_a_fit_that_comes_to_no_number_says_so(encoder: TextEncoder, tmp_path: Path) -> None:
    """A decay that makes weights nine times as large in each step."""
    with pytest.raises(TrainerError, match="came to no number in step"):
        tune(encoder, tmp_path / "new", learning_rate=1.0, weight_decay=10.0, epochs=12)


def test_variants_are_learnt_from_too(encoder: TextEncoder, tmp_path: Path) -> None:
    augment = AugmentConfig(ways=("swap", "delete"), variants=2)
    _, cost = tune(encoder, tmp_path / "new", augment=augment)
    assert cost.steps == 3 * 8


def test_patience_ends_it_and_keeps_the_best(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that spoils everything: the first epoch stays the best one."""
    settings = {"patience": 2, "learning_rate": 0.5, "head_learning_rate": 0.5, "clip": 100.0}
    first, _ = tune(encoder, tmp_path / "first", **{**settings, "epochs": 50})
    _, cost = tune(encoder, tmp_path / "second", **{**settings, "epochs": 50})
    assert cost.steps < 50 * 6  # of 96 texts
    assert np.isfinite(words(first)).all()


class _KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "done"), [("full", 11), ("adalora", 11), ("adalora", 14)]
)  # after 12 AdaLoRA's ranks stay as they are
def test_a_killed_fit_goes_on_to_the_same_weights(
    method: Method,
    done: int,
    encoder: TextEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "method": method}
    whole, _ = tune(encoder, tmp_path / "whole", **settings)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1.0)  # after each step
    checkpoint = tmp_path / "checkpoint"
    take = module._Fit._take

    def killed(self: Any, *arguments: Any) -> float:
        if self.step == done:
            raise _KilledError
        return take(self, *arguments)

    monkeypatch.setattr(module._Fit, "_take", killed)
    with pytest.raises(_KilledError):
        tune(encoder, tmp_path / "killed", **settings, checkpoint=checkpoint)
    monkeypatch.setattr(module._Fit, "_take", take)
    steps: list[int] = []

    def counted(self: Any, *arguments: Any) -> float:
        steps.append(self.step)
        return take(self, *arguments)

    monkeypatch.setattr(module._Fit, "_take", counted)
    found, _ = tune(encoder, tmp_path / "again", **settings, checkpoint=checkpoint)
    assert steps == list(range(done, 16))
    assert (words(found) == words(whole)).all()
    # Until its result is safe, what has ended need not be done again.
    found, _ = tune(encoder, tmp_path / "once more", **settings, checkpoint=checkpoint)
    assert steps == list(range(done, 16))
    assert (words(found) == words(whole)).all()


def test_a_fit_killed_in_validation_asks_it_again(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that spoils everything, so the second epoch, the first that is worse, ends it."""
    settings: dict[str, Any] = {"patience": 1, "epochs": 9, "learning_rate": 0.5, "clip": 100.0}
    whole, cost = tune(encoder, tmp_path / "whole", **settings)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1.0)  # after each step
    enough = module._Fit._enough

    def killed(self: Any, *arguments: Any) -> bool:
        raise _KilledError

    monkeypatch.setattr(module._Fit, "_enough", killed)
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(_KilledError):
        tune(encoder, tmp_path / "killed", **settings, checkpoint=checkpoint)
    monkeypatch.setattr(module._Fit, "_enough", enough)
    found, again = tune(encoder, tmp_path / "again", **settings, checkpoint=checkpoint)
    assert again == cost
    assert cost.steps < 9 * 6
    assert (words(found) == words(whole)).all()
    monkeypatch.setattr(module._Fit, "_enough", killed)  # it has been asked for the last time
    found, again = tune(encoder, tmp_path / "once more", **settings, checkpoint=checkpoint)
    assert again == cost
    assert (words(found) == words(whole)).all()


def test_a_checkpoint_that_is_half_there_is_told(encoder: TextEncoder, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    tune(encoder, tmp_path / "whole", checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1_000])
    with pytest.raises(TrainerError, match="checkpoint cannot be read; delete it"):
        tune(encoder, tmp_path / "again", checkpoint=checkpoint)


@pytest.mark.parametrize("steps", [1, 8])  # as many, but written before weights were averaged
def test_a_checkpoint_of_another_fit_is_refused(
    steps: int, encoder: TextEncoder, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    torch.save({"steps": steps}, checkpoint)
    with pytest.raises(TrainerError, match="of another fit"):
        tune(encoder, tmp_path / "new", checkpoint=checkpoint)


SMALL = """
import resource, signal, sys
from pathlib import Path
from model import encoder as encoders
from model.exceptions import EncoderError
from tests.unit.trainer.test_fine_tune import tune
from trainer import checkpoints
import torch
torch.set_num_threads(1)
checkpoints.CHECKPOINT_SECONDS = -1.0
folder = Path(sys.argv[1])
encoder = encoders.load(folder / "encoder", "cpu")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
try:
    tune(encoder, folder / "new", checkpoint=folder / "checkpoint")
except EncoderError as error:
    print(error)
print(sorted(each.name for each in folder.iterdir()))
"""


def test_a_full_disk_leaves_no_checkpoint_and_says_so(encoder_folder: Path, tmp_path: Path) -> None:
    """Files of 2 KB at most stand for it; the fit itself goes on to its end."""
    copytree(encoder_folder, tmp_path / "encoder")
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no checkpoint was written") == 9  # of 8 steps, and in the end
    assert "new cannot be written" in done.stdout
    assert "checkpoint" not in done.stdout


def test_a_checkpoint_of_another_method_is_refused(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", -1.0)  # after each step
    checkpoint = tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # it stays
        tune(encoder, tmp_path / "first", method="lora", checkpoint=checkpoint)
    with pytest.raises(TrainerError, match="of another fit"):
        tune(encoder, tmp_path / "new", method="adapters", checkpoint=checkpoint)


def test_what_was_added_is_not_fitted_twice(encoder: TextEncoder, tmp_path: Path) -> None:
    found, _ = tune(encoder, tmp_path / "new", method="adapters")
    with pytest.raises(TrainerError, match="not fitted again"):
        tune(found, tmp_path / "newer")


SHARED = """
import sys
from pathlib import Path
from model import encoder as encoders
from tests.unit.trainer.test_fine_tune import tune, words
from trainer.fine_tune import is_first
import numpy as np, os, torch
torch.set_num_threads(1)
encoder = encoders.load(Path(sys.argv[1]), "cpu")
folder = Path(sys.argv[2]) / os.environ["RANK"]
found, _ = tune(encoder, folder, dropout=0, checkpoint=folder / "checkpoint")
np.save(Path(sys.argv[2]) / (os.environ["RANK"] + ".npy"), words(found))
"""


@pytest.mark.parametrize("alone", [False, True])
def test_two_processes_fit_as_one(
    alone: bool, encoder: TextEncoder, encoder_folder: Path, tmp_path: Path
) -> None:
    """A checkpoint that one of them sees `alone` would give them other numbers of steps."""
    one, _ = tune(encoder, tmp_path / "one", dropout=0)
    if alone:
        tune(encoder, tmp_path / "0", dropout=0, checkpoint=tmp_path / "0" / "checkpoint")
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", str(script), str(encoder_folder), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert ("not seen by all processes" in done.stderr) == alone
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in (0, 1))
    assert (first == second).all()
    assert np.allclose(first, words(one), atol=1e-4)
