"""Which bundles serve: one small file beside the bundles, replaced atomically.

Writers on one machine take turns by a lock. On an object store, which has none, a writer looks
again just before it writes and gives up when the file has changed.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import takewhile
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model import storage
from model.exceptions import RegistryError
from schemas.urls import hide_password

FILE = "registry.json"
_LOCK = ".registry.lock"
_LONGEST_HISTORY = 1_000  # changes
_OF_TRIALS = ("canary", "clear")


class Entry(BaseModel):
    """A bundle and who put it in its place, when and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    sha256: str = Field(description="of the bundle's manifest")
    at: datetime
    by: str
    reason: str


class Canary(Entry):
    """A bundle on trial."""

    share: float = Field(ge=0, le=1, description="of users it serves; 0: a shadow, served to none")

    @property
    def role(self) -> str:
        """What it is, for people: canary 10%, or shadow."""
        return f"canary {100 * self.share:.3g}%" if self.share else "shadow"


class Change(Entry):
    """One line of the history."""

    what: Literal["promote", "rollback", "canary", "clear"]


class Registry(BaseModel):
    """What `registry.json` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    revision: int = 0  # one higher with each change
    stable: Entry | None = None
    canary: Canary | None = None
    history: list[Change] = []  # oldest first

    @property
    def tried_since(self) -> datetime | None:
        """When the trial of the canary began; another share goes on with it."""
        version = self.canary.version if self.canary else None
        told = (p for p in reversed(self.history) if p.what in _OF_TRIALS or p.version == version)
        trial = takewhile(lambda past: (past.what, past.version) == ("canary", version), told)
        return min((past.at for past in trial), default=None)

    @property
    def rolled_back(self) -> bool:
        """Whether what is stable became so by a rollback."""
        ways = (each.what for each in reversed(self.history))
        return next((way == "rollback" for way in ways if way in ("promote", "rollback")), False)

    @property
    def stable_version(self) -> str:
        """The version that is stable; "" for none."""
        return self.stable.version if self.stable else ""


def read(url: str) -> Registry:
    """The registry in the models folder at `url`; an empty one when there is no file yet.

    Raises RegistryError when the file is damaged, UnreachableError when the folder is.
    """
    return _read(storage.locate(url))


def promote(
    url: str, version: str, sha256: str, by: str, reason: str, expected: str | None = None
) -> Registry:
    """Make a bundle the stable one; a canary of the same version is done with.

    `expected`: the stable version that it was judged against, "" where there was none. Raises
    RegistryError when another has become stable since.
    """

    def change(old: Registry) -> Registry:
        _check_stable(old, version, expected)
        entry = _entry(version, sha256, by, reason)
        return _changed(old, "promote", entry, stable=entry, canary=old.canary)

    return _update(url, change)


def earlier(registry: Registry) -> list[Entry]:
    """What was stable before what is, newest first; the first is so again after a rollback."""
    stack: list[Change] = []
    for past in registry.history:
        if past.what == "promote" and (not stack or stack[-1].version != past.version):
            stack.append(past)
        elif past.what == "rollback" and stack:
            stack.pop()
    return [*reversed(stack[:-1])]


def rollback(url: str, by: str, reason: str, expected: str | None = None) -> Registry:
    """Make the bundle stable again that was stable before the one that is.

    Rolling back twice goes back two steps, not to and fro. A canary of that version is done with.
    `expected`: the stable version to get away from. Raises RegistryError when another has become
    stable since, or when there is none to go back to.
    """

    def change(old: Registry) -> Registry:
        now = old.stable_version
        if expected is not None and now != expected:
            raise RegistryError(
                f"{expected or 'none'} was to be rolled back, but {now or 'none'} is stable now; "
                "look at `starcast models list`, and roll back again if it is to go too"
            )
        before = earlier(old)
        if not before:
            place = hide_password(url)
            raise RegistryError(f"nothing to roll back to in {place}: no earlier stable version")
        entry = _entry(before[0].version, before[0].sha256, by, reason)
        return _changed(old, "rollback", entry, stable=entry, canary=old.canary)

    return _update(url, change)


def set_canary(
    url: str,
    version: str,
    sha256: str,
    share: float,
    by: str,
    reason: str,
    expected: str | None = None,
) -> Registry:
    """Try a bundle on a share of users (0: as a shadow); in place of the canary that there is.

    `expected`: the stable version beside which it can be served, "" where there is none. Raises
    RegistryError when another has become stable since, or when the bundle is stable itself.
    """

    def change(old: Registry) -> Registry:
        _check_stable(old, version, expected)
        if old.stable is not None and old.stable.version == version:
            raise RegistryError(f"{version} is stable already: it answers all users")
        entry = _entry(version, sha256, by, reason)
        canary = Canary(**dict(entry), share=share)
        return _changed(old, "canary", entry, stable=old.stable, canary=canary)

    return _update(url, change)


def clear_canary(url: str, by: str, reason: str) -> Registry:
    """End the trial of a canary; raises RegistryError when there is none."""

    def change(old: Registry) -> Registry:
        if old.canary is None:
            raise RegistryError(f"{hide_password(url)} has no canary to end")
        entry = _entry(old.canary.version, old.canary.sha256, by, reason)
        return _changed(old, "clear", entry, stable=old.stable, canary=None)

    return _update(url, change)


def _check_stable(now: Registry, version: str, expected: str | None) -> None:
    if expected is not None and now.stable_version != expected:
        raise RegistryError(
            f"{version} was judged against {expected or 'none'}, but "
            f"{now.stable_version or 'none'} is stable now; judge it again"
        )


def _entry(version: str, sha256: str, by: str, reason: str) -> Entry:
    return Entry(version=version, sha256=sha256, at=datetime.now(UTC), by=by, reason=reason)


def _changed(
    old: Registry,
    what: Literal["promote", "rollback", "canary", "clear"],
    entry: Entry,
    stable: Entry | None,
    canary: Canary | None,
) -> Registry:
    history = [*old.history, Change(**dict(entry), what=what)][-_LONGEST_HISTORY:]
    if canary is not None and stable is not None and canary.version == stable.version:
        canary = None
    return Registry(revision=old.revision + 1, stable=stable, canary=canary, history=history)


def _update(url: str, change: Callable[[Registry], Registry]) -> Registry:
    folder = storage.locate(url)
    with folder.lock(_LOCK):
        old = _read(folder)
        new = change(old)
        if _read(folder).revision != old.revision:
            raise RegistryError(
                f"another process changed {folder.url}/{FILE} meanwhile; look, try again"
            )
        folder.replace(FILE, new.model_dump_json(indent=2).encode())
    return new


def _read(folder: storage.Storage) -> Registry:
    content = folder.read(FILE)
    if content is None:
        return Registry()
    try:
        return Registry.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise RegistryError(
            f"{folder.url}/{FILE} is damaged ({field}: {first['msg']}); "
            "restore it, or remove it and promote a version again"
        ) from error
