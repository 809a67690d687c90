"""C5: which weights a rank holds, and what else it holds, in bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ulysses_exp.rank.checkpoints.fingerprints import module_digests
from ulysses_exp.rank.checkpoints.homes import fragments
from ulysses_exp.stages.claims.measured.subject import Subject


def count(subject: Subject) -> dict[str, Any]:
    """Digests before and after an AdamW step, and bytes. Collective over the world.

    Returns:
        `C5`: `before` and `after`, a digest of all weights as this rank computes with them; `bytes` of this rank's
        weights between two uses, and of gradients, optimizer states (fp32 masters included) and activations, what a
        forward over its slice of a batch keeps for the backward; `whole`, the bytes of all weights.
    """
    before = digest(subject)
    activations = _activations(subject)
    with _watched(subject) as gradients:
        subject.step(0)
    weights = list(subject.model.parameters())
    own = {t.untyped_storage().data_ptr() for t in held(weights)}
    states = [f.data for f in fragments(subject.engine) if f.data.untyped_storage().data_ptr() not in own]
    return {
        "C5": {
            "before": before,
            "after": digest(subject),
            "whole": sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in weights),
            "bytes": {
                "weights": size(held(weights)),
                "gradients": max(gradients, default=0),
                "optimizer": size(states),
                "activations": activations,
            },
        }
    }


def digest(subject: Subject) -> str:
    """Of all weights in this rank's forward."""
    text = " ".join(f"{name}={value}" for name, value in sorted(module_digests(subject.engine).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def held(parameters: Iterable[Any]) -> list[Tensor]:
    """The memory in which this rank holds them: whole, or under ZeRO 3 its part, and beside it what stays gathered."""
    found = []
    for parameter in parameters:
        part = getattr(parameter, "ds_tensor", None)
        found += [t for t in (part, parameter.data) if t is not None and t.numel()]
    return found


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _activations(subject: Subject) -> int:
    """Bytes that a training forward keeps for its backward, weights left out."""
    layout, train = subject.config.layout, subject.config.train
    tokens = train.seq_len // layout.sp
    ids = torch.zeros(train.micro_batch_size, tokens, dtype=torch.int64, device=subject.device)
    positions = torch.arange(subject.slice.start, subject.slice.stop, device=subject.device).expand_as(ids).contiguous()
    kept: dict[int, Tensor] = {}  # held, so that no address is given twice

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in {p.data.untyped_storage().data_ptr() for p in subject.model.parameters()}:
            kept[place] = tensor.detach()
        return tensor

    subject.engine.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.engine(input_ids=ids, position_ids=positions, use_cache=False)
    return size(kept.values())


@contextmanager
def _watched(subject: Subject) -> Iterator[list[int]]:
    """Bytes of gradients at each call of the engine's step, before it is made."""
    engine, found = subject.engine, []
    step = engine.step

    def noting(*args: Any, **kwargs: Any) -> Any:
        found.append(size(_gradients(engine)))
        return step(*args, **kwargs)

    engine.step = noting
    try:
        yield found
    finally:
        del engine.step


def _gradients(engine: Any) -> list[Tensor]:
    """Those of parameters, and those that DeepSpeed 0.19.8 keeps in its optimizers' `averaged_gradients`."""
    found = [p.grad for p in engine.module.parameters() if p.grad is not None]
    for group in (getattr(engine.optimizer, "averaged_gradients", None) or {}).values():
        found += [g for g in (group if isinstance(group, list | tuple) else [group]) if isinstance(g, Tensor)]
    return found
