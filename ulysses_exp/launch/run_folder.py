"""Whose folder it is and who writes in it: what another program or another job left there is never deleted.

A folder of this project is known by a marker, a file that the runner writes before anything else and locks while it
writes there. The kernel lets go of the lock when the process ends, however it ends. Where the marker tells of another
job, what that job left is moved to `previous/1`, `previous/2`, ...; where there is no marker, nothing is touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ulysses_exp.config import ConfigError

MARKER = ".ulysses-exp.json"
PREVIOUS = "previous"

#: What a job writes into its folder
OF_A_JOB = (
    ".hydra", "results.json", "results.json.tmp", "metrics.jsonl", "metrics.jsonl.tmp", "run.log", "ranks",
    "checkpoints", "wandb", "profile", "compiled",
)  # fmt: skip

#: What a sweep writes beside the folders of its jobs
OF_A_SWEEP = ("multirun.yaml", "optimization_results.yaml", ".submitit")

_LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_PATIENCE_S = 0.3  # whoever asks whether a folder is held, holds it for an instant


@dataclass
class _Hold:
    """A marker that this process has locked."""

    descriptor: int
    new: bool  # the folder was nobody's before
    made: list[Path] = field(default_factory=list)  # folders that this process made, outermost first


_held: dict[Path, _Hold] = {}


def _forget() -> None:
    """In a fork: the lock is the parent's; a child that kept it would hold it beyond the parent's end."""
    for hold in _held.values():
        with contextlib.suppress(OSError):
            os.close(hold.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def lock(folder: Path, key: str = "hydra.run.dir", names: Iterable[str] = OF_A_JOB) -> None:
    """Makes `folder` where it is missing and takes it for this process, until `release` or its end.

    Args:
        key: of the configuration, named by errors.
        names: what will be written there; in a folder without a marker none of it may exist yet. Empty folders, and
            links to such, are no hindrance: `checkpoints/` may lie on another disk.

    Raises:
        ConfigError: the folder holds something that no run of this project wrote, another process writes in it, or
            nothing can be written there. Nothing has been touched.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    made: list[Path] = []
    try:
        made = _make(folder)
        hold = _open(folder, key, tuple(names), made)
        _held[folder] = hold
        _write(hold.descriptor, _read(hold.descriptor) | _writer())
    except (OSError, ConfigError) as error:
        if (failed := _held.pop(folder, None)) is not None:
            if failed.new:
                (folder / MARKER).unlink(missing_ok=True)
            os.close(failed.descriptor)
        _unmake(made)
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror or str(error)
        raise ConfigError(key, f"{folder} cannot be written ({reason})", "set another folder") from error


def release(folder: Path) -> None:
    """Lets others take `folder`."""
    hold = _held.pop(folder.resolve(), None)
    if hold is not None:
        os.close(hold.descriptor)


def abandon() -> None:
    """Releases what this process holds, and removes the folders that it made and wrote nothing into but the marker."""
    for folder in list(_held):
        hold = _held[folder]
        if hold.made and os.listdir(folder) == [MARKER]:
            (folder / MARKER).unlink()
            _unmake(hold.made)
        release(folder)


def begin(folder: Path, fingerprint: str, overrides: list[str], fresh: bool = False) -> tuple[bool, Path | None]:
    """Makes the locked `folder` that of the job with `fingerprint`; what another job left in it is moved aside.

    Args:
        overrides: of the job, for whoever reads the marker.
        fresh: what the same job left is moved aside, too.

    Returns:
        Whether an earlier attempt of this very job has been here, and where things were moved to, if they were.

    Raises:
        OSError: something cannot be moved; everything is where it was.
    """
    hold = _held[folder.resolve()]
    known = _read(hold.descriptor)
    same = known.get("fingerprint") == fingerprint and not fresh
    place = None if same or hold.new else set_aside(folder)
    hold.new = False
    _write(hold.descriptor, {
        "format": 1, "version": _version(), "fingerprint": fingerprint, "overrides": overrides, **_writer()
    })  # fmt: skip
    return same, place


def set_aside(folder: Path, names: Iterable[str] = OF_A_JOB) -> Path | None:
    """Moves `names`, as far as they are there, below `previous/`; returns where to. Links are moved, never followed.

    Raises:
        OSError: one of them cannot be moved; everything is where it was.
    """
    present = [name for name in names if os.path.lexists(folder / name)]
    if not present:
        return None
    place = next_place(folder)
    moved: list[str] = []
    try:
        for name in present:
            _move(folder / name, place / name)
            moved.append(name)
        (place / MARKER).write_bytes((folder / MARKER).read_bytes())
    except OSError:
        for name in reversed(moved):
            os.rename(place / name, folder / name)
        with contextlib.suppress(OSError):
            (place / MARKER).unlink(missing_ok=True)
            place.rmdir()
        raise
    return place


def next_place(folder: Path) -> Path:
    """A new folder `previous/<n>`."""
    above = folder / PREVIOUS
    above.mkdir(exist_ok=True)
    number = 1 + max((int(name) for name in os.listdir(above) if name.isdecimal()), default=0)
    (place := above / str(number)).mkdir()
    return place


def is_held(folder: Path) -> bool:
    """Whether a process writes in `folder` now."""
    if folder.resolve() in _held:
        return True
    try:
        descriptor = os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _LOCKED
    finally:
        os.close(descriptor)
    return False


def settled(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`results` of `folder` as its reader is to see them: a job that runs, but in no process, was interrupted."""
    if results.get("status") != "running" or is_held(folder):
        return results
    return results | {"status": "interrupted", "error": "the process that ran the job was ended"}


# -- the marker -------------------------------------------------------------------------------------------------------


def _open(folder: Path, key: str, names: tuple[str, ...], made: list[Path]) -> _Hold:
    """The marker of `folder`, locked. Raises ConfigError, OSError."""
    path = folder / MARKER
    while True:
        new = not os.path.lexists(path)
        if new and (found := [name for name in (*names, PREVIOUS) if _in_the_way(folder / name)]):
            shown = f"{found[0]}/" if (folder / found[0]).is_dir() else found[0]
            raise ConfigError(key, f"{folder} holds {shown}, which no run of ulysses-exp wrote", "set another folder")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        if not _lock(descriptor):
            holder = _read(descriptor)
            os.close(descriptor)
            by = f"process {holder.get('process', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"
            instead = "wait for it or set another " + ("name" if key == "sweep.name" else "folder")
            raise ConfigError(key, f"{folder} is in use by {by}", instead)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
                return _Hold(descriptor, new, made)
        os.close(descriptor)  # its process has just removed it


def _lock(descriptor: int) -> bool:
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _LOCKED:
                return True  # a file system without locks: nobody can have one
            if time.monotonic() > end:
                return False
        time.sleep(0.02)


def _read(descriptor: int) -> dict[str, Any]:
    """The marker's content; empty where it is damaged: then nobody's job continues there."""
    try:
        known = json.loads(os.pread(descriptor, 1 << 20, 0))
    except (ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(descriptor: int, content: dict[str, Any]) -> None:
    data = (json.dumps(content, indent=1) + "\n").encode()
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))


def _writer() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _version() -> str | None:
    try:
        return version("ulysses-exp")
    except PackageNotFoundError:  # run from a checkout without installing
        return None


# -- files ------------------------------------------------------------------------------------------------------------


def _in_the_way(path: Path) -> bool:
    """Whether there is something at `path`; an empty folder, or a link to one, is nothing."""
    return os.path.lexists(path) and not (path.is_dir() and not os.listdir(path))


def _make(folder: Path) -> list[Path]:
    """Makes `folder`; returns it and those of its parents that were missing, outermost first. Raises OSError."""
    missing = []
    place = folder
    while not place.exists():
        missing.append(place)
        place = place.parent
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.append(path)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(folder))
    except OSError:
        _unmake(made)
        raise
    return made


def _unmake(made: list[Path]) -> None:
    for path in reversed(made):
        with contextlib.suppress(OSError):  # somebody else has put something there
            path.rmdir()


def _move(path: Path, to: Path) -> None:
    """Renames; a link that leads from where it lies still leads there."""
    if path.is_symlink() and not os.path.isabs(target := os.readlink(path)):
        os.symlink(os.path.join(path.parent.resolve(), target), to)
        path.unlink()
    else:
        os.rename(path, to)
