from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from model import registry
from starcast import doctor
from starcast.doctor import PROBE, Finding, _archive, _models, _store
from starcast.settings import Settings
from streams.admin import GroupReport
from streams.config import ArchiveConfig, ModelsConfig, RedisConfig
from streams.embedded import HOST, free_port
from tests.unit.model.bundles import write
from tests.unit.model.encoders import bert


def test_a_cluster_that_is_down_is_a_finding() -> None:
    url = SecretStr(f"redis://{HOST}:{free_port()}")
    (finding,) = _store(RedisConfig(url=url, cluster=True))
    assert (finding.name, finding.state) == ("store", "wrong")
    assert "STARCAST_REDIS__URL" in finding.advice


def test_a_version_on_trial_is_looked_at(tmp_path: Path) -> None:
    url = str(tmp_path / "models")
    bert(tmp_path / "encoder")
    stable, second = (write(url, seed) for seed in (0, 1))
    foreign = write(url, encoder=tmp_path / "encoder")
    registry.promote(url, stable.version, stable.sha256, "a test", "")
    registry.set_canary(url, second.version, second.sha256, 0.1, "a test", "")
    *_, model, canary = _models(ModelsConfig(url=url))
    assert (model.name, model.state) == ("model", "fine")
    assert (canary.name, canary.state) == ("canary", "fine")
    assert f"{second.version} is on trial (canary 10%)" in canary.found
    registry.set_canary(url, foreign.version, foreign.sha256, 0.1, "a test", "")
    *_, canary = _models(ModelsConfig(url=url))
    assert (canary.name, canary.state) == ("canary", "wrong")
    assert "another encoder" in canary.found


def test_the_models_folder_is_the_one_that_workers_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    models, _ = _models(ModelsConfig(url="~/models"))
    assert models.state == "fine"
    assert models.found.startswith(f"{tmp_path}/home/models can be written")
    assert not (tmp_path / "~").exists()


def test_a_disk_with_little_space_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    (finding,) = _archive(ArchiveConfig(url=str(tmp_path)))
    assert (finding.state, finding.advice) == (
        "note",
        "Make space: nothing is written to a full disk.",
    )
    assert finding.found == f"{tmp_path} can be written, 1.0 GiB free"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / PROBE).symlink_to("/dev/full")
    (finding,) = _archive(ArchiveConfig(url=str(tmp_path)))
    assert (finding.name, finding.state) == ("archive", "wrong")
    assert "No space left" in finding.found


REPORTS = {
    "scorer": GroupReport(0, 2),
    "answers": GroupReport(0, None),
    "items": GroupReport(2, 1),
    "catalog": GroupReport(1, 100_001),
    "texts": GroupReport(0, 7),
    "archiver": GroupReport(1, 0),
    "insights": GroupReport(0, 0),
}


def workers(monkeypatch: pytest.MonkeyPatch, *named: str) -> list[Finding]:
    monkeypatch.setattr(doctor, "group_report", lambda _, name: REPORTS[name])
    return [*doctor._workers(Settings(), named)]


def test_workers_and_what_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(found.name, found.state, found.found) for found in workers(monkeypatch)] == [
        ("scorer", "wrong", "no workers, 2 records to read"),
        ("answers", "note", "no workers, and none has begun"),
        ("items", "fine", "2 workers, 1 record to read"),
        ("catalog", "note", "1 worker, 100,001 records to read"),
        ("texts", "note", "no workers, 7 records to read"),  # a shop may have given it up
        ("archiver", "fine", "1 worker, 0 records to read"),
        ("insights", "note", "no workers, 0 records to read"),
    ]


@pytest.mark.parametrize("waiting", [0, 2])
def test_workers_that_a_broker_does_not_tell_of_are_not_missed(
    waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPORTS, "scorer", GroupReport(None, waiting))
    scorer, *_ = workers(monkeypatch, "scorer")
    said = f"this broker does not tell how many workers, {waiting} records to read"
    assert (scorer.state, scorer.found) == ("note", said)


@pytest.mark.parametrize(
    ("named", "wrong"),
    [
        (["texts"], ["texts"]),
        (["texts", "scorer", "dashboard"], ["scorer", "texts"]),
        (["archiver", "insights"], ["insights"]),  # with nothing to read there is one to come
        (["answers", "items"], ["answers"]),  # of which Kafka knows nothing: none ever began
        (["archiver", "catalog"], []),
    ],
)
def test_of_processors_that_are_named_workers_are_missed(
    named: list[str], wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = workers(monkeypatch, *named)
    assert [each.name for each in found if each.state == "wrong"] == wrong


@pytest.mark.parametrize("name", doctor.EVERY_SHOP)
def test_what_every_shop_runs_is_missed_unasked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPORTS, name, GroupReport(0, 1))
    found = {each.name: each.state for each in workers(monkeypatch)}
    assert found[name] == "wrong"
