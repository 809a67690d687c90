"""One rank's optimizer steps without memory, arithmetic or other ranks: what they would allocate and send.

The project's own code runs: model, memory savers, sequence-parallel attention, DeepSpeed's engine and the optimizer
step of training, on fake tensors and torch's fake process group. Nothing of ZeRO is modelled; its buffers, gathers and
optimizer states are those that DeepSpeed makes.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ulysses_exp.config import Config

#: Phases of a trace; `start` ends with the engine built. Of a trace of evaluation, only the first and last.
PHASES = ("start", "forward_backward", "optimizer_step", "evaluation")


@dataclass(frozen=True)
class Trace:
    """What one rank of `config.layout` holds and sends. Sizes in bytes."""

    layers: int
    seq_len: int
    parameters: int  # of the whole model, tied ones once
    parameters_per_rank: int  # as DeepSpeed partitions them
    device: dict[str, dict[str, int]]  # by phase: what the device holds at its fullest, by kind (ledger.KINDS)
    host: dict[str, dict[str, int]]  # the same of host memory, which only on rank 0 starts with the whole model; empty
    # where the device is the host
    rest: dict[str, int]  # what the device holds between two steps, by kind
    collectives: list[tuple[str, int, int, int]]  # (operator, ranks, calls, bytes) of one optimizer step
    host_copies: dict[str, int]  # bytes `to_host` and `to_device` in one optimizer step
    all_to_all_calls: int
    all_to_all_bytes: int  # that this rank sends to others in one optimizer step

    def peak(self, phase: str | None = None) -> int:
        """Bytes that the device holds at the fullest moment of `phase`, or of all."""
        phases = [phase] if phase else list(self.device)
        return max(sum(self.device[p].values()) for p in phases)


@dataclass(frozen=True)
class Request:
    """What to trace: `config`, with `layers` decoder layers in place of its own, on a `gpu` or on this CPU.

    `parameters` are those of the whole model, which decide on buffers; left out, those of the layers traced. Many tiles
    are traced as four (`tiles`) unless `few_tiles` is False. `deepspeed` holds entries of DeepSpeed's configuration
    that this project leaves at their defaults; `within` is entered around the model, for kernels that a plan does not
    know. `evaluation` traces the loss of one whole sequence on one rank, sequence parallelism bypassed, in place of
    training.
    """

    config: Config
    layers: int
    gpu: bool
    parameters: int | None = None
    few_tiles: bool = True
    evaluation: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def trace(request: Request) -> Trace:
    """Runs two optimizer steps of rank 0, the second as all later ones are. Needs a process of its own.

    Only from the second on are there the optimizer's states, and knows ZeRO 3 the order of the weights and gathers
    ahead.
    """
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ulysses_exp.model import build as models
    from ulysses_exp.model import memory as memory_savers
    from ulysses_exp.model.attention import ulysses
    from ulysses_exp.plan import flash, many_ranks, planned_device, tiles, upstream
    from ulysses_exp.plan.ledger import CUDA_BLOCK, Ledger
    from ulysses_exp.rank import engine as engines
    from ulysses_exp.rank.metrics.communication import AllToAllCounter
    from ulysses_exp.rank.step import optimizer_step
    from ulysses_exp.rank.upstream import without_operators_of_its_own

    os.environ.update(RANK="0", LOCAL_RANK="0")  # DeepSpeed asks for them
    config = shortened(request.config, request.layers)
    layout = config.layout
    device = torch.device("cpu")
    if request.gpu:
        planned_device.register()
        device = torch.device(planned_device.NAME, 0)
    else:
        set_accelerator(CPU_Accelerator())
    without_operators_of_its_own()
    backend = f"cpu:fake,{planned_device.NAME}:fake" if request.gpu else "fake"
    dist.init_process_group(backend, store=FakeStore(), rank=0, world_size=layout.world)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False)
        stack.enter_context(upstream.told())
        if request.few_tiles:
            stack.enter_context(tiles.few())
        if request.gpu:
            stack.enter_context(flash.instead_of_torchs())
        stack.enter_context(request.within())
        stack.enter_context(many_ranks.at_once(layout.world))
        stack.enter_context(planned_device.no_memory())
        ledger = stack.enter_context(Ledger({planned_device.NAME: CUDA_BLOCK}))
        counter = stack.enter_context(AllToAllCounter())

        model = models.build(config)
        whole = sum(p.numel() for p in model.parameters())
        memory_savers.apply(model, config.memory)
        handle = stack.enter_context(
            ulysses(
                model,
                sp=layout.sp,
                attention=config.sp.attention,
                exchange=config.sp.exchange,
                micro_batch_size=config.train.micro_batch_size,
            )
        )
        told = with_entries(engines.deepspeed_config(config, request.parameters or whole), request.deepspeed)
        with patch.object(engines, "deepspeed_config", lambda *_: told):
            engine = engines.build_engine(config, model, handle.mpu)
        stack.callback(engine.destroy)
        engine.train()
        _name_states(engine, ledger)
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: ledger.is_of(gradient, "gradients"))
        session = SimpleNamespace(
            engine=engine,
            layout=layout,
            device=device,
            rank=0,
            config=config,
            attention=handle,
            all_to_alls=counter,
            batches=_Batches(config),
            to_device=lambda tensor: tensor.to(device),
        )
        mark = counter.now
        if request.evaluation:
            ledger.begin("evaluation")
            _evaluate(session)
        else:
            with _phases(engine, ledger):
                optimizer_step(session, 0)  # type: ignore[arg-type]
                _name_states(engine, ledger)
                ledger.collectives.clear()
                ledger.host_copies.clear()
                mark = counter.now
                optimizer_step(session, 1)  # type: ignore[arg-type]
        calls, size = counter.since(mark)
        own = sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters())
        result = Trace(
            layers=request.layers,
            seq_len=config.train.seq_len,
            parameters=whole,
            parameters_per_rank=own,
            device=_by_phase(ledger, device.type),
            host=_by_phase(ledger, "cpu") if request.gpu else {},
            rest=dict(ledger.live[device.type]),
            collectives=_sum(ledger.collectives),
            host_copies=dict(ledger.host_copies),
            all_to_all_calls=calls,
            all_to_all_bytes=size,
        )
    gc.collect()
    return result


def with_entries(told: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration `told` with other `entries`, those of `zero_optimization` one by one."""
    zero = told["zero_optimization"] | entries.get("zero_optimization", {})
    return told | entries | {"zero_optimization": zero}


def shortened(config: Config, layers: int) -> Config:
    """`config` with `layers` decoder layers; a pattern of layer types is cut off where they end."""
    architecture = dict(config.model.architecture)
    architecture["num_hidden_layers"] = layers
    if architecture.get("layer_types"):
        architecture["layer_types"] = list(architecture["layer_types"])[:layers]
    return replace(config, model=replace(config.model, architecture=architecture))


class _Batches:
    """Batches of the configured shape: whole documents, no padding, every token a target."""

    def __init__(self, config: Config):
        self.config = config

    def step(self, step: int) -> list[Any]:
        train = self.config.train
        return self._of(train.micro_batch_size, train.seq_len // self.config.layout.sp) * self.config.accumulation

    def whole(self) -> list[Any]:
        return self._of(1, self.config.train.seq_len)

    def _of(self, sequences: int, tokens: int) -> list[Any]:
        import torch

        from ulysses_exp.rank.data import MicroBatch

        def numbers(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.long)

        whole = self.config.train.seq_len
        return [
            MicroBatch(
                input_ids=numbers(sequences, tokens),
                labels=numbers(sequences, tokens),
                position_ids=numbers(sequences, tokens),
                global_position_ids=numbers(sequences, whole),
                global_mask=None,
                global_targets=sequences * whole,
            )
        ]


def _evaluate(session: Any) -> None:
    """The loss of one sequence as stage eval computes it when it bypasses sequence parallelism."""
    import torch

    from ulysses_exp.rank.evaluation import summed_loss

    (batch,) = session.batches.whole()
    session.engine.eval()
    with torch.no_grad():
        summed_loss(session, batch, bypass=True)


@contextlib.contextmanager
def _phases(engine: Any, ledger: Any) -> Iterator[None]:
    """Tells the ledger when a step of the optimizer begins and ends."""
    step = engine.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        ledger.begin("optimizer_step")
        try:
            return step(*args, **kwargs)
        finally:
            ledger.begin("forward_backward")

    engine.step = counted
    ledger.begin("forward_backward")
    try:
        yield
    finally:
        engine.step = step


def _name_states(engine: Any, ledger: Any) -> None:
    """Tells the ledger which of DeepSpeed's tensors are weights, masters and states, and gradients."""
    import torch

    for parameter in engine.module.parameters():
        ledger.is_of(parameter, "parameters")
        if hasattr(parameter, "ds_tensor"):
            ledger.is_of(parameter.ds_tensor, "parameters")
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    named = {  # flat tensors and lists of them, by what their names hold (runtime/zero/stage_1_and_2.py, stage3.py)
        "fp32": "optimizer",
        "master": "optimizer",
        "bit16": "parameters",
        "fp16": "parameters",
        "grad": "gradients",
    }
    for name, value in vars(optimizer).items():
        kind = next((kind for part, kind in named.items() if part in name), None)
        if kind is not None and "ipg" not in name:
            for tensor in _tensors(value):
                ledger.is_of(tensor, kind)
    for state in inner.state.values():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                ledger.is_of(tensor, "optimizer")
    for group in inner.param_groups:
        for parameter in group["params"]:
            if inner is not optimizer and parameter.numel() and not hasattr(parameter, "ds_id"):
                ledger.is_of(parameter, "optimizer")


def _tensors(value: Any, depth: int = 3) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, dict):
        yield from _tensors(list(value.values()), depth - 1)


def _by_phase(ledger: Any, device: str) -> dict[str, dict[str, int]]:
    return {phase: dict(ledger.peaks[phase][device]) for phase in PHASES if device in ledger.peaks[phase]}


def _sum(collectives: dict[str, dict[tuple[str, int], list[int]]]) -> list[tuple[str, int, int, int]]:
    total: dict[tuple[str, int], list[int]] = {}
    for phase in collectives.values():
        for key, (calls, size) in phase.items():
            entry = total.setdefault(key, [0, 0])
            entry[0] += calls
            entry[1] += size
    return [(name, ranks, calls, size) for (name, ranks), (calls, size) in sorted(total.items())]
