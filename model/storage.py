"""The models folder: a local directory, or anything that fsspec reaches by URL."""

import contextlib
import errno
import fcntl
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem  # pyright: ignore[reportMissingTypeStubs]

from model.exceptions import BundleError
from schemas.exceptions import UnreachableError
from schemas.urls import hide_password

_WRITING = ".writing-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEFT_SECONDS = 86_400.0  # nothing takes so long to write


@dataclass(frozen=True)
class Storage:
    """A folder of files that are read, replaced and copied whole."""

    url: str  # as it may be printed
    filesystem: Any  # fsspec's AbstractFileSystem, which is not typed
    root: str

    @property
    def local(self) -> Path | None:
        """The folder, when it is on this machine; what a URL as filecache::s3://… copies is not."""
        return Path(self.root) if isinstance(self.filesystem, LocalFileSystem) else None

    def read(self, name: str) -> bytes | None:
        """A file's content; None when there is no such file."""
        with self._reaching(name):
            try:
                return self.filesystem.cat_file(f"{self.root}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                return None

    def replace(self, name: str, content: bytes) -> None:
        """Put a file's new content in place of the old, so that a reader sees one or the other."""
        with self._reaching(name):
            if self.local is None:
                self.filesystem.pipe_file(f"{self.root}/{name}", content)  # one put
                return
            self.local.mkdir(parents=True, exist_ok=True)
            with beside(self.local) as temporary:
                path = temporary / name
                with path.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                path.replace(self.local / name)

    def folders(self) -> list[str]:
        """Sorted names of the folders inside."""
        with self._reaching(""):
            self.filesystem.invalidate_cache()
            try:
                entries = self.filesystem.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
        return sorted(e["name"].rsplit("/", 1)[1] for e in entries if e["type"] == "directory")

    def remove(self, name: str, first: str | None = None) -> None:
        """Delete a file, or a folder, of which nobody sees a part: without its file `first` it is
        none. What is not there is deleted already.
        """
        place = f"{self.root}/{name}"
        with self._reaching(name), contextlib.suppress(FileNotFoundError):
            if first is not None:
                with contextlib.suppress(FileNotFoundError):
                    self.filesystem.rm_file(f"{place}/{first}")
            self.filesystem.rm(place, recursive=True)

    def upload(self, folder: Path, name: str, last: str) -> None:
        """Copy a folder's files to the folder `name`, the file `last` at the end."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        with self._reaching(name):
            for path in sorted(paths, key=lambda path: path == folder / last):
                target = f"{self.root}/{name}/{path.relative_to(folder).as_posix()}"
                self.filesystem.put_file(str(path), target)

    def download(self, name: str, folder: Path) -> None:
        """Copy the files of the folder `name` to a local folder.

        Raises BundleError where one's name would lead out of that: an object may have any name.
        """
        with self._reaching(name):
            base = f"{self.root}/{name}"
            found = {
                path[path.index(base) + len(base) + 1 :]: path
                for path in self.filesystem.find(base)
            }
        for inside in map(Path, found):
            if inside.is_absolute() or ".." in inside.parts:
                raise BundleError(f"{self.url}/{name} has a file named {str(inside)!r}; remove it")
        with self._reaching(name):
            for inside, path in found.items():
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                self.filesystem.get_file(path, str(folder / inside))

    @contextlib.contextmanager
    def making(self) -> Generator[Path]:
        """A folder on this machine for what is then moved or copied into this one; gone in the end.

        Raises UnreachableError where it cannot be written.
        """
        try:
            if self.local is not None:
                self.local.mkdir(parents=True, exist_ok=True)
            with beside(self.local) as temporary:
                yield temporary
        except OSError:
            with self._reaching(""):  # an error of a write alone does not say where
                raise

    @contextlib.contextmanager
    def lock(self, name: str) -> Generator[None]:
        """Hold a lock among processes of this machine; object stores have none."""
        if self.local is None:
            yield
            return
        with self._reaching(name):
            self.local.mkdir(parents=True, exist_ok=True)
            file = (self.local / name).open("w")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when its holder ends, however it ends
            yield

    @contextlib.contextmanager
    def _reaching(self, name: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # object stores raise what their client libraries raise
            place = f"{self.url.rstrip('/')}/{name}"
            advice = "check models.url and the right to read and write there"
            if isinstance(error, OSError) and error.errno in _FULL:
                advice = "make room on this machine"
            raise UnreachableError(
                f"the models folder does not answer at {place}: {error}; {advice}"
            ) from error


@contextlib.contextmanager
def beside(folder: Path | None) -> Generator[Path]:
    """A folder in another for what is moved into place when it is whole; gone in the end.

    None: among temporary files. Deletes those that writers who were killed left a day ago.
    """
    for left in folder.glob(f"{_WRITING}*") if folder else ():
        with contextlib.suppress(OSError):  # its writer was faster
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_WRITING) as temporary:
        yield Path(temporary)


def settle(folder: Path) -> None:
    """Have all files below a folder on the disk: what a power failure then leaves is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def locate(url: str) -> Storage:
    """The folder at a path or fsspec URL; raises UnreachableError for an unknown kind of URL."""
    fsspec: Any = importlib.import_module("fsspec")  # it has no types
    try:
        filesystem, root = fsspec.url_to_fs(url)  # which expands ~
    except (ValueError, ImportError) as error:
        raise UnreachableError(
            f"models.url {hide_password(url)!r} is of no kind that fsspec reaches here: {error}"
        ) from error
    return Storage(hide_password(url), filesystem, root.rstrip("/"))
