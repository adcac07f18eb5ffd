from pathlib import Path

import pytest
from pydantic import SecretStr

from model import registry
from starcast.doctor import _models, _store
from streams.config import ModelsConfig, RedisConfig
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
    assert (models.state, models.found) == ("fine", f"{tmp_path}/home/models can be written")
    assert not (tmp_path / "~").exists()
