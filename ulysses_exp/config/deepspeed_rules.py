"""DeepSpeed's own keys that a job may set: what moves bytes and time, and changes neither layout nor numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ulysses_exp.config.errors import ConfigError, nearest
from ulysses_exp.config.schema import Config

#: Of `zero_optimization` (deepspeed/runtime/zero/config.py, 0.19.8), with their type
ZERO: dict[str, type] = {
    "overlap_comm": bool,  # reduce beside the backward; DeepSpeed's default is stage 3 alone
    "reduce_bucket_size": int,  # elements
    "allgather_bucket_size": int,
    "contiguous_gradients": bool,
    "round_robin_gradients": bool,
    "sub_group_size": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_prefetch_bucket_size": int,
}

#: Keys that another key of a job decides
_ELSEWHERE = {
    "train_batch_size": "set train.global_batch_size",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size",
    "gradient_accumulation_steps": "set train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "set optim.grad_clip",
    "optimizer": "set optim",
    "scheduler": "set optim.schedule",
    "bf16": "set train.precision",
    "fp16": "set train.precision=bf16 or fp32",
    "activation_checkpointing": "set memory",
    "zero_optimization.stage": "set zero.stage",
    "zero_optimization.offload_optimizer": "set zero=stage2_offload",
    "zero_optimization.offload_param": "set zero=stage3_offload",
    "zero_optimization.stage3_param_persistence_threshold": "set zero.param_persistence_threshold",
}


def check(config: Config) -> None:
    """Raises ConfigError for a key of `deepspeed` that is not for a job to set, or a value of another type."""
    for name, value in config.deepspeed.items():
        if name != "zero_optimization" or not isinstance(value, Mapping):
            raise _refused(name)
        for inner, setting in value.items():
            key = f"zero_optimization.{inner}"
            if inner not in ZERO:
                raise _refused(key)
            kind = ZERO[inner]
            if type(setting) is not kind or (isinstance(setting, int) and not 0 <= setting <= 10**12):
                shown = "true or false" if kind is bool else "a whole number"
                raise ConfigError(f"deepspeed.{key}", f"{str(setting)[:40]!r} is no value of it", f"set {shown}")


def merged(told: dict[str, Any], config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration `told` with the job's own keys over it."""
    zero = config.deepspeed.get("zero_optimization", {})
    return told | {"zero_optimization": told["zero_optimization"] | dict(zero)}


def _refused(key: str) -> ConfigError:
    known = [f"zero_optimization.{name}" for name in ZERO]
    instead = _ELSEWHERE.get(key) or f"{nearest(key, known)} (any other would change what is measured)"
    return ConfigError(f"deepspeed.{key}", "is not for a job to set", instead)
