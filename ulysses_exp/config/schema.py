"""The typed configuration: every key, its type and its default.

Imports neither torch nor transformers: a wrong configuration answers in about half a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from ulysses_exp.layout import Layout


def _door(closed: Any, opens: Callable[[Any], bool] = bool) -> Any:
    """A setting that can let somebody else's code in, or data out; `opens` says which values do.

    It is opened by the user of a job alone, never by a run folder that the job starts from.
    """
    return field(default=closed, metadata={"opens": opens})


@dataclass
class ModelConfig:
    name: str = MISSING
    architecture: dict[str, Any] = field(
        default_factory=dict
    )  # model_type and the arguments of its transformers config
    name_or_path: str | None = None  # a local folder or a hub name; then `architecture` overrides its configuration
    pretrained: bool = True  # with name_or_path: load its weights, or only its shape with random weights
    trust_remote_code: bool = _door(False)
    # names or patterns of pretrained weights that may be missing, left over, of another shape or not finite
    allow_missing: list[str] = field(default_factory=list)


@dataclass
class SequenceParallelConfig:
    size: int = 2
    attention: str = _door("sdpa", lambda name: "/" in str(name))  # a name with a slash is code on a hub
    exchange: str = "fused"


@dataclass
class DataParallelConfig:
    size: int = 1


@dataclass
class ZeroConfig:
    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    param_persistence_threshold: int = 100_000  # stage 3: smaller tensors (elements) stay gathered between uses


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
    tiled_mlp: int = 0  # tiles along the sequence, 0: off, -1: of 4,096 tokens each (four at least)
    tiled_loss: int = 0  # the same
    loss_in_place: bool = True  # the loss's gradient takes the place of the logits, which are then in memory once
    expandable_segments: bool = True  # CUDA: the allocator grows its segments, so less is lost to fragments
    snapshot: bool = False  # CUDA: note allocations; a rank whose memory runs out leaves them in the run folder


@dataclass
class TrainConfig:
    seq_len: int = 512
    steps: int = 20
    global_batch_size: int = 4
    micro_batch_size: int = 1
    precision: str = "fp32"
    on_nonfinite: str = "stop"  # a step whose loss or gradient norm is not finite: stop, skip its update, or keep going
    unmeasured_steps: int = 3  # first steps left out of medians: allocators and caches warm up
    log_every: int = 1  # steps between two looks at the device's figures; their times are means over the interval
    compile: bool = False  # torch.compile decoder layers; a minute on CPU, seconds where TORCHINDUCTOR_CACHE_DIR has it
    profile: bool = False  # torch profiler trace of two steps, and where their time goes


@dataclass
class LongestConfig:
    search: bool = False  # stage train first finds the longest sequence that trains, then trains at that length
    memory_gib: float | None = None  # what model, engine and activations of a rank may take; null: all that its GPU has
    plan: bool = True  # the first guess is what stage plan would say, where memory_gib is set; else train.seq_len
    steps: int = 2  # optimizer steps that a length has to train
    within: float = 0.05  # how close, relative, the longest that trains is to a length that does not


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
    on_signal_s: int = 120  # seconds for a checkpoint after SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2; 0: none is saved
    trust_pickle: bool = _door(False)  # open DeepSpeed's own (pickled) files of `source`


@dataclass
class ReloadConfig:
    layouts: list[str] | None = None  # null: three that differ from the trained one in sp, dp and stage
    steps: int = 3  # continuation compared with the uninterrupted run


@dataclass
class ParityConfig:
    steps: int = 3
    reference: str = "sp1-dp1-z0"  # one process; sp1-dp1-z3 with zero.offload_* where the model needs host memory
    tolerance: float | None = None  # relative; null: 1e-6 in fp32 with SGD, by noise in bf16 (parity/comparison.py)


@dataclass
class ClaimsConfig:
    layouts: list[str] | None = None  # where each claim is measured; null: sp 1, 2 and 4 at ZeRO 0 to 3


@dataclass
class PlanConfig:
    hardware: str = "h100"
    search: bool = True


@dataclass
class TrackerConfig:
    mode: str = _door("offline", lambda mode: mode == "online")
    project: str = "ulysses-exp"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LaunchConfig:
    name: str = MISSING
    start: str = "fork"  # ranks as forks of a process that has imported what they need; spawn: each imports it itself
    backend: str = "auto"  # between GPUs NCCL; gloo: by way of host memory, and ranks may share a GPU
    timeout_s: int = 600  # ranks that neither compute nor give a sign of life for longer end the job
    cluster: str = "slurm"  # submitit's: slurm, or local to try a submission on this machine
    partition: str | None = None
    account: str | None = None
    gpus_per_node: int = 8
    cpus_per_task: int | None = None  # cores of each rank; null: 8 beside a GPU, what Slurm gives on CPU
    mem_gb: int | None = None  # of each node; null: what the partition gives
    time_min: int = 60


@dataclass
class SweepConfig:
    name: str | None = None
    rerun: str = "changed"  # changed (and failed, interrupted), failed, all


@dataclass
class OptimizeConfig:
    metric: str | None = None  # what a job returns to a search: a figure of results.json below `stages`


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
    longest: LongestConfig = field(default_factory=LongestConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    reload: ReloadConfig = field(default_factory=ReloadConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    claims: ClaimsConfig = field(default_factory=ClaimsConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # its own keys (config/deepspeed_rules.py says which)
    device: str = "auto"
    seed: int = 0

    @property
    def layout(self) -> Layout:
        return Layout(self.sp.size, self.dp.size, self.zero.stage)

    def reference(self) -> Config:
        """The same experiment in the single process that layouts are compared with: transformers' own attention,
        forward and loss, no tiles, no compiler. Recomputation stays: it changes no number and memory may want it."""
        alone = self.at(Layout.parse(self.parity.reference))
        return replace(
            alone,
            sp=replace(alone.sp, attention="transformers"),
            memory=replace(self.memory, tiled_mlp=0, tiled_loss=0, loss_in_place=False),
            train=replace(self.train, compile=False),
        )

    def at(self, layout: Layout) -> Config:
        """The same experiment in another layout."""
        return replace(
            self,
            sp=replace(self.sp, size=layout.sp),
            dp=DataParallelConfig(layout.dp),
            zero=replace(
                self.zero,
                stage=layout.zero,
                offload_optimizer=self.zero.offload_optimizer and layout.zero > 0,
                offload_parameters=self.zero.offload_parameters and layout.zero == 3,
            ),
        )

    @property
    def accumulation(self) -> int:
        return self.layout.accumulation(self.train.global_batch_size, self.train.micro_batch_size)
