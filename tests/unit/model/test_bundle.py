"""Bundles at rest."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import (  # pyright: ignore[reportMissingTypeStubs]
    MemoryFile,
    MemoryFileSystem,
)

from model import bundle as bundles
from model import registry, storage
from model.bundle import FORMAT, Written
from model.calibration import Calibration
from model.encoder import StarHead, folder_hash, read_star_head
from model.exceptions import BundleError
from model.network import FusedNetwork
from model.predict import predictor
from schemas.exceptions import UnreachableError
from tests.unit.model.bundles import CARD, network, write
from tests.unit.model.shop import Observed


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A directory in Hugging Face form, with things in it that are no part of an encoder."""
    folder = tmp_path / "source"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"):
        (folder / name).write_text(name)
    for name in ("README.md", "pytorch_model.bin", ".gitattributes", "training_args.bin"):
        (folder / name).write_text("not wanted")
    return folder


@pytest.fixture
def folder(tmp_path: Path, encoder: Path) -> Path:
    """The directory of a bundle with all its parts."""
    head = StarHead(np.ones((5, 3), np.float32), np.zeros(5, np.float32))
    written = write(str(tmp_path / "models"), encoder=encoder, star_head=head)
    return tmp_path / "models" / written.version


@pytest.mark.parametrize("kind", ["path", "file", "memory"])
def test_what_is_written_is_loaded(kind: str, tmp_path: Path, observed: Observed) -> None:
    urls = {"path": f"{tmp_path}/models", "file": f"file://{tmp_path}/models"}
    url = urls.get(kind, f"memory://{uuid4()}/models")
    assert bundles.versions(url) == []
    written = write(url)
    bundle = bundles.load(url, written.version, written.sha256, cache=tmp_path / "cache")
    assert (bundle.version, bundle.sha256) == (written.version, written.sha256)
    assert bundle.calibration == Calibration(slope=0.9, intercept=0.4)
    assert bundle.metrics == {"model": {"rmse": 0.9}}
    assert bundle.encoder_hash is bundle.encoder_folder is bundle.star_head is None
    assert bundles.versions(url) == [written.version]
    again = bundles.load(url, written.version, cache=tmp_path / "cache")
    told = [
        predictor(b, "cpu").predict(observed.events, observed.observation, observed.lookups)
        for b in (bundle, again)
    ]
    memory = network().eval()
    direct = predictor(replace(bundle, network=memory), "cpu").predict(
        observed.events, observed.observation, observed.lookups
    )
    for found in told:
        np.testing.assert_array_equal(found.distribution, direct.distribution)
        assert found.version == written.version


def test_loading_needs_no_compiler(folder: Path) -> None:
    """PyTorch's takes a second and 150 MB of each worker."""
    code = (
        "import sys; from pathlib import Path; from model import bundle;"
        "bundle.open_folder(Path(sys.argv[1])); sys.exit('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parents[3])
    assert done.returncode == 0


def test_the_encoder_goes_along_unchanged(folder: Path, encoder: Path) -> None:
    bundle = bundles.open_folder(folder)
    assert bundle.encoder_folder == folder / "encoder"
    assert bundle.encoder_hash == folder_hash(encoder) == folder_hash(folder / "encoder")
    names = {p.relative_to(folder).as_posix() for p in (folder / "encoder").rglob("*.*")}
    assert names == {
        "encoder/config.json",
        "encoder/model.safetensors",
        "encoder/tokenizer.json",
        "encoder/1_Pooling/config.json",
    }
    assert bundle.star_head is not None
    assert read_star_head(bundle.star_head, 3).weight.sum() == 15


def test_bundles_with_one_encoder_share_its_files(folder: Path) -> None:
    written = write(str(folder.parent), seed=1, encoder=folder / "encoder")
    second = folder.parent / written.version / "encoder" / "model.safetensors"
    assert (folder / "encoder" / "model.safetensors").samefile(second)
    shutil.rmtree(folder)
    assert bundles.load(str(folder.parent), written.version).encoder_hash


def test_the_card_says_what_a_reader_needs(folder: Path) -> None:
    text = (folder / "MODEL_CARD.md").read_text("utf-8")
    for part in (
        folder.name,
        "| Data | a \\| generated shop |",
        "2026-01-01T00:00:00+00:00 to 2026-02-01T00:00:00+00:00",
        "| Rows: train | 12,345 |",
        "| Setting: dropout | 0.1 |",
        "| model | rmse | mae |",
        "| bias | 0.9500 |  |",
        "- Not for people.",
        "Made by a test.",
    ):
        assert part in text


def test_the_feature_table_stands_in_it(folder: Path) -> None:
    table = json.loads((folder / "features.json").read_text("utf-8"))
    assert table[0]["name"] == "bias"
    assert {"name", "group", "meaning", "source"} == set(table[0])


def damage_nothing_but(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and leave it valid otherwise."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def resum(folder: Path, name: str, content: bytes) -> None:
    """Put another content in place of a file's, with the right sum in the manifest."""
    (folder / name).write_bytes(content)
    file = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    damage_nothing_but(folder, lambda manifest: manifest["files"].update({name: file}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def infinite(folder: Path) -> None:
    broken = network()
    broken.networks[0].last.weight.data[0, 0] = torch.inf
    other = folder.parent / write_network(folder.parent, broken).version
    shutil.copy(other / "network.safetensors", folder / "copied")
    resum(folder, "network.safetensors", (folder / "copied").read_bytes())
    (folder / "copied").unlink()


def write_network(models: Path, broken: FusedNetwork) -> Written:
    return bundles.write(
        str(models), network=broken, calibration=Calibration(), metrics={}, card=CARD
    )


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_bytes(b'{"format": 1, '),
        "manifest.json cannot be read",
    ),
    "a manifest without files": (
        lambda f: damage_nothing_but(f, lambda m: m.pop("files")),
        "files: Field required",
    ),
    "a later format": (
        lambda f: damage_nothing_but(f, lambda m: m.update(format=FORMAT + 1)),
        f"format {FORMAT + 1}, and this code reads {FORMAT}",
    ),
    "a flipped bit": (
        lambda f: flip(f / "network.safetensors"),
        "network.safetensors is damaged: its sha256 differs",
    ),
    "a flipped bit in the encoder": (
        lambda f: flip(f / "encoder" / "model.safetensors"),
        "encoder/model.safetensors is damaged",
    ),
    "half a file": (
        lambda f: (f / "calibration.json").write_bytes(b"{"),
        "calibration.json is damaged: its size differs",
    ),
    "a missing file": (lambda f: (f / "metrics.json").unlink(), "metrics.json is missing"),
    "a part never written": (
        lambda f: (
            (f / "calibration.json").unlink(),
            damage_nothing_but(f, lambda m: m["files"].pop("calibration.json")),
        ),
        "lacks calibration.json",
    ),
    "a file too many": (
        lambda f: (f / "encoder" / "adapter_config.json").write_text("{}"),
        "adapter_config.json does not belong",
    ),
    "a pickle": (
        lambda f: (f / "encoder" / "pytorch_model.bin").write_bytes(b"\x80\x04."),
        "pytorch_model.bin may hold a pickle",
    ),
    "a listed pickle": (lambda f: resum(f, "head.pkl", b"\x80\x04."), "head.pkl may hold a pickle"),
    "a file outside": (
        lambda f: damage_nothing_but(
            f, lambda m: m["files"].update({"../../x": {"sha256": "", "size": 0}})
        ),
        r"\.\./\.\./x is missing",
    ),
    "other features": (
        lambda f: (
            resum(f, "features.json", b'[{"name": "zodiac"}]'),
            damage_nothing_but(f, lambda m: m.update(feature_hash="0")),
        ),
        "fitted on other features: it lacks bias, .*it has zodiac",
    ),
    "foreign weights": (
        lambda f: resum(
            f, "network.safetensors", b"PK\x03\x04 a zip archive, such as torch writes"
        ),
        "weights do not fit",
    ),
    "weights of another size": (
        lambda f: resum(
            f,
            "network.json",
            (f / "network.json").read_bytes().replace(b'"buckets": 64', b'"buckets": 32'),
        ),
        "weights do not fit",
    ),
    "a network larger than any memory": (
        lambda f: resum(
            f,
            "network.json",
            (f / "network.json")
            .read_bytes()
            .replace(b'"identity": 8', b'"identity": 256')
            .replace(b'"members": 2', b'"members": 32')
            .replace(b'"buckets": 64', b'"buckets": 67108864'),
        ),
        "weights do not fit",
    ),
    "a bias that is no column": (
        lambda f: resum(
            f,
            "network.json",
            re.sub(
                rb'"bias_column": \d+', b'"bias_column": 999', (f / "network.json").read_bytes()
            ),
        ),
        "do not fit its network: bias column 999",
    ),
    "an unknown setting": (
        lambda f: resum(
            f,
            "network.json",
            (f / "network.json").read_bytes().replace(b"{", b'{"depth": 3,', 1),
        ),
        "network.json cannot be read .depth",
    ),
    "a calibration that is no number": (
        lambda f: resum(f, "calibration.json", b'{"slope": NaN}'),
        "calibration.json cannot be read .slope",
    ),
    "metrics that are no JSON": (
        lambda f: resum(f, "metrics.json", b"{"),
        "metrics.json cannot be read",
    ),
    "metrics that are no text": (
        lambda f: resum(f, "metrics.json", b'{"a": "\xff"}'),
        "metrics.json cannot be read",
    ),
    "features that are none": (
        lambda f: (
            resum(f, "features.json", b'[1, "name"]'),
            damage_nothing_but(f, lambda m: m.update(feature_hash="0")),
        ),
        "features.json cannot be read",
    ),
    "another version's": (
        lambda f: damage_nothing_but(f, lambda m: m.update(version="20261124T101500-1a2b3c4d")),
        "holds '20261124T101500-1a2b3c4d'",
    ),
    "infinite weights": (infinite, "members.0.last.weight are not finite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_foreign_bundles_are_refused_with_a_reason(folder: Path, name: str) -> None:
    bundles.open_folder(folder)
    damage, reason = DAMAGES[name]
    damage(folder)
    with pytest.raises(BundleError, match=reason) as caught:
        bundles.load(str(folder.parent), folder.name)
    assert str(folder) in str(caught.value)


def test_a_bundle_that_the_registry_did_not_promote_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="sum differs"):
        bundles.load(str(folder.parent), folder.name, sha256="0" * 64)


@pytest.mark.parametrize("version", ["../models", "latest", "", "20261124T101500-1A2B3C4D"])
def test_only_versions_are_looked_up(folder: Path, version: str) -> None:
    with pytest.raises(BundleError, match="no version's name"):
        bundles.load(str(folder.parent), version)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_version_that_is_not_there(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no manifest"):
        bundles.load(f"{scheme}{tmp_path}/none", "20261124T101500-1a2b3c4d", cache=tmp_path)


def cut_off(file: Path) -> None:
    """As a power failure leaves a file."""
    os.truncate(file, 0)


@pytest.mark.parametrize("damage", [flip, cut_off, Path.unlink])
@pytest.mark.parametrize("name", ["network.safetensors", "manifest.json"])
def test_a_damaged_copy_in_the_cache_is_fetched_anew(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    url = f"memory://{uuid4()}"
    written = write(url)
    bundles.load(url, written.version, cache=tmp_path)
    damage(tmp_path / written.version / name)
    loaded = bundles.load(url, written.version, written.sha256, cache=tmp_path)
    assert loaded.folder == tmp_path / written.version
    bundles.open_folder(loaded.folder, written.sha256)
    assert [*tmp_path.iterdir()] == [loaded.folder]


def test_a_damaged_copy_of_what_is_gone_is_refused(tmp_path: Path) -> None:
    url = f"memory://{uuid4()}"
    written = write(url)
    bundles.load(url, written.version, cache=tmp_path)
    flip(tmp_path / written.version / "network.safetensors")
    storage.locate(url).remove(written.version)
    with pytest.raises(BundleError, match=f"^{url}/{written.version} is no bundle"):
        bundles.load(url, written.version, cache=tmp_path)


def test_two_may_fetch_a_version_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid4()}"
    written = write(url)
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        shutil.copytree(path, target)  # the other's
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    loaded = bundles.load(url, written.version, cache=tmp_path)
    assert [*tmp_path.iterdir()] == [loaded.folder]


def test_a_full_disk_is_told_as_one_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid4()}"
    written = write(url)

    def full(_: object, path: str, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", full)
        with pytest.raises(UnreachableError, match="No space left on device; make room"):
            bundles.load(url, written.version, cache=tmp_path)
    assert not [*tmp_path.iterdir()]
    bundles.load(url, written.version, cache=tmp_path)


def test_a_disk_that_is_full_when_a_version_is_written_is_told_by_its_place(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    models = tmp_path / "models"
    with pytest.raises(UnreachableError, match=f"{models}.* make room on this machine"):
        write(str(models), encoder=encoder)
    assert not [*models.iterdir()]


def test_what_is_wrong_in_an_object_store_is_told_where_it_lies(tmp_path: Path) -> None:
    # Not of the copy, in a folder that is gone by then.
    url = f"memory://{uuid4()}"
    missing = "20260101T000000-00000000"
    with pytest.raises(BundleError, match=f"^{url}/{missing} is no bundle"):
        bundles.load(url, missing, cache=tmp_path)
    written = write(url)
    with pytest.raises(BundleError, match=f"^{url}/{written.version}/manifest.json is not the one"):
        bundles.load(url, written.version, "0" * 64, cache=tmp_path)


def test_a_cache_keeps_the_versions_that_were_loaded_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "_CACHED", 2)
    url = f"memory://{uuid4()}"
    first, second, third = (write(url, seed).version for seed in range(3))
    for version in (first, second, first, third):
        assert bundles.load(url, version, cache=tmp_path).version == version
    assert {path.name for path in tmp_path.iterdir()} == {first, third}
    assert bundles.load(url, second, cache=tmp_path).version == second


def test_what_killed_writers_left_is_deleted_a_day_later(tmp_path: Path) -> None:
    url = str(tmp_path / "models")
    write(url)
    old, new = (tmp_path / "models" / f".writing-{name}" for name in ("old", "new"))
    for folder in (old, new):
        (folder / "bundle").mkdir(parents=True)
        (folder / "bundle" / "network.json").write_text("{}")
    yesterday = time.time() - 90_000
    os.utime(old, (yesterday, yesterday))
    written = write(url, 1)
    assert not old.exists()
    assert new.exists()  # it may be under way
    old.mkdir()
    os.utime(old, (yesterday, yesterday))
    registry.promote(url, written.version, written.sha256, "a test", "better")
    assert not old.exists()


def test_a_folder_that_copies_an_object_store_is_not_local(tmp_path: Path) -> None:
    store = storage.locate(f"filecache::memory://{uuid4()}/models")
    assert store.local is None
    assert storage.locate(f"{tmp_path}").local == tmp_path


@pytest.mark.parametrize("name", ["../../evil", "encoder/../../../evil", "/{tmp_path}/evil"])
def test_an_object_does_not_lead_out_of_the_cache(name: str, tmp_path: Path) -> None:
    url = f"memory://{uuid4()}"
    written = write(url)
    store = bundles.storage.locate(url)
    path = f"{store.root}/{written.version}/{name.format(tmp_path=tmp_path)}"
    store.filesystem.store[path] = MemoryFile(store.filesystem, path, b"evil")
    with pytest.raises(BundleError, match="evil'; remove it"):
        bundles.load(url, written.version, written.sha256, cache=tmp_path / "cache")
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def test_a_reader_never_sees_half_a_bundle(tmp_path: Path) -> None:
    url = str(tmp_path)
    ended = threading.Event()

    def writer() -> None:
        for seed in range(8):
            write(url, seed)
        ended.set()

    thread = threading.Thread(target=writer)
    thread.start()
    seen: set[str] = set()
    while not ended.is_set() or len(seen) < 8:
        for version in bundles.versions(url):
            if version not in seen:
                bundles.load(url, version)
                seen.add(version)
    thread.join()
    assert {path.name for path in tmp_path.iterdir()} == seen


def test_a_bundle_is_on_the_disk_before_it_appears(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: set[int] = set()

    def noted(file: int) -> None:
        assert not bundles.versions(str(tmp_path))
        settled.add(os.fstat(file).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    folder = tmp_path / write(str(tmp_path), encoder=encoder).version
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_ino for path in files} == settled


def test_an_interrupted_upload_is_no_version(tmp_path: Path) -> None:
    url = f"memory://{uuid4()}"
    written = write(url)
    store = bundles.storage.locate(url)
    store.filesystem.rm_file(f"{store.root}/{written.version}/manifest.json")
    assert bundles.versions(url) == []
    with pytest.raises(BundleError, match="not whole"):
        bundles.load(url, written.version, cache=tmp_path)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_old_versions_are_deleted_but_for_those_that_are_of_use(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight versions of a day each: the third serves after a rollback, the second is on trial."""
    url = f"{scheme}{tmp_path}/models"
    written: list[Written] = []
    for day in range(1, 9):

        class Day(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:
                return datetime(2026, 1, day, tzinfo=tz)  # noqa: B023 - used at once

        monkeypatch.setattr(bundles, "datetime", Day)
        written.append(write(url, day))
    first, second, third, fourth, _, _, seventh, eighth = written
    for each in (first, third, fourth):
        registry.promote(url, each.version, each.sha256, "a test", "better")
    registry.rollback(url, "a test", "worse")
    registry.set_canary(url, second.version, second.sha256, 0.1, "a test", "try")
    folder = storage.locate(url)
    for name in (fourth.version, eighth.version):
        storage.locate(f"{url}/{bundles.REPORTS}").replace(f"{name}.html", b"how good it is")
    (cut_off, coming) = "20260101T010000-00000000", "20260108T010000-00000000"  # not whole
    for name in (cut_off, coming):
        storage.locate(f"{url}/{name}").replace("network.json", b"{}")

    gone = bundles.prune(url, 2)
    assert gone == [cut_off, *(each.version for each in written[3:6])]
    kept = [each.version for each in (first, second, third, seventh, eighth)]
    assert bundles.versions(url) == kept
    assert folder.folders() == sorted([*kept, coming, bundles.REPORTS])
    assert folder.read(f"{bundles.REPORTS}/{fourth.version}.html") is None
    assert folder.read(f"{bundles.REPORTS}/{eighth.version}.html") is not None
    for each in kept:
        bundles.load(url, each, cache=tmp_path / "cache")
    assert bundles.prune(url, 2) == []
    assert bundles.prune(f"{scheme}{tmp_path}/none", 1) == []
