"""Figures of a fit while it goes on: TensorBoard files always, others where they are configured.

Weights & Biases and MLflow are not among our requirements: who names a project or a URI installs
them. Without a network, Weights & Biases writes what `wandb sync` sends later.

A place that cannot be opened ends a fit before it begins. One that fails later, as by a full disk
or a server that went away, gets no more figures: hours of a fit are worth more.
"""

import importlib
import logging
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trainer.config import TrackingConfig
from trainer.exceptions import TrainerError

logger = logging.getLogger(__name__)

_RUN = re.compile(r"\d{8}T\d{6}")  # when a training began

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
        TrainerError: what was configured is not installed, or cannot be opened.
    """
    places = {"TensorBoard": _tensorboard(Path(config.folder) / run)}
    if config.wandb_project:
        places["Weights & Biases"] = _wandb(config, run, settings)
    if config.mlflow_uri:
        places["MLflow"] = _mlflow(config, run, settings)
    with ExitStack() as stack:
        notes = [stack.enter_context(_spared(name, place)) for name, place in places.items()]

        def note(name: str, value: float, step: int) -> None:
            for each in notes:
                each(name, value, step)

        yield note


def prune(config: TrackingConfig, keep: int) -> None:
    """Delete TensorBoard's folders of all trainings but the newest `keep`."""
    runs = (folder for folder in Path(config.folder).glob("*") if _RUN.fullmatch(folder.name))
    for old in sorted(runs)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # another process was faster


@contextmanager
def _spared(name: str, place: AbstractContextManager[Note]) -> Generator[Note]:
    """A place whose failures a fit does not see."""
    try:
        told = place.__enter__()
    except TrainerError:
        raise
    except Exception as error:  # each library raises its own
        raise TrainerError(f"{name} takes no figures: {error}; see trainer.tracking") from error
    failed = False

    def fail(error: Exception) -> None:
        nonlocal failed
        if not failed:
            logger.warning("%s takes no more figures, the fit goes on: %s", name, error)
        failed = True

    def note(figure: str, value: float, step: int) -> None:
        if not failed:
            try:
                told(figure, value, step)
            except Exception as error:  # noqa: BLE001 - each library raises its own
                fail(error)

    ended: BaseException | None = None
    try:
        yield note
    except BaseException as error:
        ended = error
        raise
    finally:
        try:
            place.__exit__(type(ended) if ended else None, ended, None)
        except Exception as error:  # noqa: BLE001 - each library raises its own
            fail(error)


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
