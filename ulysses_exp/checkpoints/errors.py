"""What a user is told when a checkpoint cannot be written or opened."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist


class CheckpointError(Exception):
    """One clear line: which file, what is wrong with it."""

    def __init__(self, where: Path | str, problem: str):
        super().__init__(f"{where}: {problem}")


def raise_together(error: CheckpointError | None) -> None:
    """Raises on every rank what the lowest rank with an error has found, so that none waits in a collective.

    Collective over the world.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if error is None else str(error))
    for message in found:
        if message is not None:
            raise CheckpointError(*message.split(": ", 1)) from error
