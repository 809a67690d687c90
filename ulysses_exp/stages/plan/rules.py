"""What stage `plan` wants before it begins."""

from __future__ import annotations

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.hardware import load
from ulysses_exp.config.schema import Config

#: DeepSpeed makes lists of all ranks: tracing takes time and memory in proportion to them.
PLANNED_RANKS = 4096


def check(config: Config) -> None:
    """Raises ConfigError for a machine that is not known, and for more ranks than can be traced."""
    if "plan" not in config.stages:
        return
    load(config.plan.hardware)
    if config.layout.world > PLANNED_RANKS:
        problem = f"{config.layout.world:,} ranks are more than the {PLANNED_RANKS:,} that stage plan traces"
        raise ConfigError("dp.size", problem, f"set dp.size={max(1, PLANNED_RANKS // config.layout.sp)} or less")
