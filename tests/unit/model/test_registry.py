"""The registry of bundles."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from uuid import uuid4

import pytest
from pydantic import ValidationError

from model import registry
from model.exceptions import RegistryError
from model.registry import Registry
from schemas.exceptions import UnreachableError


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty models folder, by each kind of URL."""
    return {
        "path": str(tmp_path / "models"),
        "file": f"file://{tmp_path}/models",
        "memory": f"memory://{uuid4()}/models",
    }[request.param]


def promote(url: str, version: str, expected: str | None = None) -> Registry:
    return registry.promote(url, version, f"sum of {version}", "test", "better", expected)


def stable(url: str) -> str | None:
    entry = registry.read(url).stable
    return entry.version if entry else None


def test_before_any_bundle(url: str) -> None:
    assert registry.read(url) == Registry()


def test_promote_and_roll_back(url: str) -> None:
    for version in ("a", "b", "c"):
        promote(url, version)
        assert stable(url) == version
    registry.rollback(url, "test", "worse")
    assert stable(url) == "b"
    registry.rollback(url, "test", "still worse")
    assert stable(url) == "a"
    with pytest.raises(RegistryError, match="no earlier"):
        registry.rollback(url, "test", "once more")
    promote(url, "d")
    registry.rollback(url, "test", "worse")
    now = registry.read(url)
    assert now.stable is not None
    assert (now.stable.version, now.stable.sha256) == ("a", "sum of a")
    assert now.revision == len(now.history) == 7
    assert [change.what for change in now.history][2:4] == ["promote", "rollback"]


def test_of_two_who_roll_back_at_once_one_goes_back(url: str) -> None:
    for version in ("a", "b", "c"):
        promote(url, version)
    registry.rollback(url, "one", "worse", expected="c")
    with pytest.raises(RegistryError, match="c was to be rolled back, but b is stable now"):
        registry.rollback(url, "other", "worse", expected="c")
    assert stable(url) == "b"


def test_promoting_the_same_again_is_no_step_to_roll_back_to(url: str) -> None:
    for version in ("a", "b", "b"):
        promote(url, version)
    registry.rollback(url, "test", "worse")
    assert stable(url) == "a"


def test_a_model_judged_against_another_is_not_promoted(url: str) -> None:
    promote(url, "a")
    promote(url, "b", expected="a")
    with pytest.raises(RegistryError, match="judged against a, but b is stable"):
        promote(url, "c", expected="a")
    assert stable(url) == "b"


def test_a_first_model_that_another_was_faster_than_is_not_promoted(url: str) -> None:
    promote(url, "a", expected="")
    with pytest.raises(RegistryError, match="judged against none, but a is stable"):
        promote(url, "b", expected="")
    assert stable(url) == "a"


def test_only_the_newest_history_is_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LONGEST_HISTORY", 2)
    for version in ("a", "b", "c"):
        promote(url, version)
    now = registry.read(url)
    assert (now.revision, [change.version for change in now.history]) == (3, ["b", "c"])
    registry.rollback(url, "test", "worse")
    promote(url, "d")
    assert [change.what for change in registry.read(url).history] == ["rollback", "promote"]
    with pytest.raises(RegistryError, match="no earlier"):
        registry.rollback(url, "test", "worse")


def test_canary(url: str) -> None:
    promote(url, "a")
    registry.set_canary(url, "b", "sum of b", 0.1, "test", "try")
    now = registry.read(url)
    assert now.stable is not None
    assert now.canary is not None
    assert (now.stable.version, now.canary.version, now.canary.share) == ("a", "b", 0.1)
    promote(url, "b")
    assert registry.read(url).canary is None
    registry.set_canary(url, "c", "sum of c", 0, "test", "shadow")
    registry.rollback(url, "test", "b is worse")
    now = registry.read(url)
    assert now.canary is not None
    assert (stable(url), now.canary.version) == ("a", "c")
    registry.clear_canary(url, "test", "enough")
    assert registry.read(url).canary is None
    with pytest.raises(RegistryError, match="no canary"):
        registry.clear_canary(url, "test", "again")
    with pytest.raises(ValidationError):
        registry.set_canary(url, "d", "sum of d", 1.5, "test", "more than all")


def test_a_trial_begins_when_it_is_set_and_goes_on_with_another_share(url: str) -> None:
    promote(url, "a")

    def set_canary(version: str, share: float) -> tuple[datetime, datetime | None]:
        now = registry.set_canary(url, version, f"sum of {version}", share, "test", "try")
        return now.history[-1].at, now.tried_since

    assert registry.read(url).tried_since is None
    began, since = set_canary("b", 0)
    assert since == began
    promote(url, "c")  # by `retrain`, meanwhile
    registry.rollback(url, "test", "c is worse")
    assert set_canary("b", 0.1)[1] == began
    registry.clear_canary(url, "test", "enough")
    assert registry.read(url).tried_since is None
    again, since = set_canary("b", 0.1)
    assert since == again > began
    promote(url, "b")
    registry.rollback(url, "test", "b is worse")
    third, since = set_canary("b", 0.1)
    assert since == third
    set_canary("d", 0.1)
    fourth, since = set_canary("b", 0.1)
    assert since == fourth


def test_a_canary_may_be_tried_before_anything_is_stable(url: str) -> None:
    registry.set_canary(url, "a", "sum of a", 0.1, "test", "try", expected="")
    now = registry.read(url)
    assert now.canary is not None
    assert (now.stable, now.canary.version) == (None, "a")


def test_a_canary_is_tried_beside_the_stable_version_that_it_fits(url: str) -> None:
    promote(url, "a")
    promote(url, "b")
    with pytest.raises(RegistryError, match="judged against a, but b is stable"):
        registry.set_canary(url, "c", "sum of c", 0.1, "test", "try", expected="a")
    with pytest.raises(RegistryError, match="b is stable already"):
        registry.set_canary(url, "b", "sum of b", 0.1, "test", "try")
    assert registry.read(url).canary is None
    registry.set_canary(url, "a", "sum of a", 0.1, "test", "try", expected="b")
    again = registry.set_canary(url, "a", "sum of a", 0.255, "test", "more", expected="b")
    assert again.canary is not None
    assert (again.canary.share, again.canary.role) == (0.255, "canary 25.5%")
    registry.rollback(url, "test", "b is worse")
    now = registry.read(url)
    assert (stable(url), now.canary) == ("a", None)  # it cannot be both
    shadow = registry.set_canary(url, "d", "sum of d", 0, "test", "shadow").canary
    assert shadow is not None
    assert shadow.role == "shadow"


def test_writers_on_one_machine_take_turns(tmp_path: Path) -> None:
    url = str(tmp_path)

    def write(writer: int) -> None:
        for number in range(10):
            promote(url, f"{writer}-{number}")
            assert registry.read(url).stable is not None  # whole at any time

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    now = registry.read(url)
    assert now.revision == 80
    assert {change.version for change in now.history} == {
        f"{writer}-{number}" for writer in range(8) for number in range(10)
    }
    assert {path.name for path in tmp_path.iterdir()} == {"registry.json", ".registry.lock"}


def test_on_an_object_store_the_later_writer_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid4()}"
    promote(url, "a")
    changed = registry._changed

    def meanwhile(*arguments: object, **named: object) -> Registry:
        monkeypatch.setattr(registry, "_changed", changed)
        promote(url, "b")
        return changed(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "_changed", meanwhile)
    with pytest.raises(RegistryError, match="meanwhile"):
        promote(url, "c")
    assert stable(url) == "b"


@pytest.mark.parametrize("content", [b"", b"{", b'{"revision": "x"}', b'{"stable": 3}', b"\xff"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "registry.json").write_bytes(content)
    with pytest.raises(RegistryError, match=r"registry\.json is damaged"):
        registry.read(str(tmp_path))
    with pytest.raises(RegistryError, match=r"registry\.json is damaged"):
        promote(str(tmp_path), "a")
    assert (tmp_path / "registry.json").read_bytes() == content


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreachableError, match=r"models\.url"):
        promote(str(tmp_path / "file" / "models"), "a")
    with pytest.raises(UnreachableError, match=r"models\.url"):
        registry.read("nosuch://bucket/models")
