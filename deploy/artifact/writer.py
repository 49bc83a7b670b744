"""Writes artifacts, completely or not at all."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import MANIFEST, RUNTIME_CACHE, FileRecord, Manifest, file_digest
from deploy.errors import DeployError, OutputError
from deploy.words import is_utf8


def check_output(out: Path, source: Artifact | None = None) -> None:
    """Raise OutputError, before any work, if `out` must not be replaced or cannot be written.

    `source` is the artifact that the output is made from: `out` must not be the source or one of its ancestors, nor lie in
    one or contain one.
    """
    if not is_utf8(out) or not is_utf8(out.resolve().name):
        raise OutputError(f"the path {out.resolve()} is not UTF-8, and what runs artifacts cannot open it; choose another `out`")
    if out.is_symlink():
        raise OutputError(f"{out} is a symbolic link; give the directory that it points to, or choose another `out`")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} exists and is not a directory; choose another `out`")
    if out.is_dir() and (entries := {path.name for path in out.iterdir()}):
        try:
            head = json.loads((out / MANIFEST).read_bytes())
            ours = isinstance(head, dict) and isinstance(head["files"], dict) and "format" in head and "digest" in head
        except (OSError, ValueError, KeyError):
            ours = False
        if not ours:
            raise OutputError(
                f"{out} exists and is not an artifact of deploy; nothing was changed: choose another `out` or remove it"
            )
        if foreign := sorted(entries - {MANIFEST, RUNTIME_CACHE, *head["files"]}):
            raise OutputError(
                f"{out} holds {foreign[0]!r} beside the artifact; nothing was changed: choose another `out` or move it"
            )
    _protect(out, source)
    folder = next(parent for parent in Path(os.path.abspath(out)).parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {folder}: {'permission denied' if folder.is_dir() else 'it is not a directory'}")


def _protect(out: Path, source: Artifact | None) -> None:
    place = Path(os.path.realpath(out))
    while source is not None:
        home = Path(os.path.realpath(source.path))
        inside = home in place.parents and source.bare is None  # beside a bare file is where its output goes
        if place == home or place in home.parents or inside:
            raise OutputError(f"{out} is, holds or lies in {source.shown}, which the output is made from; choose another `out`")
        source = source.parent()


class ArtifactWriter:
    """Writes an artifact beside `out` and moves it there in one atomic step.

        with ArtifactWriter(out) as writer:
            ...  # write files into writer.path
            artifact = writer.commit(manifest_without_files)

    If the process dies, `out` is the old artifact, the new one or missing, but never incomplete. A hidden directory
    `.NAME.*.partial` may remain beside it until the next writer of the same `out` removes it. An OSError inside the
    block (a full disk, say) becomes an OutputError, and an error that names the hidden directory names `out` instead.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.abspath(out))
        check_output(self.out)
        self._made = [parent for parent in self.out.parents if not parent.exists()]
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the directory {self.out.parent}: {error.strerror}") from error
        self._remove_stale()
        lock = None
        while lock is None:  # another writer may remove the directory before it is locked
            self.path = self.out.parent / f".{self.out.name}.{secrets.token_hex(4)}.partial"
            try:
                self.path.mkdir()
            except OSError as error:
                raise OutputError(f"cannot write to {self.out.parent}: {error.strerror}") from error
            lock = _lock(self.path)
        self._lock = lock

    def _remove_stale(self) -> None:
        for path in self.out.parent.glob(f".{self.out.name}.*.partial"):
            lock = _lock(path)
            if lock is not None:  # nobody holds the lock: the writer is dead
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)

    def __enter__(self) -> Self:
        return self

    def describe(self, manifest: Manifest) -> Artifact:
        """The files that have been written so far, hashed, as an artifact that can be opened before the commit."""
        files = {
            path.name: FileRecord(bytes=path.stat().st_size, sha256=file_digest(path)) for path in sorted(self.path.iterdir())
        }
        return Artifact(self.path, msgspec.structs.replace(manifest, files=files))

    def commit(self, manifest: Manifest) -> Artifact:
        """Seal the manifest and move the directory to `out`. Returns the artifact there.

        Hashes the files unless `manifest` lists them already, as that of `describe` does.
        """
        files = manifest.files or self.describe(manifest).manifest.files
        created = datetime.now(UTC).isoformat(timespec="seconds")
        sealed = msgspec.structs.replace(manifest, files=files, created=created).sealed()
        (self.path / MANIFEST).write_text(sealed.to_json(), encoding="utf-8")
        mode = stat.S_IMODE(self.path.stat().st_mode) & 0o666  # the directory's mode is the one that the umask gave it
        for path in self.path.iterdir():
            _set_mode(path, mode)
            _sync(path)
        _sync(self.path)
        _put_in_place(self.path, self.out)
        _sync(self.out.parent)
        return Artifact(self.out, sealed)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # the failed attempt, or the artifact that was replaced
        os.close(self._lock)
        if error is not None:
            for folder in self._made:
                with contextlib.suppress(OSError):  # it holds something else in the meantime
                    folder.rmdir()
        if isinstance(error, DeployError):
            error.args = (self._shown(str(error)),)
        if isinstance(error, OSError) or (error is not None and "No space left on device" in str(error)):
            reason = (error.strerror if isinstance(error, OSError) else None) or self._shown(str(error))
            raise OutputError(f"cannot write {self.out}: {reason}; nothing that stood there was changed") from error

    def _shown(self, message: str) -> str:
        return message.replace(str(self.path), str(self.out))


def _lock(path: Path) -> int | None:
    """Lock a directory and return its descriptor; None if another process holds the lock or the directory is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _set_mode(path: Path, mode: int) -> None:
    """Give a file the mode that follows from the umask. Libraries choose others: safetensors writes 0600.

    A file with other hard links, in a cache for example, is replaced by a copy, so that the mode of these does not change.
    """
    status = path.stat()
    if stat.S_IMODE(status.st_mode) == mode:
        return
    if status.st_nlink > 1:
        draft = path.with_name(f".{path.name}.copy")
        shutil.copyfile(path, draft)
        draft.replace(path)
    path.chmod(mode)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(new: Path, out: Path) -> None:
    """Move `new` to `out`. If `out` exists, the two change places, and `new` is the old artifact afterwards."""
    try:
        os.rename(new, out)  # nothing there, or an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2  # <fcntl.h>, <linux/fs.h>
    if libc.renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(out), rename_exchange) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(out))
    # The file system cannot exchange: for a moment there is no artifact, but never an incomplete one.
    old = new.with_name(new.name.removesuffix(".partial") + ".old.partial")
    os.rename(out, old)
    os.rename(new, out)
    os.rename(old, new)
