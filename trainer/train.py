"""One training: from a history of events to a bundle, judged and reported."""

import logging
import math
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from model import bundle as bundles
from model import device as devices
from model import encoder as encoders
from model import storage
from model.bundle import Bundle
from model.calibration import Calibration
from model.card import ModelCard
from model.encoder import StarHead, TextEncoder
from model.network import FusedNetwork, network_config
from trainer import checkpoints, drift, fit, gate, report, text
from trainer.assess import Assessment, Compared, bundle_encoder, compare
from trainer.calibrate import fit_calibration
from trainer.clean import Cleaned
from trainer.config import TrainerConfig
from trainer.data import Log
from trainer.exceptions import TrainerError
from trainer.fine_tune import is_first
from trainer.fit import Fitted
from trainer.gate import Verdict
from trainer.metrics import Floats
from trainer.models import baselines, outputs, predict
from trainer.prepare import (
    Prepared,
    cleaned,
    item_vectors,
    prepared,
    review_texts,
    unrated_texts,
)
from trainer.progress import tracker
from trainer.split import by_time
from trainer.text import TextModel
from trainer.tracking import Note, tracking, unnoted

logger = logging.getLogger(__name__)

_LIMITS = (
    "Measured on the newest rows of the shop it was fitted on; another shop needs its own fit.",
    "Learnt from those who chose to rate; it says nothing of those who did not.",
    "Not meant for decisions about people.",
)
_WANTED = "give what `starcast evaluate --json` writes without --model"


@dataclass(frozen=True)
class TrainResult(Assessment):
    """What a training made and how it was judged; nothing is promoted yet."""

    version: str
    sha256: str
    report: str  # where the HTML report lies
    verdict: Verdict
    claims: tuple[str, ...]  # baselines that it claims to beat
    seconds: float


def train(
    log: Log,
    models_url: str,
    config: TrainerConfig | None = None,
    *,
    encoder: str = "auto",
    stable: Bundle | None = None,
    other: Bundle | None = None,
    evaluated: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    source: str = "a record file",
) -> TrainResult:
    """Clean, split, fit, calibrate, evaluate, judge; write the bundle and its report.

    What is judged was fitted without the newest rows. The bundle's network is then fitted once
    more with all of them (`fit.refit`), with what was chosen before.

    Args:
        log: the history to learn from.
        models_url: the models folder.
        config: settings; the defaults when absent.
        encoder: as `models.encoder`; with `auto` the stable bundle's encoder is kept.
        stable: the model in service, which the new one must not be worse than. It is started from
            where it cannot have seen the rows that choose and judge.
        other: another shop's model to start from; with `auto` its encoder is taken too.
        evaluated: the document of an evaluation, whose figures stand in the model card.
        progress: where bars are shown.
        source: words that name the data in the model card.

    Raises:
        TrainerError: too few rated rows; `evaluated` is of one model alone.
        EncoderError: the encoder cannot be loaded.
        UnreachableError: the models folder cannot be written.
    """
    begun = time.monotonic()
    config = config or TrainerConfig()
    told = _evaluated(evaluated or {})
    if config.threads:
        torch.set_num_threads(config.threads)
    found = cleaned(log, config)
    with storage.locate(models_url).making():
        pass  # where nothing can be written, no hours of work are lost
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    with (
        tempfile.TemporaryDirectory(prefix="starcast-encoder-") as folder,
        # Processes that fit together have the same to tell.
        tracking(config.tracking, run, config.model_dump(mode="json", exclude={"tracking"}))
        if is_first()
        else nullcontext(unnoted) as note,
    ):
        base = base_encoder(encoder, other or stable, config)
        served = stable is not None and stable.encoder_folder is not None
        kept = encoder == "auto" and other is None and served
        config = config.model_copy(update={"text": text.settled(config.text, kept)})
        place = Path(folder) / "encoder"
        texts, checkpoint = _text_model(base, log, found, config, place, progress, note)
        used = texts.encoder if texts else base
        data = _replayed(log, found, used, config, progress)
        start = _start(stable, other, data)
        fitted, calibration = fit_network(
            data,
            config,
            progress,
            lambda epoch, error: note("rating/validation_rmse", error, epoch),
            start,
        )
        ours = predict(fitted.network, calibration, data.examples.take(data.split.test))
        compared = compare(data, ours, config)
        tested = data.examples.events["time"][data.split.test]
        claims = _claims(fitted, calibration, data, config)
        verdict = gate.judge(
            compared.rating,
            compared.ours.rating,
            _stable_ratings(log, found, stable, used, data, config, progress),
            tested > fitted_until(stable),
            compared.rivals,
            claims,
            compared.calibration,
            lambda: gate.by_chance(
                ours.distribution, ours.low, ours.high, config.gate, config.seed
            ),
            config.gate,
            config.seed,
        )
        network = fitted.network
        if config.fit.refit:
            everything = np.concatenate([data.split.train, data.split.validation, data.split.test])
            network = refit_network(fitted, data, everything, config, progress, start)
        rows = _rows(log, data, texts)
        settings = _settings(fitted, texts, config)
        written = bundles.write(
            models_url,
            network=network,
            calibration=calibration,
            metrics=_metrics(compared, texts, claims, verdict, rows, data),
            card=_card(source, data.window(), rows, settings, compared, verdict, told),
            encoder=used.folder if used else None,
            star_head=texts.head if texts else _kept_head(used, stable),
        )
        if checkpoint is not None and is_first():
            checkpoints.drop(checkpoint)
    read = texts.scores if texts else None
    facts = _facts(source, data, rows, settings)
    page = report.render(written.version, facts, found.steps, compared, tested, read, verdict)
    reports = f"{models_url.rstrip('/')}/{bundles.REPORTS}"
    storage.locate(reports).replace(f"{written.version}.html", page.encode())
    return TrainResult(
        evaluations=compared.evaluations,
        calibration=compared.calibration,
        text=read,
        steps=found.steps,
        rows=rows,
        version=written.version,
        sha256=written.sha256,
        report=f"{reports}/{written.version}.html",
        verdict=verdict,
        claims=claims,
        seconds=time.monotonic() - begun,
    )


def base_encoder(setting: str, stable: Bundle | None, config: TrainerConfig) -> TextEncoder | None:
    """The encoder to start from: stable's, unless the setting names another."""
    if setting == "auto" and stable is not None and stable.encoder_folder is not None:
        return bundle_encoder(stable, config)
    folder = encoders.locate(setting)
    if folder is None:
        return None
    return encoders.load(folder, config.device)


def _text_model(
    encoder: TextEncoder | None,
    log: Log,
    found: Cleaned,
    config: TrainerConfig,
    folder: Path,
    progress: Progress | None,
    note: Note,
) -> tuple[TextModel | None, Path | None]:
    """A star head with the encoder it reads by, and the folder of its checkpoints.

    Neither without an encoder or with too few texts, nor where settings want none. An encoder,
    whose vectors of items the network reads, does not learn from the rows that judge both.
    """
    settings, seed = config.text, config.seed
    if encoder is None or settings.method == "none":
        return None, None
    alone = settings.method == "frozen"
    held = by_time(log.events["time"][found.reviews["row"].to_numpy()], config.split).test
    texts = review_texts(found.reviews, settings, config.split, None if alone else held)
    if texts is None and not alone:
        settings = text.untouched(settings)
        texts = review_texts(found.reviews, settings, config.split)
        if texts is not None:
            logger.warning(
                "too few review texts are older than the rows that judge the model: the star head "
                "is fitted, the encoder is not"
            )
    if texts is None:
        return None, None
    texts = replace(texts, unrated=unrated_texts(log, settings))
    checkpoint = text.checkpoint_of(Path(config.checkpoints), texts, encoder, settings, seed)
    bar = tracker(progress, "reading review texts")
    return text.fit(texts, encoder, settings, folder, seed, bar, checkpoint, note), checkpoint


def _replayed(
    log: Log,
    found: Cleaned,
    encoder: TextEncoder | None,
    config: TrainerConfig,
    progress: Progress | None,
) -> Prepared:
    vectors = item_vectors(log, encoder, tracker(progress, "encoding item texts"))
    words = tracker(progress, "replaying events")
    return prepared(log, found.reviews, vectors, encoder.hash if encoder else "", config, words)


def fit_network(
    data: Prepared,
    config: TrainerConfig,
    progress: Progress | None,
    on_epoch: fit.OnEpoch = lambda epoch, error: None,
    start: fit.Start | None = None,
) -> tuple[Fitted, Calibration]:
    """Fit on train, choose and calibrate on validation."""
    examples, split = data.examples, data.split
    sizes = config.fit.sizes.model_dump()
    sized = network_config(vector=examples.inputs.vectors.shape[1], **sizes)
    bar = tracker(progress, "fitting the network")

    def told(epoch: int, error: float) -> None:
        bar(epoch, config.fit.epochs)
        on_epoch(epoch, error)

    fitted = fit.fit(
        sized,
        examples.inputs,
        examples.rating,
        split.train,
        split.validation,
        config.fit,
        config.seed,
        devices.find(config.device),
        told,
        start,
    )
    bar(config.fit.epochs, config.fit.epochs)
    mean, logits = outputs(fitted.network, examples.take(split.validation))
    return fitted, fit_calibration(mean, logits, examples.rating[split.validation])


def refit_network(
    fitted: Fitted,
    data: Prepared,
    rows: NDArray[np.int64],
    config: TrainerConfig,
    progress: Progress | None,
    start: fit.Start | None = None,
) -> FusedNetwork:
    """The same fit on these rows, with what was chosen."""
    bar = tracker(progress, "fitting once more")
    network = fit.refit(
        fitted,
        data.examples.inputs,
        data.examples.rating,
        rows,
        config.fit,
        config.seed,
        devices.find(config.device),
        lambda epoch, _: bar(epoch, fitted.epochs),
        start,
    )
    bar(1, 1)
    return network


def _start(stable: Bundle | None, other: Bundle | None, data: Prepared) -> fit.Start | None:
    """What to start from: another shop's model, or stable where its rows ended early enough."""
    if other is not None:
        return fit.Start(other.network, same_shop=False)
    validation = data.examples.events["time"][data.split.validation]
    if stable is None or fitted_until(stable) >= validation.min():
        return None
    return fit.Start(stable.network, same_shop=True)


def fitted_until(stable: Bundle | None) -> float:
    """Milliseconds since the epoch of the newest row that a bundle was fitted to, as it knows."""
    if stable is None or "window" not in stable.metrics:
        return math.inf
    return datetime.fromisoformat(stable.metrics["window"][1]).timestamp() * 1e3


def _claims(
    fitted: Fitted, calibration: Calibration, data: Prepared, config: TrainerConfig
) -> tuple[str, ...]:
    """The baselines that the candidate beats significantly on its validation rows."""
    newest = data.examples.take(data.split.validation)
    ours = predict(fitted.network, calibration, newest)
    rivals = baselines(data.examples, data.split, newest, config)
    return gate.claims(newest.rating, ours.rating, rivals, config.gate, config.seed)


def _stable_ratings(
    log: Log,
    found: Cleaned,
    stable: Bundle | None,
    encoder: TextEncoder | None,
    data: Prepared,
    config: TrainerConfig,
    progress: Progress | None,
) -> Floats | None:
    """What the model in service says of the newest rows, with its own encoder's vectors.

    None where it says no number: workers refuse it.
    """
    if stable is None:
        return None
    if stable.encoder_hash not in (None, encoder.hash if encoder else None):
        data = _replayed(log, found, bundle_encoder(stable, config), config, progress)
    ours = predict(stable.network, stable.calibration, data.examples.take(data.split.test)).rating
    if not np.isfinite(ours).all():
        logger.warning("%s is left out of the comparison: it predicts no numbers", stable.version)
        return None
    return ours


def _rows(log: Log, data: Prepared, texts: TextModel | None) -> dict[str, int]:
    split = data.split
    return {
        "events": len(log),
        "rated": log.rated,
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "review texts": texts.texts if texts else 0,
    }


def _settings(fitted: Fitted, texts: TextModel | None, config: TrainerConfig) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "ridge penalty": fitted.penalty,
        "network epochs": fitted.epochs,
        "belief in the network": round(fitted.belief, 3),
        "star head": f"{texts.method}, l2 {texts.l2:g}" if texts else "as before, or none",
        "trees": fitted.network.config.trees,
        "shares of network and trees": " and ".join(f"{each:.2f}" for each in fitted.shares),
        "weights started from": ", ".join(
            f"{count:,} of {part}" for part, count in fitted.carried.items()
        )
        or "none",
        "fitted once more on all rows": config.fit.refit,
    }


def _facts(
    source: str, data: Prepared, rows: Mapping[str, int], settings: Mapping[str, Any]
) -> dict[str, str]:
    """What the report says that was learnt from, and how."""
    return {
        "data": source,
        "window": " to ".join(f"{moment:%Y-%m-%d %H:%M}" for moment in data.window()),
        **{f"rows: {name}": f"{count:,}" for name, count in rows.items()},
        **{name: str(value) for name, value in settings.items()},
    }


def _metrics(
    compared: Compared,
    texts: TextModel | None,
    claims: tuple[str, ...],
    verdict: Verdict,
    rows: dict[str, int],
    data: Prepared,
) -> dict[str, Any]:
    """What `metrics.json` holds."""
    features = data.examples.inputs.features[data.split.test]
    metrics = {
        "rating": {name: asdict(found) for name, found in compared.evaluations.items()},
        "calibration": asdict(compared.calibration),
        "text": asdict(texts.scores) if texts else None,
        "claims": list(claims),
        "gate": asdict(verdict),
        "rows": rows,
        "window": [moment.isoformat() for moment in data.window()],
        "drift": drift.reference(features, compared.ours.rating, compared.rating).model_dump(),
    }
    return cast(dict[str, Any], _finite(metrics))


def _card(
    source: str,
    window: tuple[datetime, datetime],
    rows: dict[str, int],
    settings: dict[str, Any],
    compared: Compared,
    verdict: Verdict,
    evaluated: Mapping[str, Any],
) -> ModelCard:
    return ModelCard(
        data=source,
        data_from=window[0],
        data_to=window[1],
        rows=rows,
        settings=settings,
        metrics={
            name: {"RMSE": found.all.rmse, "MSE": found.all.mse, "MAE": found.all.mae}
            | {
                f"RMSE, history {bucket}": each.rmse
                for bucket, each in found.buckets.items()
                if each.rows
            }
            for name, found in compared.evaluations.items()
        },
        calibration={
            "Calibration error": compared.calibration.ece,
            "Share of ratings in 80% intervals": compared.calibration.coverage,
        },
        **evaluated,
        limits=list(_LIMITS),
        notes=f"Gate: {verdict.reason}",
    )


def _evaluated(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a model card tells of an evaluation: `peers` and `ablations`."""
    if not document:
        return {}
    rating = document.get("rating")
    prequential = cast(Any, rating).get("prequential") if isinstance(rating, dict) else None
    if prequential is None or "model" in document:
        raise TrainerError(f"the evaluation is of a bundle, or of nothing: {_WANTED}")
    try:
        return {
            "peers": {
                name: {measure.upper(): float(each[measure]) for measure in ("rmse", "mse", "mae")}
                for name, each in sorted(prequential.items(), key=lambda found: found[1]["rmse"])
            },
            "ablations": {
                part: {"RMSE": float(each["rmse"])}
                | ({"squared error more": float(each["cost"]["mean"])} if each["cost"] else {})
                for part, each in document.get("ablations", {}).items()
            },
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise TrainerError(f"the evaluation lacks figures of a model or part: {_WANTED}") from error


def _kept_head(encoder: TextEncoder | None, stable: Bundle | None) -> StarHead | None:
    """Stable's star head, when it reads the vectors of the same encoder."""
    same = encoder is not None and stable is not None and stable.encoder_hash == encoder.hash
    return encoder.star_head if same and encoder is not None else None


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a number that is none becomes null."""
    if isinstance(value, dict):
        return {key: _finite(cell) for key, cell in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_finite(cell) for cell in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
