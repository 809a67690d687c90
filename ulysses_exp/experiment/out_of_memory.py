"""What a user can set where memory ran out."""

from __future__ import annotations

from collections.abc import Iterator

from ulysses_exp.config import Config, ConfigError, check_layout
from ulysses_exp.layout import Layout

_TOLD = 3


def advice(config: Config) -> str:
    """Settings that the job does not have yet, e.g. `set memory=alst, zero.stage=3 or sp.size=4`."""
    found = [setting for setting, _ in zip(_settings(config), range(_TOLD), strict=False)]
    return f"set {', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else f"set {found[0]}"


def _settings(config: Config) -> Iterator[str]:
    """What takes less memory, the most first; nothing changes a number."""
    memory, zero, train = config.memory, config.zero, config.train
    if memory.checkpointing == "none":
        yield "memory=checkpointing"
    if not (memory.tiled_mlp and memory.tiled_loss):
        yield "memory=alst"
    if train.micro_batch_size > 1:
        yield "train.micro_batch_size=1"
    if zero.stage < 3 and config.layout.world > 1:
        yield "zero.stage=3"
    if zero.stage == 3 and not zero.offload_optimizer:
        yield "zero=stage3_offload"
    wider = Layout(2 * config.sp.size, config.dp.size, zero.stage)
    try:
        check_layout(config, wider, "sp.size")
        yield f"sp.size={wider.sp}"
    except ConfigError:
        pass  # the model or the machine has no more
    yield f"train.seq_len={max(2, train.seq_len // 2)}"
