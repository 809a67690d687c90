"""How long an optimizer step would take, from its operations and bytes and the rates of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from ulysses_exp.config import Config
from ulysses_exp.config.hardware import Hardware
from ulysses_exp.plan.trace import Trace

#: Operators of torch.distributed's dispatcher, by what they are.
_COLLECTIVES = {
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}

ASSUMPTIONS = (
    "matrix products and attention run at hardware.efficiency of the dense peak; norms, activation functions and the "
    "optimizer take no time, also the one in host memory",
    "a collective takes its bytes over the slowest link on its way, without latency; ring algorithms for ZeRO",
    "all-to-alls wait for compute and compute for them; ZeRO's collectives and copies to and from host memory overlap "
    "with compute as far as that lasts",
    "ranks of a sequence-parallel group fill nodes in order; all GPUs of a node send at once over its network",
)


@dataclass(frozen=True)
class Collective:
    """One kind of collective over groups of `ranks`: per optimizer step and rank."""

    name: str
    ranks: int
    calls: int
    bytes_sent: int
    seconds: float | None


def collectives(trace: Trace, hardware: Hardware) -> list[Collective]:
    """What a rank sends to others in an optimizer step."""
    found: dict[tuple[str, int], list[int]] = {}
    for operator, ranks, calls, size in trace.collectives:
        name = _COLLECTIVES.get(operator)
        if name is None or ranks == 1:
            continue
        share = (ranks - 1) / ranks
        sent = {"all_reduce": 2 * share * size, "broadcast": size, "reduce": size}.get(name, share * size)
        entry = found.setdefault((name, ranks), [0, 0])
        entry[0] += calls
        entry[1] += round(sent)
    return [
        Collective(name, ranks, calls, sent, _seconds(name, ranks, sent, hardware))
        for (name, ranks), (calls, sent) in sorted(found.items())
    ]


def _seconds(name: str, ranks: int, sent: int, hardware: Hardware) -> float | None:
    rates = hardware.gbytes_per_s
    if rates is None:
        return None
    node, network = rates["node"] * 1e9, rates["network"] * 1e9
    if ranks <= hardware.gpus_per_node:
        return sent / node
    if name == "all_to_all":  # as much for each of the others, of whom most are on other nodes
        outside = (ranks - hardware.gpus_per_node) / (ranks - 1)
        return max(sent * outside / network, sent * (1 - outside) / node)
    return sent / network


@dataclass(frozen=True)
class Work:
    """Floating-point operations of an optimizer step, all ranks together (`metrics.flops`)."""

    model: float
    hardware: float
    attention_share: float  # of the hardware's, those of the core attention


def work(config: Config) -> Work:
    """Counts `config`'s operations. Imports torch."""
    from ulysses_exp.model.build import pretrained_config
    from ulysses_exp.rank.metrics.flops import forward_flops, step_flops

    architecture = pretrained_config(config)
    memory, train = config.memory, config.train
    flops = step_flops(
        architecture,
        seq_len=train.seq_len,
        sequences=train.global_batch_size,
        memory=memory,
        sp=config.sp.size,
    )
    passes = 3 + (memory.checkpointing != "none")
    attention = sum(layer.flops(train.seq_len) for layer in forward_flops(architecture).attention)
    return Work(
        model=flops.model,
        hardware=flops.hardware,
        attention_share=passes * attention * train.global_batch_size / flops.hardware,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one rank in an optimizer step; `total` as ASSUMPTIONS say."""

    compute: float
    all_to_all: float
    zero: float
    host: float
    total: float
    mfu_bound: float  # model FLOPs over what the GPUs could do in `total`
    communication_share: float  # of `total`, what is not compute


def step_time(config: Config, hardware: Hardware, trace: Trace, work: Work) -> StepTime | None:
    """None where the hardware has no rates."""
    if hardware.peak_tflops is None or hardware.efficiency is None or hardware.gbytes_per_s is None:
        return None
    peak = hardware.peak_tflops[config.train.precision] * 1e12
    world = config.layout.world
    each = work.hardware / world / peak
    compute = each * (
        work.attention_share / hardware.efficiency["attention"]
        + (1 - work.attention_share) / hardware.efficiency["matmul"]
    )
    sent = collectives(trace, hardware)
    all_to_all = sum(c.seconds or 0.0 for c in sent if c.name == "all_to_all")
    zero = sum(c.seconds or 0.0 for c in sent if c.name != "all_to_all")
    host = max(trace.host_copies.values(), default=0) / (hardware.gbytes_per_s["host"] * 1e9)
    total = max(compute, zero, host) + all_to_all
    return StepTime(
        compute=compute,
        all_to_all=all_to_all,
        zero=zero,
        host=host,
        total=total,
        mfu_bound=work.model / world / peak / total,
        communication_share=1 - compute / total,
    )
