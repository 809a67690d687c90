"""Where jobs write: their outputs, shared memory, the temporary folder, the home."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ulysses_exp.config import device_of
from ulysses_exp.doctor.finding import Asked, Finding, existing, ok, warning, wrong
from ulysses_exp.report.units import of_bytes

_PROBE_BYTES, _PROBE_SECONDS = 32 * 2**20, 2.0
_LITTLE = 2**30  # bytes of disk
_SHARED_MEMORY = 64 * 2**20  # what Docker gives a container; nccl takes more than that between GPUs of a machine


def check(asked: Asked) -> Iterator[Finding]:
    """Space, writability and, for outputs, the rate at which bytes reach the disk."""
    yield _outputs(asked.outputs)
    yield _shared_memory(device_of(asked.config) == "cuda")
    yield _temporary()
    yield _home()


def _outputs(outputs: Path) -> Finding:
    folder = existing(outputs)
    here = os.statvfs(folder)
    free = here.f_bavail * here.f_frsize
    said = f"{folder}: {of_bytes(free)} free"
    elsewhere = "work in another folder, or set hydra.run.dir and hydra.sweep.dir"
    if here.f_files and not here.f_favail:
        return wrong("outputs", f"{said}, but not one file more (inodes)", f"remove files, or {elsewhere}")
    try:
        rate = _write_rate(folder)
    except OSError as error:
        return wrong("outputs", f"{said}, cannot be written: {error.strerror}", elsewhere)
    said += f", {of_bytes(rate)}/s to the disk (write and fsync)"
    if free < _LITTLE:
        return warning("outputs", said, f"make room for checkpoints, or {elsewhere}")
    return ok("outputs", said, free_bytes=free, bytes_per_second=rate)


def _write_rate(folder: Path) -> float:
    """Bytes a second of a file that is synced, written for two seconds at most. Raises OSError."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".ulysses-exp-doctor-") as file:
        began, written = time.perf_counter(), 0
        while written < _PROBE_BYTES and time.perf_counter() - began < _PROBE_SECONDS:
            written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return written / (time.perf_counter() - began)


def _shared_memory(gpus: bool) -> Finding:
    place = "/dev/shm"
    if not os.path.isdir(place):
        return wrong(place, "is missing, and Python's semaphores lie there", f"mount -t tmpfs tmpfs {place}")
    if not _writable(place):
        return wrong(place, "cannot be written, and Python's semaphores lie there", f"chmod 1777 {place}")
    here = os.statvfs(place)
    size, free = here.f_blocks * here.f_frsize, here.f_bavail * here.f_frsize
    said = f"{of_bytes(free)} free of {of_bytes(size)}"
    if free < 2**20 or (gpus and free <= _SHARED_MEMORY):
        return warning(place, said, "remove what lies there, or give the container more: docker run --shm-size=1g")
    return ok(place, said, free_bytes=free)


def _temporary() -> Finding:
    try:
        folder = tempfile.gettempdir()
    except OSError:
        return wrong("temporary", "no folder for temporary files can be written", "export TMPDIR=<a folder>")
    named = os.environ.get("TMPDIR")
    if named and not _writable(named):
        return warning("temporary", f"TMPDIR={named} cannot be written, {folder} is taken", "unset TMPDIR")
    return ok("temporary", f"{folder}: {of_bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize)} free")


def _home() -> Finding:
    home = os.path.expanduser("~")
    if not _writable(home):
        return warning("HOME", f"{home} cannot be written: no caches, no W&B login", "export HOME=<a folder>")
    return ok("HOME", home)


def _writable(folder: str) -> bool:
    """Tried, for access(2) tells root that a read-only file system can be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ulysses-exp-doctor-"):
            return True
    except OSError:
        return False
