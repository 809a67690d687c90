"""Which layouts the configured model, data and machine allow."""

from __future__ import annotations

from ulysses_exp.config.architecture import heads
from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.machine import accelerators, attached_ranks, device_of
from ulysses_exp.config.schema import Config
from ulysses_exp.layout import Layout


def check_layout(config: Config, layout: Layout, key: str) -> None:
    """Raises ConfigError, naming `key`, where the configured model, data or machine does not allow `layout`."""
    sizes = heads(config)
    if sizes is not None:
        query, kv = sizes
        if query % layout.sp:
            divisors = [n for n in range(1, query + 1) if query % n == 0]
            raise ConfigError(key, f"{query} query heads do not divide over sp {layout.sp}", f"set one of {divisors}")
        if kv % layout.sp and layout.sp % kv:
            good = [n for n in range(1, query + 1) if query % n == 0 and (kv % n == 0 or n % kv == 0)]
            raise ConfigError(key, f"{kv} KV heads and sp {layout.sp}: neither divides the other", f"set one of {good}")
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


def default_targets(config: Config) -> list[Layout]:
    """Three reload targets that differ from the trained layout, and from each other, in sp, dp and ZeRO stage."""
    wanted = [
        Layout(1, 1, 0),
        Layout(2, 1, 3),
        Layout(1, 2, 2),
        Layout(4, 1, 1),
        Layout(2, 1, 1),
        Layout(1, 1, 3),
        Layout(1, 1, 2),
    ]
    found: list[Layout] = []
    for layout in wanted:
        if layout != config.layout and len(found) < 3:
            try:
                check_layout(config, layout, "reload.layouts")
            except ConfigError:
                continue
            found.append(layout)
    return found


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
