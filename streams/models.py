"""The models in service: what the registry calls stable and canary, loaded beside those that run.

A thread looks at the registry; a new bundle is fetched, checked and warmed there, and processors
take it up between two batches. A bundle that cannot be loaded is refused with its reason, and what
runs stays. A canary must read the vectors of stable's encoder: a batch reads those of one alone.

A stable version with another encoder than the one that runs waits until that has read the items'
texts: before, it would predict them as items without words. Texts are read by it meanwhile.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
import torch

from model import bundle, encoder, registry
from model import canary as trial
from model.bundle import Bundle
from model.canary import Canary, Part
from model.events import Rows
from model.exceptions import BundleError, TrialError
from model.lookups import Lookups
from model.predict import Predictions, Predictor, predictor, warm
from model.replay import Observation
from schemas.exceptions import StarcastError
from streams.config import ModelsConfig
from streams.exceptions import StoreError
from streams.metrics import Metrics

Coverage = Callable[[str, str], float]
"""Of two encoders, how much of what the first has read the second has, as `coverage.share`."""

TELL_SECONDS = 60.0  # between two lines that say how far a version that waits has come
COUNTED_VERSIONS = 10  # whose predictions metrics tell of: a new one each day must not add up
STOP_SECONDS = 5.0  # a bundle that is being fetched from a slow object store is left behind


@dataclass(frozen=True)
class Serving:
    """A predictor, the encoder whose vectors it reads, and the version on trial beside it."""

    predictor: Predictor
    bundle: Bundle | None
    encoder_folder: Path | None
    star_head: Path | None
    encoder_hash: str  # "" for none
    canary: Canary | None = None

    @property
    def shadow(self) -> Predictor | None:
        """What is to predict beside stable and to answer nobody."""
        return self.canary.predictor if self.canary and not self.canary.share else None


@dataclass
class _Coming:
    """A stable version that waits for the vectors of its encoder."""

    serving: Serving
    called: str  # when it is refused
    since: float  # of the monotonic clock, like the next
    told: float


class Models:
    """Follows the registry. Reading its properties never waits.

    `coverage` asks the store; without it no version waits for vectors.
    """

    def __init__(
        self, config: ModelsConfig, metrics: Metrics, coverage: Coverage | None = None
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._coverage = coverage
        self._coming: _Coming | None = None
        self._log = structlog.get_logger(__name__)
        self._stop = threading.Event()
        self._refused = set[str]()  # what cannot be served, told once
        self._counted: list[str] = []  # versions, the newest last
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

    @property
    def reading(self) -> Serving:
        """Whose encoder reads texts: stable's, also while it waits for vectors."""
        coming = self._coming
        return coming.serving if coming else self._serving

    def predict(
        self, serving: Serving, events: Rows, observation: Observation, lookups: Lookups
    ) -> list[Part]:
        """What answers EVENT rows (n): stable, and the canary for its users.

        A canary that cannot is refused: stable answers in its place.
        """
        stable, canary = serving.predictor, serving.canary
        try:
            return trial.predict(stable, canary, events, observation, lookups)
        except TrialError as error:
            self._end_trial(serving, error)
            return trial.predict(stable, None, events, observation, lookups)

    def predict_beside(
        self, serving: Serving, events: Rows, observation: Observation, lookups: Lookups
    ) -> Predictions | None:
        """What the shadow says of EVENT rows (n); None without one, or where it fails: then it is
        refused.
        """
        if serving.shadow is None:
            return None
        try:
            return trial.attempt(serving.shadow, events, observation, lookups)
        except TrialError as error:
            self._end_trial(serving, error)
            return None

    def refuse_encoder(self, serving: Serving, error: Exception) -> None:
        """Refuse a version that waits for vectors, since its encoder cannot be loaded.

        Only who reads texts loads it. The thread that follows the registry takes the version away;
        one that serves stays, and predicts without the words of new items.
        """
        coming = self._coming
        if coming is not None and coming.serving is serving:
            version = serving.predictor.version
            self._refuse(coming.called, f"the encoder of {version} cannot be loaded ({error})")

    def refresh(self) -> None:
        """Take up what the registry names, where it is another and can be loaded."""
        try:
            named = registry.read(self._config.url)
            self._metrics.promoted.set(named.stable.at.timestamp() if named.stable else 0)
            try:
                # Nobody waits to get away from a version: the vectors of before are there still.
                earlier = [] if named.rolled_back else registry.earlier(named)
                self._follow_stable(named.stable, earlier)
            finally:  # a trial ends, whatever keeps the new stable version from being read
                self._follow_canary(named.canary, named.tried_since)
        except (StarcastError, OSError) as error:
            self._log.warning("registry not read", reason=str(error))

    def _follow_stable(
        self, named: registry.Entry | None, earlier: Sequence[registry.Entry]
    ) -> None:
        running, coming = self._serving, self._coming
        if coming and (
            named is None
            or named.version != coming.serving.predictor.version
            or coming.called in self._refused
        ):
            coming = None
        if named is None:
            if running.bundle is not None:
                self._take_up(self._ladder())
        elif running.bundle is None or named.version != running.bundle.version:
            loaded = None if coming else self._load(named)
            made = None if loaded is None else self._serve(loaded, _named(named))
            if made is not None:
                coming = _Coming(made, _named(named), time.monotonic(), -math.inf)
                if running.bundle is None:
                    self._begin_with(earlier, coming.serving)
            if coming and not (earlier and self._waits(coming)):
                self._take_up(coming.serving)
                coming = None
        self._coming = coming
        if coming is None:
            self._metrics.covered.set(1)

    def _take_up(self, serving: Serving) -> None:
        running, canary = self._serving, self._serving.canary
        if canary is not None and (
            canary.predictor.version == serving.predictor.version
            or running.encoder_hash != serving.encoder_hash
        ):
            canary = None
        self._serving = replace(serving, canary=canary)
        self._tell()

    def _begin_with(self, earlier: Sequence[registry.Entry], stable: Serving) -> None:
        """A worker that starts while stable waits: serve what the others serve, if it is there.

        Versions before stable that have its encoder wait like it.
        """
        if self._coverage is None or not self._config.encoder_wait_seconds:
            return
        for before in earlier:
            used = bundle.encoder_of(self._config.url, before.version)
            if used != stable.encoder_hash:
                break
        else:
            return
        if not used or self._covered(used, stable) == 1:
            return
        try:
            loaded = bundle.load(self._config.url, before.version, before.sha256)
        except BundleError:
            return
        if (made := self._serve(loaded, _named(before))) is not None:
            self._take_up(made)

    def _waits(self, coming: _Coming) -> bool:
        """Whether a version is to wait for the vectors of its encoder."""
        used, now = self._serving.encoder_hash, time.monotonic()
        if self._serving.bundle is None or used in ("", coming.serving.encoder_hash):
            return False  # nothing serves, or nothing that reads other vectors
        covered = self._covered(used, coming.serving)
        self._metrics.covered.set(covered)
        said = {"version": coming.serving.predictor.version, "covered": round(covered, 4)}
        if covered == 1:
            return False
        if now - coming.since >= self._config.encoder_wait_seconds:
            self._log.warning(
                "not all items' vectors are there, and no version waits longer", **said
            )
            return False
        if now - coming.told >= TELL_SECONDS:
            coming.told = now
            self._log.info("a version waits for the vectors of its encoder", **said)
        return True

    def _covered(self, used: str, serving: Serving) -> float:
        if self._coverage is None or not serving.encoder_hash:
            return 1.0
        try:
            return self._coverage(used, serving.encoder_hash)
        except StoreError as error:
            self._log.warning("vectors not looked for", reason=str(error))
            return 0.0

    def _follow_canary(self, named: registry.Canary | None, since: datetime | None) -> None:
        stable, running = self._serving, self._serving.canary
        if named is None or named.version == stable.predictor.version:
            self._try(None)
        elif (
            running is not None
            and running.predictor.version == named.version
            and _pair(named.version, stable) not in self._refused
        ):
            self._try(replace(running, share=named.share, since=since))
        else:
            self._try(None)  # the one before has ended; stable answers until this one is warm
            found = self._fitting(named)
            self._try(None if found is None else Canary(found, named.share, since))

    def _try(self, canary: Canary | None) -> None:
        if canary != self._serving.canary:
            self._serving = replace(self._serving, canary=canary)
            self._tell()

    def _fitting(self, named: registry.Canary) -> Predictor | None:
        """A canary's predictor, warmed; None if it cannot be served beside what is stable now."""
        stable, used = self._serving.predictor.version, self._serving.encoder_hash
        pair = _pair(named.version, self._serving)
        loaded = None if pair in self._refused else self._load(named)
        if loaded is None:
            return None
        if (loaded.encoder_hash or "") != used:
            reason = (
                f"{named.version} has another encoder ({loaded.encoder_hash or 'none'}) than "
                f"{stable} ({used or 'none'}), beside which it is to be tried: a batch reads the "
                "vectors of one. Stable answers its users"
            )
            self._refuse(pair, reason)
            return None
        made = self._serve(loaded, pair)
        return None if made is None else made.predictor

    def _end_trial(self, serving: Serving, error: TrialError) -> None:
        """Refuse what is on trial; the thread that follows the registry takes it away."""
        assert serving.canary is not None  # which failed
        version = serving.canary.predictor.version
        reason = f"{version} on trial cannot predict ({error}). Stable answers its users"
        self._refuse(_pair(version, serving), reason)

    def _load(self, named: registry.Entry) -> Bundle | None:
        """A bundle; None for one that is refused."""
        if _named(named) in self._refused:
            return None
        try:
            return bundle.load(self._config.url, named.version, named.sha256)
        except BundleError as error:
            self._refuse(_named(named), str(error))
            return None

    def _refuse(self, what: str, reason: str) -> None:
        if what not in self._refused:
            self._refused.add(what)
            self._log.error(
                "bundle refused", reason=reason, running=self._serving.predictor.version
            )

    def _follow(self) -> None:
        while not self._stop.wait(self._config.poll_seconds):
            try:
                self.refresh()
            except Exception:  # noqa: BLE001 - a bug: told, and no reason never to look again
                self._log.exception("registry not followed")

    def _tell(self) -> None:
        version, canary = self._serving.predictor.version, self._serving.canary
        self._metrics.model.clear()
        self._metrics.model.labels(version).set(1)
        self._metrics.canary.clear()
        said: dict[str, Any] = {}
        if canary is not None:
            said = {"canary": canary.predictor.version, "share": canary.share}
            self._metrics.canary.labels(canary.predictor.version).set(canary.share)
        self._count([version, *([canary.predictor.version] if canary else [])])
        self._log.info("model in service", version=version, **said)

    def _count(self, versions: Sequence[str]) -> None:
        """Metrics go on to tell of what these predict, and no longer of the oldest's."""
        kept = [each for each in self._counted if each not in versions] + [*versions]
        self._counted = kept[-COUNTED_VERSIONS:]
        for version in kept[:-COUNTED_VERSIONS]:
            self._metrics.predictions.remove_by_labels({"model_version": version})

    def _ladder(self) -> Serving:
        folder = encoder.locate(self._config.encoder)
        hash_ = encoder.setting_hash(self._config.encoder)
        return self._warmed(Serving(predictor(None), None, folder, None, hash_))

    def _serve(self, loaded: Bundle, called: str) -> Serving | None:
        """A bundle made ready; None for one that is refused, as what does not fit on a device.

        `called`: what then is refused.
        """
        try:
            return self._warmed(
                Serving(
                    predictor(loaded, self._config.device),
                    loaded,
                    loaded.encoder_folder,
                    loaded.star_head,
                    loaded.encoder_hash or "",
                )
            )
        except Exception as error:  # noqa: BLE001 - of torch: what runs goes on, whatever it is
            reason = f"{loaded.version} cannot be made ready ({type(error).__name__}: {error})"
            self._refuse(called, reason)
            return None

    def _warmed(self, serving: Serving) -> Serving:
        warm(serving.predictor)
        return serving


def _named(entry: registry.Entry) -> str:
    """Names a version that is refused: until it is put in its place again, mended perhaps."""
    return f"{entry.version} since {entry.at}"


def _pair(version: str, stable: Serving) -> str:
    """Names what is refused of a version on trial: beside this encoder's vectors alone."""
    return f"{version} beside {stable.encoder_hash}"
