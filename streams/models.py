"""The model in service: what the registry calls stable, loaded beside the one that runs.

A thread looks at the registry; a new bundle is fetched, checked and warmed there, and processors
take it up between two batches. A bundle that cannot be loaded is refused with its reason, and the
running model stays.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from model import bundle, encoder, registry
from model.bundle import Bundle
from model.exceptions import BundleError
from model.predict import Predictor, predictor, warm
from schemas.exceptions import StarcastError
from streams.config import ModelsConfig
from streams.metrics import Metrics

STOP_SECONDS = 5.0  # a bundle that is being fetched from a slow object store is left behind


@dataclass(frozen=True)
class Serving:
    """A predictor and the encoder whose vectors it reads."""

    predictor: Predictor
    bundle: Bundle | None
    encoder_folder: Path | None
    star_head: Path | None
    encoder_hash: str  # "" for none


class Models:
    """Follows the registry. Reading its properties never waits."""

    def __init__(self, config: ModelsConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._log = structlog.get_logger(__name__)
        self._stop = threading.Event()
        self._refused = ""
        if config.threads:
            torch.set_num_threads(config.threads)
        self._serving = self._ladder()
        self._tell()
        self._thread = threading.Thread(target=self._follow, name="models", daemon=True)

    def start(self) -> "Models":
        """Load what is stable now, then follow the registry."""
        self.refresh()
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    @property
    def serving(self) -> Serving:
        """What runs now; take it once a batch."""
        return self._serving

    def refresh(self) -> None:
        """Take up the registry's stable version, if it is another and can be loaded."""
        stable = None
        try:
            stable = registry.read(self._config.url).stable
            version = stable.version if stable else None
            running = self._serving.bundle.version if self._serving.bundle else None
            if version == running:
                return
            if stable is None:
                self._serving = self._ladder()
            elif stable.version != self._refused:
                loaded = bundle.load(self._config.url, stable.version, stable.sha256)
                self._serving = self._serve(loaded)
            else:
                return
            self._tell()
        except BundleError as error:
            self._refused = stable.version if stable else ""
            self._log.error(
                "bundle refused", reason=str(error), running=self._serving.predictor.version
            )
        except (StarcastError, OSError) as error:
            self._log.warning("registry not read", reason=str(error))

    def _follow(self) -> None:
        while not self._stop.wait(self._config.poll_seconds):
            self.refresh()

    def _tell(self) -> None:
        version = self._serving.predictor.version
        self._metrics.model.clear()
        self._metrics.model.labels(version).set(1)
        self._log.info("model in service", version=version)

    def _ladder(self) -> Serving:
        folder = encoder.locate(self._config.encoder)
        hash_ = encoder.setting_hash(self._config.encoder)
        return self._warmed(Serving(predictor(None), None, folder, None, hash_))

    def _serve(self, loaded: Bundle) -> Serving:
        return self._warmed(
            Serving(
                predictor(loaded, self._config.device),
                loaded,
                loaded.encoder_folder,
                loaded.star_head,
                loaded.encoder_hash or "",
            )
        )

    def _warmed(self, serving: Serving) -> Serving:
        warm(serving.predictor)
        return serving
