"""Which layouts the configured model, data and machine allow."""

from __future__ import annotations

from ulysses_exp.config.architecture import heads
from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.machine import accelerators, attached_ranks, device_of
from ulysses_exp.config.model_rules import key_of
from ulysses_exp.config.schema import Config
from ulysses_exp.layout import Layout


def check_layout(config: Config, layout: Layout, key: str) -> None:
    """Raises ConfigError, naming `key`, where the configured model, data or machine does not allow `layout`."""
    sizes = heads(config)
    if sizes is not None and sizes[0] % sizes[1]:
        where = key_of(config, "num_key_value_heads")
        raise ConfigError(where, f"{sizes[1]} KV heads do not divide {sizes[0]} query heads", "set a divisor")
    if sizes is not None and config.sp.exchange == "deepspeed":  # ours takes any
        query, kv = sizes
        if query % layout.sp:
            divisors = [n for n in range(1, query + 1) if query % n == 0]
            problem = f"{query} query heads do not divide over sp {layout.sp} in sp.exchange=deepspeed"
            raise ConfigError(key, problem, f"set one of {divisors}, or sp.exchange=fused")
        if kv % layout.sp and layout.sp % kv:
            good = [n for n in range(1, query + 1) if query % n == 0 and (kv % n == 0 or n % kv == 0)]
            problem = f"{kv} KV heads and sp {layout.sp}: neither divides the other, as sp.exchange=deepspeed wants"
            raise ConfigError(key, problem, f"set one of {good}, or sp.exchange=fused")
    if config.sp.attention == "transformers" and layout.sp > 1:
        problem = "transformers' own attention makes masks of n x n, which Ulysses cannot shard"
        raise ConfigError(
            "sp.attention", problem, "set sp.attention=auto, or sp.size=1 and reload.layouts with sp1 only"
        )
    length, batch, micro = config.train.seq_len, config.train.global_batch_size, config.train.micro_batch_size
    if length % layout.sp:
        shorter, longer = (length // layout.sp * layout.sp or layout.sp), (length // layout.sp + 1) * layout.sp
        raise ConfigError(
            "train.seq_len" if key == "sp.size" else key,
            f"{length} tokens do not divide over sp {layout.sp}",
            f"set train.seq_len={shorter} or {longer}",
        )
    share = layout.dp * micro
    if batch % share:
        raise ConfigError(
            "train.global_batch_size" if key == "sp.size" else key,
            f"{batch} sequences do not divide over dp {layout.dp} x micro batch {micro}",
            f"set train.global_batch_size to a multiple of {share}",
        )
    alone = config.launch.backend == "auto"  # NCCL refuses two ranks on one GPU
    if config.launch.name == "local" and device_of(config) == "cuda" and alone and layout.world > accelerators():
        raise ConfigError(
            key,
            f"{layout.name} needs {layout.world} GPUs, {accelerators()} are present",
            "set device=cpu, smaller sp.size and dp.size, or launch.backend=gloo to share them",
        )
    if config.launch.name == "attached" and layout.world > (there := attached_ranks() or layout.world):
        raise ConfigError(
            key, f"{layout.name} needs {layout.world} ranks, {there} are attached", "set smaller sp.size and dp.size"
        )
    if config.launch.name == "local" and layout.world > 64:
        raise ConfigError(
            key, f"{layout.world} ranks on one machine", "set sp.size x dp.size to at most 64, or launch=attached"
        )


def check_after_train(config: Config, stage: str, needs_source: bool = True) -> None:
    """Raises ConfigError where `stage`, one of the job's, comes before train, or has no checkpoint to work on."""
    if stage not in config.stages:
        return
    if "train" not in config.stages:
        if needs_source and config.checkpoint.source is None:
            problem = f"stage {stage} without train has nothing to work on"
            raise ConfigError("checkpoint.source", problem, "set checkpoint.source=<run folder>")
    elif config.stages.index(stage) < config.stages.index("train"):
        raise ConfigError("stages", "eval and reload come before train", "set stages=[train,eval,reload]")
