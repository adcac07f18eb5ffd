"""Where a fit that was killed goes on: a file for each, there until its result is safe."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import torch

from trainer.exceptions import TrainerError

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0  # a kill costs no more work than this, and a step
STALE_SECONDS = 86_400.0  # what killed fits leave, hundreds of megabytes each, would fill the disk
_FORMAT = 1  # what another release wrote is another fit's


def named(root: Path, about: Sequence[Any]) -> Path:
    """The file of one fit in `root`: of the same texts, encoder and settings it is the same.

    Deletes those that fits which nobody took up again have left there.
    """
    told = orjson.dumps([_FORMAT, *about], option=orjson.OPT_SERIALIZE_NUMPY)
    found = root / f"{hashlib.sha256(told).hexdigest()[:16]}.checkpoint"
    for other in root.glob("*"):
        with suppress(FileNotFoundError):  # another process deletes them too
            if other != found and time.time() - other.stat().st_mtime > STALE_SECONDS:
                other.unlink()
    return found


def save(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write what a fit goes on from, in whole or not at all; where it cannot, say so."""
    part = checkpoint.with_suffix(".part")
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), part)
        part.replace(checkpoint)
    except (OSError, RuntimeError) as error:  # a full disk, which may have room again later
        logger.warning("no checkpoint was written, the fit goes on: %s: %s", checkpoint, error)
        with suppress(OSError):
            part.unlink()


def load(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """What `save` wrote; raises TrainerError where it cannot be read."""
    try:
        return torch.load(checkpoint, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds; a machine that fell may leave a half
        raise TrainerError(
            f"{checkpoint} cannot be read; delete it to begin anew: {error}"
        ) from error


def drop(checkpoint: Path) -> None:
    """Delete it, and what belongs to it: the result is safe."""
    for each in checkpoint.parent.glob(f"{checkpoint.stem}*"):
        each.unlink(missing_ok=True)
