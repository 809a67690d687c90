"""What an engine holds, as one digest a tensor: the proof that a checkpoint arrived bit for bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ulysses_exp.rank.checkpoints.digest import digest, to_hex
from ulysses_exp.rank.checkpoints.homes import WEIGHTS, Fragment, fragments, module_fragments, scalars
from ulysses_exp.rank.checkpoints.shards import Shard, plan
from ulysses_exp.rank.checkpoints.streaming import all_reduce_digests


@dataclass(frozen=True)
class Fingerprint:
    """Digests by name (ulysses_exp/rank/checkpoints/digest.py), the same on all ranks and in every layout."""

    weights: dict[str, str]  # full fp32 weights; in bf16 training the masters
    optimizer: dict[str, dict[str, str]]  # state, such as exp_avg -> parameter -> digest
    numbers: dict[str, dict[str, float]]  # parameter -> state that is one number, such as step

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def names(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """Parameters and saved buffers in the order of the model; tied ones once."""
    return [fragment.name for fragment in module_fragments(engine)]


def fingerprint(engine: deepspeed.DeepSpeedEngine) -> Fingerprint:
    """Digests of what the engine holds now. Each rank reads what lies on it. Collective over the world."""
    held = list(fragments(engine))
    shards = plan(held, names(engine))
    return from_digests(digests(shards, held), gather_scalars(engine))


def from_digests(found: dict[tuple[str, str], str], numbers: dict[str, dict[str, float]]) -> Fingerprint:
    """Sorts digests by (kind, name) into weights and states."""
    states: dict[str, dict[str, str]] = {}
    for (kind, name), value in found.items():
        if kind != WEIGHTS:
            states.setdefault(kind, {})[name] = value
    return Fingerprint({n: d for (k, n), d in found.items() if k == WEIGHTS}, states, numbers)


def digests(shards: list[Shard], held: list[Fragment]) -> dict[tuple[str, str], str]:
    """(kind, name) -> digest of the tensors in `shards`. Collective over the world."""
    rank = dist.get_rank()
    mine = {(f.kind, f.name): f for f in held}
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    shares = []
    for tensor in tensors:
        fragment = mine.get((tensor.kind, tensor.name))
        own = any(part.rank == rank for part in tensor.parts)
        shares.append(digest(fragment.data, fragment.start) if own and fragment is not None else 0)
    return dict(zip([(t.kind, t.name) for t in tensors], all_reduce_digests(shares), strict=True))


def gather_scalars(engine: deepspeed.DeepSpeedEngine) -> dict[str, dict[str, float]]:
    """`homes.scalars` of all ranks. Collective over the world."""
    mine = scalars(engine)
    if dist.get_world_size() == 1:
        return mine
    every: list[dict[str, dict[str, float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    return {name: numbers for found in every for name, numbers in found.items()}


def module_digests(engine: deepspeed.DeepSpeedEngine) -> dict[str, str]:
    """Digests of the whole weights as the forward pass of *this* rank uses them, in their own type.

    What this rank has whole it hashes alone. Of what ZeRO 3 gathers when it is used, each rank hashes its part, so that
    nothing is gathered. Collective over the world.
    """
    held, tensors = list(module_fragments(engine)), _module_tensors(engine)
    sharded = [hasattr(tensor, "ds_tensor") for tensor in tensors]
    shares = [digest(f.data, f.start) for f, shared in zip(held, sharded, strict=True) if shared]
    gathered = iter(all_reduce_digests(shares) if shares else ())
    found = {}
    for fragment, tensor, shared in zip(held, tensors, sharded, strict=True):
        whole = next(gathered) if shared else None
        if whole is None or tensor.ds_status == ZeroParamStatus.AVAILABLE:  # a small one, of which each has its own
            whole = to_hex(digest(tensor.data if shared else fragment.data))
        found[fragment.name] = whole
    return found


def _module_tensors(engine: deepspeed.DeepSpeedEngine) -> list[Any]:
    tensors = dict(engine.module.named_parameters()) | dict(engine.module.named_buffers())
    return [tensors[name] for name in names(engine)]


def weights_identical(engine: deepspeed.DeepSpeedEngine, group: dist.ProcessGroup | None) -> bool:
    """Whether all ranks of `group` compute with the same complete weights, bit for bit. Collective over the world."""
    mine = list(module_digests(engine).values())
    if dist.get_world_size(group) == 1:
        return True
    every: list[list[str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return all(other == mine for other in every)
