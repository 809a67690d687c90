"""Step time, tokens a second and MFU of layers as in Llama 8B, from 8 K tokens to the longest that fits."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_steps import ranks
from gpu_steps.lengths import measured, shape
from gpu_steps.step import Row, Setting

LAYERS = 4
LONGEST_STEP_S = 60.0


def parts(setting: Setting) -> list[str]:
    return setting.pick(["checkpointing", "alst"], ["alst"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: a choice of `memory`."""
    lengths = setting.pick([8192 * 2**n for n in range(9)], [128, 256, 512])
    config = ranks.configured(setting, *shape(setting, LAYERS, f"memory={part}", f"train.seq_len={lengths[0]}"))
    for row in ranks.rows(setting, part, config, measured, lengths, LONGEST_STEP_S):
        yield {"memory": part, **row}
