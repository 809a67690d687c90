"""The typed configuration, and every rule that can be checked before a rank starts.

Imports neither torch nor transformers: a wrong configuration answers in about a second.
"""

from __future__ import annotations

import difflib
import glob
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from ulysses_exp.layout import Layout
from ulysses_exp.paths import matching

STAGES = ("train", "eval", "reload", "parity", "plan")
#: DeepSpeed makes lists of all ranks: tracing takes time and memory in proportion to them.
PLANNED_RANKS = 4096
DATA = ("text", "packed", "synthetic", "hub")
EVAL_MODES = ("bypass", "sp", "both", "auto", "none")


class ConfigError(Exception):
    """A configuration that cannot run: which key, what is wrong with it and what to set instead."""

    def __init__(self, key: str, problem: str, instead: str):
        super().__init__(key, problem, instead)  # the arguments again, so that it can be pickled
        self.key = key

    def __str__(self) -> str:
        key, problem, instead = self.args
        return f"{key}: {problem}; {instead}"


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
    expandable_segments: bool = False  # CUDA: the allocator grows its segments, so less is lost to fragments


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
    tolerance: float | None = None  # relative; null: 1e-6 in fp32 with SGD (stages/parity.py)


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
    timeout_s: int = 600  # ranks that neither compute nor give a sign of life for longer end the job
    cluster: str = "slurm"  # submitit's: slurm, or local to try a submission on this machine
    partition: str | None = None
    account: str | None = None
    gpus_per_node: int = 8
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
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    device: str = "auto"
    seed: int = 0

    @property
    def layout(self) -> Layout:
        return Layout(self.sp.size, self.dp.size, self.zero.stage)

    def reference(self) -> Config:
        """The same experiment in the single process that layouts are compared with: transformers' own forward and
        loss, no tiles, no compiler. Recomputation stays: it changes no number and may be needed for want of memory."""
        return replace(
            self.at(Layout.parse(self.parity.reference)),
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


def accelerators() -> int:
    """GPUs that a job may use, without importing torch: device files, narrowed by CUDA_VISIBLE_DEVICES."""
    present = len([p for p in glob.glob("/dev/nvidia[0-9]*") if p.removeprefix("/dev/nvidia").isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    chosen = [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    return min(present, len(chosen))


def attached_ranks() -> int | None:
    """How many ranks torchrun or srun says that it has started; None where it says nothing."""
    names = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
    said = next((os.environ.get(world, "") for rank, world in names if rank in os.environ), "")
    return int(said) if said.isdecimal() else None


def device_of(config: Config) -> str:
    """What `device=auto` means on this machine: `cuda` or `cpu`."""
    if config.device != "auto":
        return config.device
    return "cuda" if accelerators() else "cpu"


def _fields(node: type) -> dict[str, Any]:
    hints = get_type_hints(node)
    return {f.name: hints[f.name] for f in fields(node)}


def known_keys(node: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the schema in dotted form, groups included."""
    for name, kind in _fields(node).items():
        yield prefix + name
        if is_dataclass(kind):
            yield from known_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


def doors(node: type = Config, prefix: str = "") -> dict[str, Callable[[Any], bool]]:
    """Every key that can let code in or data out, with what tells whether a value does."""
    found: dict[str, Callable[[Any], bool]] = {}
    for f in fields(node):
        kind = get_type_hints(node)[f.name]
        if is_dataclass(kind):
            found |= doors(kind, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        elif "opens" in f.metadata:
            found[prefix + f.name] = f.metadata["opens"]
    return found


def nearest(word: str, choices: list[str]) -> str:
    """The choice that `word` was probably meant to be, or all of them."""
    match = difflib.get_close_matches(word, choices, 1, 0.5)
    if not match and "." in word:  # the right name in the wrong group, or the group misspelled
        match = [c for c in choices if c.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    if match:
        return f"did you mean {match[0]}?"
    return f"choose from {', '.join(choices)}" if len(choices) <= 16 else "python run.py --help lists the keys"


def _unknown(cfg: DictConfig) -> None:
    """Raises ConfigError for keys added with `+` that no code reads."""

    def walk(node: Mapping[str, Any], kind: type, prefix: str) -> None:
        expected = _fields(kind)
        for name, value in node.items():
            if name not in expected:
                raise ConfigError(prefix + name, "unknown key", nearest(prefix + name, sorted(known_keys())))
            if is_dataclass(expected[name]) and isinstance(value, Mapping):
                walk(value, expected[name], f"{prefix}{name}.")  # type: ignore[arg-type]

    walk(OmegaConf.to_container(cfg, resolve=False), Config, "")  # type: ignore[arg-type]


def typed(cfg: DictConfig) -> Config:
    """The configuration as an object. Raises ConfigError for unknown keys and for keys without a value."""
    _unknown(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(missing[0], "has no value", f"set {missing[0]}=...")
    return OmegaConf.to_object(cfg)  # type: ignore[return-value]


def resolve(cfg: DictConfig) -> Config:
    """The typed and checked configuration of one job, its defaults filled in.

    Raises:
        ConfigError: it cannot run; nothing has been started or written.
    """
    config = typed(cfg)
    from ulysses_exp import redaction

    redaction.check_configuration(asdict(config))
    check(config)
    if config.reload.layouts is None:
        config.reload.layouts = [layout.name for layout in default_targets(config)]
    return config


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


def architecture(config: Config) -> dict[str, Any]:
    """The model's configuration as far as it can be read without transformers; only overrides for a name on a hub."""
    model = config.model
    if model.name_or_path is None:
        return dict(model.architecture)
    path = Path(model.name_or_path).expanduser() / "config.json"
    try:
        saved = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        saved = str(error)
    if not isinstance(saved, dict):
        problem = f"{path} is no model's configuration"
        raise ConfigError("model.name_or_path", problem, "set a folder whose config.json is one, or a hub name")
    return saved | model.architecture


def text_architecture(config: Config) -> dict[str, Any]:
    """`architecture` of the part that reads text, where the model has others."""
    known = architecture(config)
    text = known.get("text_config", known)
    return text if isinstance(text, dict) else known


#: Settings of heads that a causal LM does not have.
_NOT_OF_THE_LM = ("classifier_", "summary_")


def check_objective(config: Config, known: Mapping[str, Any]) -> None:
    """Raises ConfigError where a model with the settings `known` trains on something that depends on the layout.

    A router's loss is no sum over tokens: ranks and micro batches would each add their own. Dropout draws other random
    numbers in every layout.
    """
    if known.get("output_router_logits"):
        raise ConfigError(
            "model.architecture.output_router_logits",
            "a router's loss is not the mean over target tokens",
            "set +model.architecture.output_router_logits=false",
        )
    if not {"train", "reload", "parity"} & set(config.stages):
        return
    for name, value in known.items():
        if ("drop" in name and not name.startswith(_NOT_OF_THE_LM)) and isinstance(value, int | float) and value > 0:
            key = f"model.architecture.{name}"
            raise ConfigError(key, f"{value} draws other random numbers in every layout", f"set +{key}=0")


def heads(config: Config) -> tuple[int, int] | None:
    """(query heads, KV heads) where the architecture tells, else None."""
    known = text_architecture(config)
    query = known.get("num_attention_heads")
    kv = known.get("num_key_value_heads") or query
    return (query, kv) if isinstance(query, int) and isinstance(kv, int) else None  # some have a number for each layer


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(key, f"{value[:60]!r} is not a choice", nearest(value, list(choices)))


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
    if config.launch.name == "local" and device_of(config) == "cuda" and layout.world > accelerators():
        raise ConfigError(
            key,
            f"{layout.name} needs {layout.world} GPUs, {accelerators()} are present",
            "set device=cpu, or smaller sp.size and dp.size",
        )
    if config.launch.name == "attached" and layout.world > (there := attached_ranks() or layout.world):
        raise ConfigError(
            key, f"{layout.name} needs {layout.world} ranks, {there} are attached", "set smaller sp.size and dp.size"
        )
    if config.launch.name == "local" and layout.world > 64:
        raise ConfigError(
            key, f"{layout.world} ranks on one machine", "set sp.size x dp.size to at most 64, or launch=attached"
        )


def check(config: Config) -> None:
    """Raises ConfigError for the first rule that the configuration breaks. Touches no accelerator, starts nothing."""
    from ulysses_exp import bounds, model_rules

    c = config
    bounds.check(c)
    for stage in c.stages:
        _choice("stages", stage, STAGES)
    if len(set(c.stages)) != len(c.stages) or not c.stages:
        raise ConfigError("stages", "needs each stage once" if c.stages else "is empty", "set e.g. stages=[train,eval]")
    if c.zero.offload_optimizer and c.zero.stage == 0:
        raise ConfigError("zero.offload_optimizer", "stage 0 shards no optimizer states", "set zero.stage to 1, 2 or 3")
    if c.zero.offload_parameters and c.zero.stage != 3:
        raise ConfigError("zero.offload_parameters", f"stage {c.zero.stage} shards no weights", "set zero.stage=3")
    _choice("data.name", c.data.name, DATA)
    _choice("optim.name", c.optim.name, ("adamw", "sgd"))
    _choice("launch.name", c.launch.name, ("local", "attached", "slurm"))
    _choice("sp.exchange", c.sp.exchange, ("deepspeed", "fused"))
    _choice("eval.mode", c.eval.mode, EVAL_MODES)
    _choice("device", c.device, ("auto", "cpu", "cuda"))
    _choice("train.precision", c.train.precision, ("fp32", "bf16"))
    _choice("train.on_nonfinite", c.train.on_nonfinite, ("stop", "skip", "keep"))
    _choice("tracker.mode", c.tracker.mode, ("offline", "online", "disabled"))
    _choice("launch.cluster", c.launch.cluster, ("slurm", "local"))
    _choice("sweep.rerun", c.sweep.rerun, ("changed", "failed", "all"))
    _choice("data.padding", c.data.padding, ("none", "left", "right"))
    _choice("memory.checkpointing", c.memory.checkpointing, ("none", "non_reentrant", "reentrant"))
    _choice("optim.schedule", c.optim.schedule, ("constant", "linear", "cosine"))
    if c.train.profile and c.train.steps < 3:
        raise ConfigError("train.profile", f"needs 3 steps, not {c.train.steps}", "set train.steps=3")
    if c.train.compile and device_of(c) == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ConfigError("train.compile", "needs a C++ compiler on CPU", "install g++, or set train.compile=false")
    _check_longest(c)
    if c.optim.schedule != "constant" and c.optim.warmup_steps >= c.train.steps:
        problem = f"{c.optim.warmup_steps} steps leave none of train.steps={c.train.steps} to optim.schedule"
        raise ConfigError("optim.warmup_steps", problem, "set fewer, or more train.steps")
    if c.optim.name == "adamw" and c.optim.momentum:
        raise ConfigError("optim.momentum", "AdamW has betas instead", "set optim.beta1, or optim=sgd")
    if c.memory.offload_activations and c.memory.checkpointing == "none":
        raise ConfigError(
            "memory.offload_activations", "nothing is checkpointed", "set memory.checkpointing=non_reentrant"
        )
    if c.sp.attention == "eager":
        raise ConfigError(
            "sp.attention", "eager needs an O(n^2) mask, which Ulysses cannot shard", "set sp.attention=sdpa"
        )
    here = c.launch.name == "local"  # else the ranks run on machines that this one knows nothing of
    if here and device_of(c) == "cpu" and "flash" in c.sp.attention:
        raise ConfigError("sp.attention", f"{c.sp.attention} needs a GPU", "set sp.attention=sdpa")
    if here and device_of(c) == "cpu" and c.sp.attention == "flex_attention" and {"train", "parity"} & set(c.stages):
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
    from ulysses_exp import foreign

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
    if set(c.stages) != {"plan"}:
        check_layout(c, c.layout, "sp.size")
    else:
        check_layout(replace(c, launch=replace(c.launch, name="slurm")), c.layout, "sp.size")  # not of this machine
    if "plan" in c.stages:
        from ulysses_exp.plan.hardware import load

        load(c.plan.hardware)
        if c.layout.world > PLANNED_RANKS:
            problem = f"{c.layout.world:,} ranks are more than the {PLANNED_RANKS:,} that stage plan traces"
            raise ConfigError("dp.size", problem, f"set dp.size={max(1, PLANNED_RANKS // c.layout.sp)} or less")
    if not re.fullmatch("sp1-dp1-z[0-3]", c.parity.reference):
        problem = f"{c.parity.reference!r} is not a single process"
        raise ConfigError("parity.reference", problem, "set sp1-dp1-z0, or sp1-dp1-z3 with offload for large models")
    for name in c.reload.layouts or ():
        try:
            target = Layout.parse(name)
        except ValueError as error:
            raise ConfigError("reload.layouts", str(error), "set e.g. reload.layouts=[sp1-dp1-z0,sp2-dp1-z3]") from None
        if "reload" in c.stages:
            check_layout(c, target, "reload.layouts")
    if "train" not in c.stages and {"eval", "reload"} & set(c.stages) and c.checkpoint.source is None:
        stage = "eval" if "eval" in c.stages else "reload"
        if stage == "reload" or c.model.name_or_path is None:
            raise ConfigError(
                "checkpoint.source",
                f"stage {stage} without train has nothing to work on",
                "set checkpoint.source=<run folder>",
            )
    if c.checkpoint.source is not None and not matching(c.checkpoint.source):
        raise ConfigError(
            "checkpoint.source",
            f"{c.checkpoint.source!r} does not exist",
            "set a run folder, e.g. outputs/...",
        )
    if "train" in c.stages and {"eval", "reload"} & set(c.stages[: c.stages.index("train")]):
        raise ConfigError("stages", "eval and reload come before train", "set stages=[train,eval,reload]")


def _check_longest(c: Config) -> None:
    """Raises ConfigError where the search for the longest sequence cannot run."""
    if not c.longest.search:
        return
    if "train" not in c.stages:
        raise ConfigError("longest.search", "stage train does the search", "set stages=[train]")
    if c.launch.name == "attached":
        raise ConfigError(
            "longest.search", "attached ranks cannot be replaced when memory runs out", "set launch=local"
        )
    if c.longest.memory_gib is None and device_of(c) == "cpu" and c.launch.name == "local":
        raise ConfigError(
            "longest.memory_gib", "ranks on CPU share the machine's memory", "set e.g. longest.memory_gib=0.25"
        )


ConfigStore.instance().store(name="schema", node=Config)
