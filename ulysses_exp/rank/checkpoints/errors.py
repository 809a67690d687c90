"""What one rank finds wrong with a checkpoint, all of them raise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from ulysses_exp.config.received.manifest import CheckpointError


def raise_together(error: CheckpointError | None) -> None:
    """Raises on every rank what the lowest rank with an error has found, so that none waits in a collective.

    Collective over the world.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    found: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if error is None else (error.where, error.problem))
    for words in found:
        if words is not None:
            raise CheckpointError(*words) from error


@contextlib.contextmanager
def written_together(folder: Path) -> Iterator[None]:
    """A block in which a rank may fail to write; then all ranks raise the same CheckpointError at its end."""
    error = None
    try:
        yield
    except OSError as failure:
        error = CheckpointError(folder, f"the checkpoint cannot be written: {failure.strerror or failure}")
    except CheckpointError as failure:
        error = failure
    raise_together(error)
