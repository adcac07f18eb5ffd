"""A model at rest: an immutable directory, complete or not there, checked whenever it is loaded.

    20261124T101500-1a2b3c4d/
        manifest.json            hashes of features and encoder, sum and size of each file
        network.json             sizes of the fused network
        network.safetensors      its weights
        features.json            the feature table that it was fitted on
        calibration.json
        metrics.json
        MODEL_CARD.md
        star_head.safetensors    from the encoder's vectors to stars; with an encoder only
        encoder/                 Hugging Face form, with its projection; may be absent

Nothing in it is pickled, and a directory that holds a pickle is refused.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, RootModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from model import card as cards
from model import encoder as encoders
from model import registry, storage
from model.calibration import Calibration
from model.encoder import StarHead
from model.exceptions import BundleError
from model.features import FEATURE_HASH, FEATURES
from model.network import FusedNetwork, NetworkConfig

FORMAT = 4
MANIFEST = "manifest.json"
ENCODER = "encoder"
REPORTS = "reports"  # beside the bundles, an HTML page a version
_CACHED = 8  # versions

_VERSION = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}

M = TypeVar("M", bound=BaseModel)


class File(BaseModel):
    """A file of a bundle, as its manifest knows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    size: int


class Manifest(BaseModel):
    """What `manifest.json` holds."""

    model_config = ConfigDict(frozen=True)

    format: int
    version: str
    created_at: datetime
    feature_hash: str
    encoder_hash: str | None
    files: dict[str, File]


@dataclass(frozen=True)
class Written:
    """A bundle that has been written."""

    version: str
    sha256: str  # of its manifest, which holds the sums of all other files


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been checked and loaded; its encoder is only loaded by who encodes."""

    version: str
    sha256: str
    folder: Path
    network: FusedNetwork  # for predicting, on the CPU
    calibration: Calibration
    metrics: dict[str, Any]
    encoder_hash: str | None
    encoder_folder: Path | None
    star_head: Path | None


def write(
    models_url: str,
    *,
    network: FusedNetwork,
    calibration: Calibration,
    metrics: Mapping[str, Any],
    card: cards.ModelCard,
    encoder: Path | None = None,
    star_head: StarHead | None = None,
) -> Written:
    """Write a bundle under `models_url`; it appears there whole, under a new version's name.

    `encoder`: a Hugging Face directory that is copied as it is, so that its hash stays.
    """
    target = storage.locate(models_url)
    now = datetime.now(UTC)
    with target.making() as temporary:
        folder = temporary / "bundle"
        folder.mkdir()
        encoder_hash = _copy_encoder(encoder, folder / ENCODER) if encoder else None
        if star_head is not None:
            encoders.write_star_head(folder / encoders.STAR_HEAD, star_head)
        weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
        (folder / "network.safetensors").write_bytes(save_tensors(weights))
        texts = {
            "network.json": network.config.model_dump_json(indent=2),
            "features.json": json.dumps([asdict(feature) for feature in FEATURES], indent=2),
            "calibration.json": calibration.model_dump_json(indent=2),
            "metrics.json": json.dumps(metrics, indent=2, sort_keys=True),
        }
        for name, text in texts.items():
            (folder / name).write_text(text + "\n", "utf-8")
        files = {name: _sum(folder / name) for name in _names(folder)}
        content = "".join(f"{name} {file.sha256}\n" for name, file in files.items())
        version = f"{now:%Y%m%dT%H%M%S}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        (folder / "MODEL_CARD.md").write_text(cards.markdown(card, version, encoder_hash), "utf-8")
        files["MODEL_CARD.md"] = _sum(folder / "MODEL_CARD.md")
        manifest = Manifest(
            format=FORMAT,
            version=version,
            created_at=now,
            feature_hash=FEATURE_HASH,
            encoder_hash=encoder_hash,
            files=files,
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")
        sha256 = _sum(folder / MANIFEST).sha256
        if target.local:
            storage.settle(folder)
            folder.rename(target.local / version)
        else:
            target.upload(folder, version, last=MANIFEST)
    return Written(version, sha256)


def load(
    models_url: str, version: str, sha256: str | None = None, cache: Path | None = None
) -> Bundle:
    """Check and load a version under `models_url`.

    From an object store it is copied to `cache` first (default: `starcast` in the user's cache
    folder), where the few that were loaded last are kept, and a damaged copy is replaced. `sha256`:
    of the manifest, as the registry states it. Raises BundleError.
    """
    if not _VERSION.fullmatch(version):
        raise BundleError(f"{version!r} is no version's name, such as 20261124T101500-1a2b3c4d")
    source = storage.locate(models_url)
    if source.local:
        return _named(open_folder(source.local / version, sha256), version)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "starcast"
    folder = cache / version
    with suppress(OSError):  # of who may only read there
        os.utime(folder)  # when it was loaded last
    try:
        return _named(open_folder(folder, sha256), version)
    except (BundleError, OSError):  # not there, or damaged since
        _fetch(source, version, sha256, cache)
    return _named(open_folder(folder, sha256), version)


def _fetch(source: storage.Storage, version: str, sha256: str | None, cache: Path) -> None:
    """Copy a version to the cache, in place of a damaged copy."""
    folder = cache / version
    cache.mkdir(parents=True, exist_ok=True)
    with storage.beside(cache) as temporary:
        copy = temporary / "bundle"
        source.download(version, copy)
        try:
            _named(open_folder(copy, sha256), version)  # before others see it
        except BundleError as error:  # told where it lies: the copy is gone in a moment
            place = f"{source.url}/{version}"
            raise BundleError(str(error).replace(str(copy), place)) from error
        if not _is_whole(folder, sha256):
            with suppress(OSError):  # there is none, or another process was faster
                folder.rename(temporary / "damaged")
            with suppress(OSError):  # another was: its copy is as good
                copy.rename(folder)
    _make_room(cache)


def _is_whole(folder: Path, sha256: str | None) -> bool:
    try:
        return _checked(folder, sha256).version == folder.name
    except (BundleError, OSError):
        return False


def _named(bundle: Bundle, version: str) -> Bundle:
    """The bundle; raises BundleError where it is another version than its folder's name says."""
    if bundle.version != version:
        raise BundleError(f"{bundle.folder} holds {bundle.version!r}: name it so again")
    return bundle


def _make_room(cache: Path) -> None:
    """Remove all versions but those that were loaded last."""
    kept = [path for path in cache.iterdir() if _VERSION.fullmatch(path.name)]
    with suppress(OSError):  # another process was faster
        for old in sorted(kept, key=lambda path: path.stat().st_mtime)[:-_CACHED]:
            with storage.beside(cache) as temporary:
                old.rename(temporary / old.name)  # so that nobody sees half of it


def encoder_of(models_url: str, version: str) -> str | None:
    """The hash of a version's encoder, as its manifest has it; None without one or a manifest."""
    content = storage.locate(models_url).read(f"{version}/{MANIFEST}")
    try:
        return Manifest.model_validate_json(content).encoder_hash if content else None
    except ValidationError:
        return None  # of a release that wrote others


def versions(models_url: str) -> list[str]:
    """Versions under `models_url` that are there whole, oldest first."""
    folder = storage.locate(models_url)
    names = [name for name in folder.folders() if _VERSION.fullmatch(name)]
    return [name for name in names if folder.read(f"{name}/{MANIFEST}") is not None]


def prune(models_url: str, keep: int) -> list[str]:
    """Delete all versions, and their reports, but the newest `keep`, those that the registry names,
    and as many of those that were stable before, for a rollback.

    Returns what was deleted, oldest first. What is newer than the oldest of the newest stays also
    where it is not whole: it may be on its way.
    """
    folder, now = storage.locate(models_url), registry.read(models_url)
    newest = versions(models_url)[-keep:]
    used = [now.stable, now.canary, *registry.earlier(now)[:keep]]
    kept = {*newest, *(entry.version for entry in used if entry is not None)}
    old = [
        name
        for name in folder.folders()
        if _VERSION.fullmatch(name) and name < min(newest, default="") and name not in kept
    ]
    for name in old:
        folder.remove(name, first=MANIFEST)
        folder.remove(f"{REPORTS}/{name}.html")
    return old


def open_folder(folder: Path, sha256: str | None = None) -> Bundle:
    """Check and load the bundle in a local directory; raises BundleError saying what is wrong."""
    manifest = _checked(folder, sha256)
    config = _parsed(folder / "network.json", NetworkConfig)
    try:
        weights = load_tensors((folder / "network.safetensors").read_bytes())
        with torch.device("meta"):  # no memory for weights that are replaced
            network = FusedNetwork(config)
        network.load_state_dict(weights, assign=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"{folder}: its weights do not fit its network: {reason}") from error
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BundleError(f"{folder}: the weights {broken[0]} are not finite; train again")
    star_head = folder / encoders.STAR_HEAD
    return Bundle(
        version=manifest.version,
        sha256=_sum(folder / MANIFEST).sha256,
        folder=folder,
        network=network.eval(),
        calibration=_parsed(folder / "calibration.json", Calibration),
        metrics=_parsed(folder / "metrics.json", RootModel[dict[str, Any]]).root,
        encoder_hash=manifest.encoder_hash,
        encoder_folder=folder / ENCODER if manifest.encoder_hash else None,
        star_head=star_head if star_head.exists() else None,
    )


def _checked(folder: Path, sha256: str | None) -> Manifest:
    """The manifest, when every file is what it says and was made for this code."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle, or not whole: it has no {MANIFEST}")
    if sha256 is not None and _sum(path).sha256 != sha256:
        raise BundleError(f"{path} is not the one that the registry promoted: its sum differs")
    manifest = _parsed(path, Manifest)
    if manifest.format != FORMAT:
        raise BundleError(
            f"{folder} has format {manifest.format}, and this code reads {FORMAT}: "
            "serve it with the release that wrote it, or train again"
        )
    names = [name for name in _names(folder) if name != MANIFEST]
    for name in names:
        if Path(name).suffix.lower() in _PICKLES:
            raise BundleError(f"{folder}/{name} may hold a pickle, which could run code: refused")
        if name not in manifest.files:
            raise BundleError(f"{folder}/{name} does not belong to the bundle; remove it")
    for name, expected in manifest.files.items():
        if name not in names:
            raise BundleError(f"{folder}/{name} is missing; copy the bundle again")
        if (folder / name).stat().st_size != expected.size:
            raise BundleError(f"{folder}/{name} is damaged: its size differs; copy it again")
        if _sum(folder / name) != expected:
            raise BundleError(f"{folder}/{name} is damaged: its sha256 differs; copy it again")
    for name in _needed(manifest):
        if name not in manifest.files:
            raise BundleError(f"{folder} lacks {name}; train again")
    if manifest.feature_hash != FEATURE_HASH:
        raise BundleError(f"{folder} was fitted on other features: {_difference(folder)}")
    return manifest


def _needed(manifest: Manifest) -> Sequence[str]:
    always = ["network", "features", "calibration", "metrics"]
    encoder = [f"{ENCODER}/config.json"] if manifest.encoder_hash else []
    return ["network.safetensors", *(f"{name}.json" for name in always), *encoder]


def _difference(folder: Path) -> str:
    theirs = _parsed(folder / "features.json", RootModel[list[dict[str, Any]]]).root
    ours = [asdict(feature) for feature in FEATURES]
    lacking = [str(feature["name"]) for feature in ours if feature not in theirs]
    extra = [str(feature.get("name")) for feature in theirs if feature not in ours]
    parts = {"it lacks": lacking, "it has": extra}
    stated = [f"{what} {', '.join(names[:3])}" for what, names in parts.items() if names]
    return (", ".join(stated) or "in another order") + "; train again with this release"


def _parsed(path: Path, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise BundleError(f"{path} cannot be read ({field}: {first['msg']})") from error


def _names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _sum(path: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(sha256=digest, size=path.stat().st_size)


def _copy_encoder(source: Path, target: Path) -> str:
    """Copy an encoder's files; share those of a bundle, which never change, where links work."""
    shared = (source.parent / MANIFEST).is_file()
    for name in encoders.files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            if not shared:
                raise OSError("only files that never change are shared")
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
    return encoders.folder_hash(target)
