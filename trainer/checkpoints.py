"""Where the fit of an encoder that was killed goes on: a file a fit, until its model is written."""

import hashlib
import time
from contextlib import suppress
from pathlib import Path

import orjson

from model.encoder import TextEncoder
from trainer.config import TextConfig
from trainer.text import ReviewTexts

STALE_SECONDS = 86_400.0  # what killed fits leave, hundreds of megabytes each, would fill the disk
_FORMAT = 1  # of the checkpoints; what another release wrote is another fit's


def of_fit(
    root: Path, reviews: ReviewTexts, encoder: TextEncoder, config: TextConfig, seed: int
) -> Path:
    """The checkpoint of one fit: of the same texts, encoder and settings it is the same.

    Deletes those that fits which nobody took up again have left in `root`.
    """
    settings = config.model_dump(mode="json")
    digest = hashlib.sha256(orjson.dumps([_FORMAT, encoder.hash, settings, seed]))
    digest.update(orjson.dumps([reviews.texts, reviews.unrated]))
    digest.update(reviews.rating.tobytes() + reviews.span.tobytes())
    found = root / f"{digest.hexdigest()[:16]}.checkpoint"
    for other in root.glob("*"):
        with suppress(FileNotFoundError):  # another process deletes them too
            if other != found and time.time() - other.stat().st_mtime > STALE_SECONDS:
                other.unlink()
    return found
