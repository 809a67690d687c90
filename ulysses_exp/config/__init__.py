"""What a job is: the typed configuration, and every rule that can be checked before a rank starts.

Imports neither torch nor transformers.
"""

from ulysses_exp.config.architecture import architecture, check_objective, heads, text_architecture
from ulysses_exp.config.errors import ConfigError, nearest
from ulysses_exp.config.keys import doors, known_keys, typed
from ulysses_exp.config.layout_rules import check_layout
from ulysses_exp.config.machine import accelerators, attached_ranks, device_of
from ulysses_exp.config.rules import check, resolve
from ulysses_exp.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataParallelConfig,
    EvalConfig,
    LaunchConfig,
    LongestConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    OptimizeConfig,
    ParityConfig,
    PlanConfig,
    ReloadConfig,
    SequenceParallelConfig,
    SweepConfig,
    TrackerConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "CheckpointConfig", "Config", "ConfigError", "DataConfig", "DataParallelConfig", "EvalConfig", "LaunchConfig",
    "LongestConfig", "MemoryConfig", "ModelConfig", "OptimConfig", "OptimizeConfig", "ParityConfig", "PlanConfig",
    "ReloadConfig", "SequenceParallelConfig", "SweepConfig", "TrackerConfig", "TrainConfig", "ZeroConfig",
    "accelerators", "architecture", "attached_ranks", "check", "check_layout", "check_objective", "device_of", "doors",
    "heads", "known_keys", "nearest", "resolve", "text_architecture", "typed",
]  # fmt: skip
