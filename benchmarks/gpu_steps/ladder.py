"""What each memory saver costs in time and saves in memory, at two lengths."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_steps import ranks
from gpu_steps.lengths import measured, shape
from gpu_steps.step import Row, Setting

LAYERS = 2


def parts(setting: Setting) -> list[str]:
    return setting.pick(["none", "checkpointing", "tiled_loss", "tiled_mlp", "alst"], ["none", "tiled_mlp"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: a choice of `memory`."""
    lengths = setting.pick([16384, 65536], [256])
    config = ranks.configured(setting, *shape(setting, LAYERS, f"memory={part}", f"train.seq_len={lengths[0]}"))
    for row in ranks.rows(setting, part, config, measured, lengths, 600.0):
        yield {"memory": part, **row}
