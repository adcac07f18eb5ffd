"""Figures of a fit while it goes on: TensorBoard files always, others where they are configured.

Weights & Biases and MLflow are not among our requirements: who names a project or a URI installs
them. Without a network, Weights & Biases writes what `wandb sync` sends later.
"""

import importlib
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trainer.config import TrackingConfig
from trainer.exceptions import TrainerError

Note = Callable[[str, float, int], None]
"""Called with a figure's name, its value, and the step or epoch."""


def unnoted(name: str, value: float, step: int) -> None:
    """Figures that nobody keeps."""


@contextmanager
def tracking(config: TrackingConfig, run: str, settings: Mapping[str, Any]) -> Generator[Note]:
    """A place for the figures of a run.

    Args:
        config: where they go.
        run: its name.
        settings: what it was started with.

    Raises:
        TrainerError: what was configured is not installed.
    """
    with ExitStack() as stack:
        notes = [stack.enter_context(_tensorboard(Path(config.folder) / run))]
        if config.wandb_project:
            notes.append(stack.enter_context(_wandb(config, run, settings)))
        if config.mlflow_uri:
            notes.append(stack.enter_context(_mlflow(config, run, settings)))

        def note(name: str, value: float, step: int) -> None:
            for each in notes:
                each(name, value, step)

        yield note


@contextmanager
def _tensorboard(folder: Path) -> Generator[Note]:
    from torch.utils.tensorboard import SummaryWriter  # seconds to import

    writer: Any = SummaryWriter(str(folder))
    try:
        yield writer.add_scalar
    finally:
        writer.close()


@contextmanager
def _wandb(config: TrackingConfig, run: str, settings: Mapping[str, Any]) -> Generator[Note]:
    wandb = _library("wandb", "wandb_project")
    opened = wandb.init(
        project=config.wandb_project,
        name=run,
        config=dict(settings),
        dir=config.folder,
        mode=config.wandb_mode,
    )
    try:
        yield lambda name, value, step: opened.log({name: value, f"{name} step": step})
    finally:
        opened.finish()


@contextmanager
def _mlflow(config: TrackingConfig, run: str, settings: Mapping[str, Any]) -> Generator[Note]:
    mlflow = _library("mlflow", "mlflow_uri")
    mlflow.set_tracking_uri(config.mlflow_uri)
    with mlflow.start_run(run_name=run):
        mlflow.log_params(dict(settings))
        yield lambda name, value, step: mlflow.log_metric(name, value, step=step)


def _library(name: str, setting: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainerError(
            f"trainer.tracking.{setting} is set, but {name} is not installed: pip install {name}"
        ) from error
