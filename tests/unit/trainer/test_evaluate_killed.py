"""An evaluation that is killed, wherever that is, ends with the same figures when asked again."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Each run is a fork of one process, since half of its time would go to imports.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import orjson, transformers
from model.replay import History
from trainer import checkpoints, evaluate, fine_tune
from trainer.config import FineTuneConfig, FitConfig, SizesConfig, TextConfig, TrainerConfig
from trainer.data import from_file
from trainer.peers import ratings, texts, tuning

events, encoder, folder = sys.argv[1:]
tuning.TRIALS, ratings.MOST_FOREST_TREES, texts._CHECKPOINT_STEPS = 3, 5, 5
checkpoints.CHECKPOINT_SECONDS = -1.0
stages = {  # what is killed at which of its calls
    "text": (fine_tune._Fit, "_take", 7),
    "replay": (History, "run_instants", 1),
    "network": (evaluate, "refit_network", 1),
    "trials": (ratings, "predict_damped_bias", 3),
    "plain": (transformers.Trainer, "training_step", 8),
}

def kill_in(owner, name, left):
    whole = getattr(owner, name)

    def killed(*given, **named):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*given, **named)

    setattr(owner, name, killed)

def run(place):
    config = TrainerConfig(
        threads=1,
        text=TextConfig(method="full", fine_tune=FineTuneConfig(epochs=1)),
        fit=FitConfig(epochs=2, sizes=SizesConfig(members=1, width=16)),
    )
    found = evaluate.evaluate(from_file(Path(events)), place, config, encoder=encoder)
    place.with_suffix(".json").write_bytes(orjson.dumps(found.document))

for stage, place in [*((each, "killed") for each in stages), ("", "killed"), ("", "whole")]:
    child = os.fork()
    if not child:
        if stage:
            kill_in(*stages[stage])
        run(Path(folder) / place)
        os._exit(0)
    print(stage, place, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    if stage == "plain":
        print(*(path.name for path in (Path(folder) / place).iterdir()), sep=",")
"""
STAGES = ("text", "replay", "network", "trials", "plain")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_evaluation_goes_on_to_the_same_figures(
    shop_file: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = [sys.executable, str(script), *map(str, (shop_file, encoder_folder, tmp_path))]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *killed, kept, again, whole = done.stdout.splitlines()
    assert killed == [f"{stage} killed {-signal.SIGKILL}" for stage in STAGES], done.stderr
    assert {"rows.npz", "text model.npz", "model.npz", "peer bias trial 1.npz"} <= {
        *kept.split(",")
    }
    assert "text peer finetune_plain.npz" not in kept.split(",")
    assert (again, whole) == (" killed 0", " whole 0"), done.stderr
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
