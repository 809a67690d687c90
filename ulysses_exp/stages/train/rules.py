"""What stage `train` wants before a rank starts."""

from __future__ import annotations

from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.machine import device_of
from ulysses_exp.config.schema import Config


def check(config: Config) -> None:
    """Raises ConfigError where the profiler or the search for the longest sequence cannot run."""
    if config.train.profile and config.train.steps < 3:
        raise ConfigError("train.profile", f"needs 3 steps, not {config.train.steps}", "set train.steps=3")
    if not config.longest.search:
        return
    if "train" not in config.stages:
        raise ConfigError("longest.search", "stage train does the search", "set stages=[train]")
    if config.launch.name == "attached":
        raise ConfigError(
            "longest.search", "attached ranks cannot be replaced when memory runs out", "set launch=local"
        )
    if config.longest.memory_gib is None and device_of(config) == "cpu" and config.launch.name == "local":
        raise ConfigError(
            "longest.memory_gib", "ranks on CPU share the machine's memory", "set e.g. longest.memory_gib=0.25"
        )
