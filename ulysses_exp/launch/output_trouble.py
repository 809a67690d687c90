"""What is said when the place that results go to is full, read-only or gone."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

#: Errors of a place, not of this project
_OF_THE_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOLINK, errno.ESTALE)


class OutputError(Exception):
    """One line: what cannot be written and why."""


def of_the_place(error: BaseException) -> bool:
    """Whether `error` says that a disk is full, broken or read-only."""
    return isinstance(error, OSError) and error.errno in _OF_THE_PLACE


def said(error: OSError, path: Path | None = None) -> str:
    """One line for the user, e.g. `/data/run/results.json cannot be written: No space left on device`.

    Args:
        path: what was being written, where the error does not tell.
    """
    where = error.filename or path
    reason = error.strerror or str(error)
    if where is None:
        full = full_places([Path("/dev/shm"), Path(tempfile.gettempdir())])
        return f"{full[0]} is full: {reason}" if full else f"a file cannot be written: {reason}"
    return f"{os.fsdecode(where)} cannot be written: {reason}"


def full_places(places: list[Path]) -> list[Path]:
    """Those of `places` without a free block or file."""
    found = []
    for place in places:
        with contextlib.suppress(OSError):
            disk = os.statvfs(place)
            if disk.f_bavail * disk.f_frsize < 4096 or (disk.f_files and not disk.f_favail):
                found.append(place)
    return found


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """A block that writes `path`: OutputError, one line, in place of the OSError that says the place is full."""
    try:
        yield
    except OSError as error:
        if not of_the_place(error):
            raise
        raise OutputError(said(error, path)) from error


class _Forgiving:
    """A stream whose reader may go away, or whose disk may fill up: what is written then goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """The descriptor leads nowhere from now on, so that what is still buffered is no error at the end either."""
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """While open, a terminal that is gone, or a full file behind stdout, does not end what is being done."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the first file that a job opens would get its number, and what others print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    streams = [_Forgiving(stream) if stream is not None else io.StringIO() for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before
