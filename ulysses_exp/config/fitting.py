"""What of a job fits the memory that its ranks have: defaults that do, and a word where a setting does not.

Asked of models beyond `SMALL` alone, by the formulas of `footprint.py`. A setting is refused where what it holds for
certain exceeds a GPU of this machine. Where only the estimate does, or the ranks' machine is not this one, the job says
so and goes on; ranks on CPU are never refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from ulysses_exp.config import footprint, hardware, stages
from ulysses_exp.config.errors import ConfigError
from ulysses_exp.config.footprint import Need, Shape
from ulysses_exp.config.layout_rules import check_layout
from ulysses_exp.config.machine import accelerators, device_of, gpu_memory, host_memory
from ulysses_exp.config.schema import Config
from ulysses_exp.layout import Layout

#: Parameters of a model up to which nothing is asked: with all its states it takes 2 GB
SMALL = 10**8

_SHARE = 0.9  # of a rank's memory, that a default or a proposal may take by the estimate
_RESERVED = 2 * 2**30  # bytes of a GPU that the CUDA context and NCCL take

#: Reload targets where memory is no question
_TARGETS = (
    Layout(1, 1, 0),
    Layout(2, 1, 3),
    Layout(1, 2, 2),
    Layout(4, 1, 1),
    Layout(2, 1, 1),
    Layout(1, 1, 3),
    Layout(1, 1, 2),
)


@dataclass(frozen=True)
class _Memory:
    """What a rank has."""

    size: float  # bytes
    whose: str
    sure: bool  # it is a GPU of this machine


def check(config: Config) -> None:
    """Raises ConfigError for a setting that cannot fit a GPU of this machine. For `eval.mode=both`, see `settle`."""
    of = _asked(config)
    if of is None:
        return
    for key, at, need in _needs(config, of):
        memory = _memory(at)
        if memory is not None and memory.sure and need.held > memory.size:
            raise _refused(config, key, at, need.held, memory, of)


def settle(config: Config, given: Collection[str]) -> None:
    """Fills in the defaults that depend on memory: `reload.layouts`, and `eval.mode` where it was not `given`.

    Args:
        given: the overrides of the command line. A study's own settings count as given.

    Raises:
        ConfigError: `eval.mode=both` was given, and bypassed evaluation cannot fit a GPU of this machine.
    """
    if config.reload.layouts is None:
        config.reload.layouts = [layout.name for layout in default_targets(config)]
    of = _asked(config)
    if of is None or "eval" not in config.stages or config.eval.mode != "both":
        return
    need, memory = footprint.bypassed_evaluation(config, of), _memory(config)
    if memory is None or config.sp.size == 1:
        return
    if not _chosen(given, "eval"):
        if need.estimated > _SHARE * memory.size:
            config.eval.mode = "sp"
    elif memory.sure and need.held > memory.size:
        raise _refused(config, "eval.mode", config, need.held, memory, of)


def remarks(config: Config, given: Collection[str]) -> list[str]:
    """A line for each default that memory decided, and for each setting that may not fit.

    Args:
        config: as `settle` left it.
        given: as `settle` got it.
    """
    of = _asked(config)
    if of is None:
        return []
    by_default = config.reload.layouts == [t.name for t in default_targets(config)]
    lines = []
    for key, at, need in _needs(config, of):
        memory = _memory(at)
        if memory is not None and need.estimated > memory.size and not (key == "reload.layouts" and by_default):
            lines.append(str(_refused(config, key, at, need.estimated, memory, of, sure=False)))
    memory = _memory(config)
    need = footprint.bypassed_evaluation(replace(config, eval=replace(config.eval, mode="both")), of)
    decided = "eval" in config.stages and config.eval.mode == "sp" and not _chosen(given, "eval")
    if decided and memory is not None and need.estimated > _SHARE * memory.size:
        lines.append(f"eval.mode=sp: bypassed, a whole sequence takes about {_of(need.estimated, memory)}")
    lost = [layout for layout in _allowed(config, _TARGETS)[:3] if not _fits(config, layout, of)]
    if "reload" in config.stages and by_default and lost:
        at = config.at(lost[0])
        memory = _memory(at)
        assert memory is not None
        takes = _of(footprint.training(_on(at), of).estimated, memory)
        instead = ", ".join(layout.name for layout in lost)
        lines.append(
            f"reload.layouts=[{','.join(config.reload.layouts or ())}] in place of {instead}:"
            f" {lost[0].name} takes about {takes}"
        )
    return lines


def default_targets(config: Config) -> list[Layout]:
    """Three reload targets that differ from the trained layout, and from each other, in sp, dp and ZeRO stage.

    Where the model does not fit one of them: others that it fits, of as many ranks as train or fewer.
    """
    usual = _allowed(config, _TARGETS)[:3]
    of = _asked(config)
    if of is None or all(_fits(config, layout, of) for layout in usual):
        return usual
    allowed = _allowed(config, _wider(config))
    fitting = [layout for layout in allowed if _fits(config, layout, of)]
    if not fitting:  # by the estimate; then what takes the least
        return sorted(allowed, key=lambda layout: footprint.training(_on(config.at(layout)), of).estimated)[:3]
    found: list[Layout] = []
    while fitting and len(found) < 3:
        seen = [config.layout, *found]
        found.append(max(fitting, key=lambda layout: min(_differences(layout, other) for other in seen)))
        fitting.remove(found[-1])
    return found


def _allowed(config: Config, wanted: Collection[Layout]) -> list[Layout]:
    """Those of `wanted` that model, data and machine allow, without the trained one."""
    found = []
    for layout in wanted:
        if layout != config.layout:
            try:
                check_layout(config, layout, "reload.layouts")
            except ConfigError:
                continue
            found.append(layout)
    return found


def _wider(config: Config) -> list[Layout]:
    """`_TARGETS`, and layouts of as many ranks as train, or of half of them and so on."""
    found, world = list(_TARGETS), config.layout.world
    while world:
        sizes = [sp for sp in range(world, 0, -1) if world % sp == 0]
        found += [Layout(sp, world // sp, stage) for stage in (3, 1, 2, 0) for sp in sizes]
        world //= 2
    return list(dict.fromkeys(found))


def _differences(one: Layout, other: Layout) -> int:
    return (one.sp != other.sp) + (one.dp != other.dp) + (one.zero != other.zero)


def _asked(config: Config) -> Shape | None:
    """The model, where it is known, not small, and run by ranks."""
    if not stages.starts_ranks(config):
        return None
    of = footprint.shape(config)
    return of if of is not None and of.parameters > SMALL else None


def _memory(config: Config) -> _Memory | None:
    """Of each rank of `config`; None where it cannot be known."""
    elsewhere = config.launch.name == "slurm"
    if elsewhere and config.device == "cpu":
        return None
    if not elsewhere and device_of(config) == "cpu":
        world = config.layout.world
        return _Memory(
            host_memory() / world, f"this machine{f' for each of {world} ranks' if world > 1 else ''}", False
        )
    own = None if elsewhere else gpu_memory()
    if own is None:
        return _Memory(_planned(config.plan.hardware), f"plan.hardware={config.plan.hardware}", False)
    return _Memory(own - _RESERVED, "a GPU of this machine", sure=True)


@cache
def _planned(name: str) -> int:
    return hardware.load(name).budget


def _needs(config: Config, of: Shape) -> Iterator[tuple[str, Config, Need]]:
    """(key that asks for it, configuration at its layout, what a rank of that needs) of the parts of a job."""
    if any(stage.trains for stage in stages.of(config)):
        yield "zero.stage", config, footprint.training(_on(config), of)
    if "eval" in config.stages and config.eval.mode == "bypass" and config.sp.size > 1:
        yield "eval.mode", config, footprint.bypassed_evaluation(_on(config), of)
    if "reload" in config.stages:
        for name in config.reload.layouts or ():
            at = config.at(Layout.parse(name))
            yield "reload.layouts", at, footprint.training(_on(at), of)
    if "parity" in config.stages:
        at = config.reference()
        yield "parity.reference", at, footprint.training(_on(at), of)


def _on(config: Config) -> Config:
    """On CPU what is offloaded stays in the same memory."""
    if config.launch.name == "slurm" or device_of(config) == "cuda":
        return config
    zero = replace(config.zero, offload_optimizer=False, offload_parameters=False)
    return replace(config, zero=zero, memory=replace(config.memory, offload_activations=False))


def _fits(config: Config, layout: Layout, of: Shape) -> bool:
    at = config.at(layout)
    memory = _memory(at)
    return memory is None or footprint.training(_on(at), of).estimated <= _SHARE * memory.size


def _chosen(given: Collection[str], group: str) -> bool:
    """Whether a key of `group`, or a study, is among the overrides `given`."""
    keys = {override.partition("=")[0].lstrip("+~").split(".")[0].split("@")[0] for override in given}
    return bool(keys & {group, "experiment"})


def _refused(
    config: Config, key: str, at: Config, size: float, memory: _Memory, of: Shape, sure: bool = True
) -> ConfigError:
    takes = "holds" if sure else "takes about"
    what = f"{config.model.name_or_path or config.model.name} at {at.layout.name}"
    if key == "eval.mode":
        what, instead = f"a whole sequence on each rank of {what}", "set eval.mode=sp"
    elif key == "reload.layouts":
        fitting = ",".join(layout.name for layout in default_targets(config))
        instead = f"set reload.layouts=[{fitting}]" if fitting else "set other stages"
    elif key == "parity.reference":
        instead = "set parity.reference=sp1-dp1-z3 with zero=stage3_offload, or other stages"
    else:
        remedy = _remedy(config, of)
        key = remedy[0].partition("=")[0] if remedy else key
        instead = f"set {' '.join(remedy)}" if remedy else "set more ranks, or a smaller model"
    return ConfigError(key, f"{what} {takes} {_of(size, memory)}", instead)


def _of(size: float, memory: _Memory) -> str:
    return f"{size / 2**30:,.0f} GiB a rank, {memory.whose} has {memory.size / 2**30:,.0f}"


def _remedy(config: Config, of: Shape) -> list[str]:
    """The fewest settings with which training fits, by the estimate; none where no such are known."""
    zeros = {"": config.zero, "zero.stage=3": replace(config.zero, stage=3)}
    zeros["zero=stage3_offload"] = replace(config.zero, stage=3, offload_optimizer=True, offload_parameters=True)
    kept = config.memory
    memories = {"": kept, "memory=checkpointing": replace(kept, checkpointing="non_reentrant")}
    memories["memory=alst"] = replace(
        kept, checkpointing="non_reentrant", offload_activations=True, tiled_mlp=-1, tiled_loss=-1
    )
    trains = {"": config.train, "train.precision=bf16": replace(config.train, precision="bf16")}
    sps = {"": config.sp} | {f"sp.size={size}": replace(config.sp, size=size) for size in _sizes(config)}
    ways = product(trains.items(), zeros.items(), memories.items(), sps.items())
    for way in sorted(ways, key=lambda way: sum(bool(setting) for setting, _ in way)):
        (_, train), (_, zero), (_, memory), (_, sp) = way
        if _fits(changed := replace(config, train=train, zero=zero, memory=memory, sp=sp), changed.layout, of):
            return [setting for setting, _ in way if setting]
    return []


def _sizes(config: Config) -> list[int]:
    """Larger sp.size that model, data and machine allow."""
    here = config.launch.name == "local"
    most = accelerators() if here and device_of(config) == "cuda" else 1 if here else config.launch.gpus_per_node
    found = []
    for size in range(config.sp.size + 1, most // config.dp.size + 1):
        try:
            check_layout(config, replace(config.layout, sp=size), "sp.size")
        except ConfigError:
            continue
        found.append(size)
    return found
