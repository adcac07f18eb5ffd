"""What is served where nothing else is said: the packaged encoder, and the default bundle.

That bundle is what `trainer.train` writes on the generated shop, the encoder as it came.
"""

from hashlib import sha256
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from model import encoder, registry
from model.bundle import FORMAT
from model.features import FEATURE_HASH
from schemas.exceptions import StarcastError
from schemas.files import write_records
from starcast.shop import shop

CACHE = Path(".cache/bench")


def packaged_encoder() -> Path:
    """The packaged text encoder's folder; raises StarcastError where it is not installed."""
    folder = encoder.locate("auto")
    if folder is None:
        raise StarcastError("The packaged text encoder is not installed; run: make setup")
    return folder


def default_models(console: Console) -> str:
    """The URL of a registry whose stable version is the default bundle; made once and kept."""
    # Here, since the workers that this module is loaded into have no trainer in memory.
    from trainer.config import TextConfig, TrainerConfig

    settings = TrainerConfig(text=TextConfig(method="frozen"))  # fine-tuning changes no speed
    made_by = f"{FORMAT} {FEATURE_HASH} {settings.model_dump_json()}"
    digest = sha256(made_by.encode()).hexdigest()
    url = str(CACHE / f"models-{digest[:8]}")
    if registry.read(url).stable is None:
        from trainer.data import from_file
        from trainer.train import train

        sample = CACHE / "shop.jsonl.gz"
        write_records(sample, shop())
        with Progress(console=console) as progress:
            trained = train(
                from_file(sample), url, settings, progress=progress, source="the generated shop"
            )
        registry.promote(url, trained.version, trained.sha256, "bench", "default settings")
    return url
