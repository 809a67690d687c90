"""Training in bf16: what is computed in 16 bits, and the fp32 that everything is added up in.

The forward and the backward work on bf16 weights. fp32 are the weights that the optimizer steps (the masters), the
gradients of several micro steps, and what ranks add of one another's. A sum of 64 micro steps in bf16 is off by 8e-3,
in fp32 by 3e-8 (tests/numbers/test_mixed_precision.py).
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ulysses_exp.launch import heartbeat
from ulysses_exp.rank.checkpoints.homes import WEIGHTS, fragments

_AT_ONCE = 1 << 26  # elements of a weight that are sent at once: 256 MiB


def entries(stage: int) -> dict[str, Any]:
    """What DeepSpeed is told in bf16, so that gradients are added in fp32 over micro steps and over ranks.

    Left alone it adds micro steps in bf16, and ranks in bf16 without and in fp32 with sequence parallelism. It refuses
    `grad_accum_dtype` at stage 0, where `accumulate` stands for it.
    """
    return {"communication_data_type": "fp32"} | ({"data_types": {"grad_accum_dtype": "fp32"}} if stage else {})


def lower(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Casts the weights of `model`, which are fp32, to bf16; buffers stay as they are.

    Returns:
        On rank 0, the fp32 weights that lose bits by it: for `give_masters`. Nothing on the others, whose weights are
        memory that nothing has been written to (`model.build`).
    """
    kept: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        full = parameter.data
        if dist.get_rank():
            parameter.data = torch.empty_like(full, dtype=torch.bfloat16)
            continue
        parameter.data = full.to(torch.bfloat16)
        if parameter.requires_grad and loses_bits(full, parameter.data):
            kept[name] = full
    return kept


def loses_bits(full: torch.Tensor, low: torch.Tensor) -> bool:
    """Whether `low`, which is `full` in another type, cannot be made `full` again."""
    return not torch.equal(low.to(full.dtype), full)


def give_masters(engine: deepspeed.DeepSpeedEngine, kept: dict[str, torch.Tensor]) -> None:
    """Makes the engine's fp32 weights those of rank 0's `kept`, which is emptied; DeepSpeed has made them from bf16.

    Collective over the world. A piece of one weight at a time is on the device, and each rank takes its own part.
    """
    sizes = [{name: full.numel() for name, full in kept.items()}]
    dist.broadcast_object_list(sizes)
    own = {f.name: f for f in fragments(engine) if f.kind == WEIGHTS and f.data.dtype == torch.float32}
    for name, size in sizes[0].items():
        full = kept.pop(name).view(-1) if dist.get_rank() == 0 else None
        part = own.get(name)
        for begin in range(0, size, _AT_ONCE):
            heartbeat.beat()
            count = min(_AT_ONCE, size - begin)
            if full is not None:
                piece = full[begin : begin + count].to(engine.device)
            else:
                piece = torch.empty(count, device=engine.device)
            dist.broadcast(piece, 0)
            if part is not None:
                first, last = max(part.start, begin), min(part.start + part.data.numel(), begin + count)
                if first < last:
                    part.data[first - part.start : last - part.start].copy_(piece[first - begin : last - begin])


def accumulate(engine: deepspeed.DeepSpeedEngine) -> None:
    """At stage 0 in bf16, has autograd add gradients in fp32: `.grad` of the bf16 weights is then fp32.

    DeepSpeed 0.19.8 reduces such gradients as they are. It makes one of zeros for a weight that has got none, in bf16
    (engine.py, `_get_gradients_for_reduction`), which torch refuses; so that is done here.
    """
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
    reduced = engine._get_gradients_for_reduction

    def with_zeros() -> Any:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        return reduced()

    engine._get_gradients_for_reduction = with_zeros
