"""An evaluation that is killed, wherever that is, ends with the same figures when asked again."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
from pathlib import Path
import orjson, transformers
from model.replay import History
from trainer import checkpoints, evaluate, fine_tune
from trainer.config import FineTuneConfig, FitConfig, SizesConfig, TextConfig, TrainerConfig
from trainer.data import from_file
from trainer.peers import ratings, texts, tuning

stage, events, encoder, folder, out = sys.argv[1:]
tuning.TRIALS, ratings.MOST_FOREST_TREES, texts._CHECKPOINT_STEPS = 3, 5, 5
checkpoints.CHECKPOINT_SECONDS = -1.0
stages = {  # what is killed at which of its calls
    "text": (fine_tune._Fit, "_take", 7),
    "replay": (History, "run_instants", 1),
    "network": (evaluate, "refit_network", 1),
    "trials": (ratings, "predict_damped_bias", 3),
    "plain": (transformers.Trainer, "training_step", 8),
}
if stage in stages:
    owner, name, left = stages[stage]
    whole = getattr(owner, name)

    def killed(*given, **named):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*given, **named)

    setattr(owner, name, killed)
config = TrainerConfig(
    threads=1,
    text=TextConfig(method="full", fine_tune=FineTuneConfig(epochs=1)),
    fit=FitConfig(epochs=2, sizes=SizesConfig(members=1, width=16)),
)
found = evaluate.evaluate(from_file(Path(events)), Path(folder), config, encoder=encoder)
Path(out).write_bytes(orjson.dumps(found.document))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_evaluation_goes_on_to_the_same_figures(
    shop_file: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(stage: str, folder: str) -> int:
        given = [shop_file, encoder_folder, tmp_path / folder, tmp_path / f"{folder}.json"]
        command = [sys.executable, str(script), stage, *map(str, given)]
        return subprocess.run(command, capture_output=True).returncode

    for stage in ("text", "replay", "network", "trials", "plain"):
        assert run(stage, "killed") == -signal.SIGKILL, stage
    kept = {path.name for path in (tmp_path / "killed").iterdir()}
    assert {"rows.npz", "text model.npz", "model.npz", "peer bias trial 1.npz"} <= kept
    assert "text peer finetune_plain.npz" not in kept
    assert run("none", "killed") == run("none", "whole") == 0
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
