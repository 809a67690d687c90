"""The typed configuration, and every rule that can be checked before a rank starts.

Imports neither torch nor transformers: a wrong configuration answers in about a second.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from ulysses_exp.layout import Layout

STAGES = ("train", "eval", "reload", "parity", "plan")
EVAL_MODES = ("bypass", "sp", "both", "auto", "none")


class ConfigError(Exception):
    """A configuration that cannot run: which key, what is wrong with it and what to set instead."""

    def __init__(self, key: str, problem: str, instead: str):
        super().__init__(f"{key}: {problem}; {instead}")
        self.key = key


@dataclass
class ModelConfig:
    name: str = MISSING
    architecture: dict[str, Any] = field(default_factory=dict)  # model_type and the arguments of its transformers config
    name_or_path: str | None = None  # a local folder or a hub name; then `architecture` is empty
    pretrained: bool = True  # with name_or_path: load its weights, or only its shape with random weights
    trust_remote_code: bool = False


@dataclass
class SequenceParallelConfig:
    size: int = 2
    attention: str = "sdpa"
    exchange: str = "deepspeed"


@dataclass
class DataParallelConfig:
    size: int = 1


@dataclass
class ZeroConfig:
    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass
class EvalConfig:
    mode: str = "both"
    sequences: int = 4


@dataclass
class DataConfig:
    name: str = MISSING
    ignore_labels: float = 0.0  # upper end of the share of a sequence's leading labels that are -100, as in prompts
    padding: str = "none"  # none, left or right: sequences of random length, padded to train.seq_len
    mean_document: int = 128  # packed: mean length of a document in tokens
    dataset: str | None = None  # hub: a datasets name or a local folder
    subset: str | None = None
    split: str = "train"
    eval_split: str | None = None
    text_column: str = "text"
    tokenizer: str | None = None  # hub: null takes the model's own


@dataclass
class MemoryConfig:
    name: str = MISSING
    checkpointing: str = "none"  # none, non_reentrant, reentrant
    offload_activations: bool = False
    tiled_mlp: int = 0  # tiles along the sequence, 0: off
    tiled_loss: int = 0  # tiles along the sequence, 0: off


@dataclass
class TrainConfig:
    seq_len: int = 512
    steps: int = 20
    global_batch_size: int = 4
    micro_batch_size: int = 1
    precision: str = "fp32"
    unmeasured_steps: int = 3  # first steps left out of medians: allocators and caches warm up
    log_every: int = 1
    compile: bool = False
    profile: bool = False


@dataclass
class OptimConfig:
    name: str = MISSING
    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.0
    grad_clip: float = 1.0  # 0: off
    schedule: str = "constant"  # constant, linear, cosine
    warmup_steps: int = 0


@dataclass
class CheckpointConfig:
    source: str | None = None
    every: int = 0  # optimizer steps between saves during training, 0: only at the end
    keep: int = 2
    trust_pickle: bool = False  # open DeepSpeed's own (pickled) files of `source`


@dataclass
class ReloadConfig:
    layouts: list[str] = field(default_factory=lambda: ["sp1-dp1-z0", "sp2-dp1-z3", "sp1-dp2-z2"])
    steps: int = 3  # continuation compared with the uninterrupted run


@dataclass
class ParityConfig:
    steps: int = 3
    tolerance: float | None = None  # relative; null: 1e-6 in fp32, 2e-2 in bf16


@dataclass
class PlanConfig:
    hardware: str = "h100"
    search: bool = True


@dataclass
class TrackerConfig:
    mode: str = "offline"
    project: str = "ulysses-exp"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LaunchConfig:
    name: str = MISSING
    timeout_s: int = 600  # a collective that waits longer fails: one rank has stalled
    partition: str | None = None  # slurm
    account: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    time_min: int = 60


@dataclass
class SweepConfig:
    name: str | None = None
    rerun: str = "changed"  # changed (and failed, interrupted), failed, all


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    sp: SequenceParallelConfig = field(default_factory=SequenceParallelConfig)
    dp: DataParallelConfig = field(default_factory=DataParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stages: list[str] = field(default_factory=lambda: ["train", "eval", "reload"])
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    reload: ReloadConfig = field(default_factory=ReloadConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    device: str = "auto"
    seed: int = 0

    @property
    def layout(self) -> Layout:
        return Layout(self.sp.size, self.dp.size, self.zero.stage)

    @property
    def accumulation(self) -> int:
        return self.layout.accumulation(self.train.global_batch_size, self.train.micro_batch_size)


ConfigStore.instance().store(name="schema", node=Config)
