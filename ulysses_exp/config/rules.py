"""Every rule that can be checked before a rank starts and needs nothing but the configuration.

What a stage wants beside is in its own folder (`stages/<name>/rules.py`).
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Collection
from dataclasses import asdict, replace

from omegaconf import DictConfig

from ulysses_exp.config import bounds, deepspeed_rules, fitting, model_rules, redaction, stages
from ulysses_exp.config.architecture import check_objective, text_architecture
from ulysses_exp.config.errors import ConfigError, nearest
from ulysses_exp.config.keys import typed
from ulysses_exp.config.layout_rules import check_layout
from ulysses_exp.config.machine import accelerators, device_of
from ulysses_exp.config.paths import matching
from ulysses_exp.config.received import foreign
from ulysses_exp.config.schema import Config

DATA = ("text", "packed", "synthetic", "hub")


EVAL_MODES = ("bypass", "sp", "both", "auto", "none")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(key, f"{value[:60]!r} is not a choice", nearest(value, list(choices)))


def resolve(cfg: DictConfig, given: Collection[str] = ()) -> Config:
    """The typed and checked configuration of one job, its defaults filled in.

    Args:
        given: the overrides of the command line; what they set is no default.

    Raises:
        ConfigError: it cannot run; nothing has been started or written.
    """
    config = typed(cfg)
    redaction.check_configuration(asdict(config))
    check(config)
    fitting.settle(config, given)
    return config


def check(config: Config) -> None:
    """Raises ConfigError for the first rule that the configuration breaks. Touches no accelerator, starts nothing."""
    c = config
    bounds.check(c)
    of_stages = stages.of(c)
    if len(set(c.stages)) != len(c.stages) or not c.stages:
        raise ConfigError("stages", "needs each stage once" if c.stages else "is empty", "set e.g. stages=[train,eval]")
    if c.zero.offload_optimizer and c.zero.stage == 0:
        raise ConfigError("zero.offload_optimizer", "stage 0 shards no optimizer states", "set zero.stage to 1, 2 or 3")
    if c.zero.offload_parameters and c.zero.stage != 3:
        raise ConfigError("zero.offload_parameters", f"stage {c.zero.stage} shards no weights", "set zero.stage=3")
    deepspeed_rules.check(c)
    _choice("data.name", c.data.name, DATA)
    _choice("optim.name", c.optim.name, ("adamw", "sgd"))
    _choice("launch.name", c.launch.name, ("local", "attached", "slurm"))
    _choice("sp.exchange", c.sp.exchange, ("deepspeed", "fused"))
    _choice("eval.mode", c.eval.mode, EVAL_MODES)
    _choice("device", c.device, ("auto", "cpu", "cuda"))
    _choice("train.precision", c.train.precision, ("fp32", "bf16"))
    _choice("train.on_nonfinite", c.train.on_nonfinite, ("stop", "skip", "keep"))
    _choice("tracker.mode", c.tracker.mode, ("offline", "online", "disabled"))
    _choice("launch.start", c.launch.start, ("fork", "spawn"))
    _choice("launch.backend", c.launch.backend, ("auto", "gloo"))
    _choice("launch.cluster", c.launch.cluster, ("slurm", "local"))
    _choice("sweep.rerun", c.sweep.rerun, ("changed", "failed", "all"))
    _choice("data.padding", c.data.padding, ("none", "left", "right"))
    _choice("memory.checkpointing", c.memory.checkpointing, ("none", "non_reentrant", "reentrant"))
    _choice("optim.schedule", c.optim.schedule, ("constant", "linear", "cosine"))
    if c.train.compile and device_of(c) == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ConfigError("train.compile", "needs a C++ compiler on CPU", "install g++, or set train.compile=false")
    if c.optim.schedule != "constant" and c.optim.warmup_steps >= c.train.steps:
        problem = f"{c.optim.warmup_steps} steps leave none of train.steps={c.train.steps} to optim.schedule"
        raise ConfigError("optim.warmup_steps", problem, "set fewer, or more train.steps")
    if c.optim.name == "adamw" and c.optim.momentum:
        raise ConfigError("optim.momentum", "AdamW has betas instead", "set optim.beta1, or optim=sgd")
    if c.memory.offload_activations and c.memory.checkpointing == "none":
        raise ConfigError(
            "memory.offload_activations", "nothing is checkpointed", "set memory.checkpointing=non_reentrant"
        )
    here = c.launch.name == "local"  # else the ranks run on machines that this one knows nothing of
    if here and device_of(c) == "cpu" and c.memory.snapshot:
        raise ConfigError(
            "memory.snapshot", "notes what CUDA's allocator does, and the ranks run on CPU", "set memory.snapshot=false"
        )
    if c.sp.attention == "eager":
        raise ConfigError(
            "sp.attention", "eager needs an O(n^2) mask, which Ulysses cannot shard", "set sp.attention=sdpa"
        )
    if here and device_of(c) == "cpu" and "flash" in c.sp.attention:
        raise ConfigError("sp.attention", f"{c.sp.attention} needs a GPU", "set sp.attention=sdpa")
    if here and device_of(c) == "cpu" and c.sp.attention == "flex_attention" and any(s.trains for s in of_stages):
        raise ConfigError(
            "sp.attention", "flex_attention has no backward on CPU", "set sp.attention=sdpa, or stages=[eval]"
        )
    if here and c.device == "cuda" and not accelerators():
        raise ConfigError("device", "no GPU is present", "set device=cpu or device=auto")
    if c.model.name == "hub" and not c.model.name_or_path:
        raise ConfigError("model.name_or_path", "model=hub names no model", "set a local folder or a hub name")
    if c.data.name == "packed" and c.data.padding != "none":
        # transformers sees documents only where there is no padding mask: sp 1 and sp 2 would train different models
        raise ConfigError("data.padding", "packed sequences are full", "set data.padding=none, or data=text")
    foreign.check(c)
    known = text_architecture(c)
    model_rules.check_given(c, known)
    check_objective(c, known)
    if c.data.name == "hub" and not c.data.dataset:
        raise ConfigError("data.dataset", "data=hub names no dataset", "set a local folder or a hub name")
    if c.model.name_or_path is None and "model_type" not in c.model.architecture:
        raise ConfigError("model.architecture", "has no model_type", "set model.architecture.model_type, or model=hub")
    if c.launch.name == "slurm" and importlib.util.find_spec("submitit") is None:
        raise ConfigError("launch", "launch=slurm needs submitit", "pip install 'ulysses-exp[slurm]', or launch=local")
    if c.data.name == "hub" and importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            "data", "data=hub needs the package datasets", "pip install 'ulysses-exp[hub]', or set data=text"
        )
    bytes_wanted = c.data.name in ("text", "packed") and c.data.tokenizer is None and c.model.name_or_path is None
    if bytes_wanted and int(c.model.architecture.get("vocab_size") or 256) < 256:
        raise ConfigError("model.architecture.vocab_size", "is smaller than the 256 byte tokens", "set at least 256")
    of_this_machine = c if stages.starts_ranks(c) else replace(c, launch=replace(c.launch, name="slurm"))
    check_layout(of_this_machine, c.layout, "sp.size")
    if c.checkpoint.source is not None and not matching(c.checkpoint.source):
        raise ConfigError(
            "checkpoint.source",
            f"{c.checkpoint.source!r} does not exist",
            "set a run folder, e.g. outputs/...",
        )
    stages.check(c)
    fitting.check(c)
