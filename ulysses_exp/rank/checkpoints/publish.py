"""A folder appears under its name complete or not at all, whenever the machine stops."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

LATEST = "latest"


def begin(folder: Path) -> Path:
    """An empty folder beside `folder` to write into; the remains of an earlier attempt go."""
    temporary = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, folder: Path, keep: int | None) -> None:
    """Gives `temporary`, whose safetensors files are synced, its name, moves `latest`, removes what is too old.

    Args:
        keep: how many `step<N>` folders stay, this one included; None keeps all.
    """
    sync_small(temporary)
    if folder.exists():
        _exchange(temporary, folder)
        shutil.rmtree(temporary)
    else:
        temporary.rename(folder)
    _sync(folder.parent)
    pointer = folder.parent / f".{LATEST}.partial"
    with pointer.open("w") as file:
        file.write(folder.name)
        file.flush()
        os.fsync(file.fileno())
    pointer.rename(folder.parent / LATEST)
    _sync(folder.parent)
    if keep is not None:
        steps = [p for p in folder.parent.glob("step*") if p.name.removeprefix("step").isdigit() and p != folder]
        steps.sort(key=lambda p: int(p.name.removeprefix("step")), reverse=True)
        for old in steps[max(0, keep - 1) :]:
            shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> None:
    """Swaps two names in one step where the file system can; else `b` is missing for a moment."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is not None and renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
        return
    aside = b.parent / f".{b.name}.replaced"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(aside)
    b.rename(aside)
    a.rename(b)
    aside.rename(a)


def sync_small(folder: Path) -> None:
    """Brings all below `folder` to disk, names too, except the safetensors files, which their writers sync."""
    for path, _, files in os.walk(folder, topdown=False):
        for file in files:
            if not file.endswith(".safetensors"):
                _sync(Path(path, file))
        _sync(Path(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
