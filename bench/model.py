"""The default bundle: what `trainer.train` writes on the generated shop, the encoder as it came."""

from hashlib import sha256
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from model import registry
from model.bundle import FORMAT
from model.features import FEATURE_HASH
from schemas.files import write_records
from starcast.shop import shop

CACHE = Path(".cache/bench")


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
