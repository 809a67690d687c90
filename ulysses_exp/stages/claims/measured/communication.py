"""C1 to C4: what a forward in eval mode does, and in train mode."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ulysses_exp.launch import heartbeat
from ulysses_exp.stages.claims.measured.batches import Batch
from ulysses_exp.stages.claims.measured.checkpoints import said
from ulysses_exp.stages.claims.measured.reference import Reference
from ulysses_exp.stages.claims.measured.subject import Subject, head_size
from ulysses_exp.stages.claims.measured.trainer import trainers_logits


def count(subject: Subject, reference: Reference) -> dict[str, Any]:
    """Figures of the four claims, by claim; this rank's. Collective over the world."""
    bypassed, off = _bypass(subject, reference)
    return {
        "C1": bypassed,
        "C2": _direct(subject),
        "C3": _modes(subject, reference),
        "C4": {"off": off, **trainers_logits(subject, reference)},
    }


def _bypass(subject: Subject, reference: Reference) -> tuple[dict[str, Any], dict[str, float | None]]:
    """A forward in eval mode over every batch: what C1 counts, and how far the logits are off, relative, by batch."""
    subject.engine.eval()
    found: dict[str, Any] = {
        "all_to_alls": 0, "others_in_attention": 0, "others": {}, "calls": 0, "arrived": 0, "moved": 0,
        "batches": [batch.name for batch in reference.own], "refused": {},
    }  # fmt: skip
    off: dict[str, float | None] = {}
    for batch, expected in zip(reference.own, reference.logits, strict=True):
        heartbeat.beat()
        with subject.calls.counted() as collectives:
            try:
                with torch.no_grad():
                    logits = subject.engine(**batch.inputs(device=subject.device), use_cache=False).logits
            except (AssertionError, RuntimeError, ValueError) as error:  # of a shape
                found["refused"][batch.name] = said(error)
                off[batch.name] = None
                continue
            finally:
                found["all_to_alls"] += collectives.count(all_to_all=True)
                found["others_in_attention"] += collectives.count(inside=True, all_to_all=False)
                for name, calls in collectives.by_name().items():
                    if "alltoall" not in name:
                        found["others"][name] = found["others"].get(name, 0) + calls
                found["calls"] += len(subject.calls.came)
                found["arrived"] += len(subject.calls.arrived)
                found["moved"] += subject.calls.moved()
        off[batch.name] = difference(batch, logits, expected)
    return found, off


def _direct(subject: Subject) -> dict[str, Any]:
    """One call of the constructed class in eval mode, with a mask, beside the same call of the original function."""
    text = subject.model.config.get_text_config()
    module = _attention_of(subject.model)
    module.eval()
    rows, tokens = subject.config.train.micro_batch_size + 1, 31  # neither what it was constructed with
    heads = text.num_attention_heads
    kv, size = getattr(text, "num_key_value_heads", None) or heads, head_size(text)
    draw = torch.Generator().manual_seed(subject.rank)
    dtype = next(subject.model.parameters()).dtype
    query, key, value = (
        torch.randn(rows, n, tokens, size, generator=draw).to(dtype).to(subject.device) for n in (heads, kv, kv)
    )
    mask = None
    if subject.config.sp.attention in ("auto", "sdpa", "transformers"):  # others have masks of their own kind
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, 1, -1, -1).clone()
        causal[0, :, 10:, :10] = False
        mask = causal.to(subject.device)
    arguments = {"scaling": size**-0.5, "dropout": 0.0}
    if getattr(text, "sliding_window", None):
        arguments["sliding_window"] = None
    with torch.no_grad():
        expected = subject.original(module, query, key, value, mask, **arguments)[0]
        with subject.calls.counted() as collectives:
            got = subject.direct(module, query, key, value, mask, **arguments)[0]
            arrived = [places for places, _, _ in subject.calls.arrived]
    given = tuple((t.data_ptr(), t.storage_offset()) for t in (query, key, value))
    return {
        "all_to_alls": collectives.count(all_to_all=True),
        "others": collectives.count(all_to_all=False),
        "arrived": len(arrived),
        "moved": sum(places != given for places in arrived),
        "equal": bool(torch.equal(got, expected)),
    }


#: (name, training, with gradients): what else could decide is given both ways
_MODES = (
    ("train", True, True), ("eval", False, False), ("train without gradients", True, False),
    ("eval with gradients", False, True), ("train again", True, True),
)  # fmt: skip


def _modes(subject: Subject, reference: Reference) -> dict[str, Any]:
    """One batch, the same on all ranks: sliced where the model trains, whole where it evaluates."""
    found = []
    for name, training, gradients in _MODES:
        heartbeat.beat()
        subject.engine.train(training)
        part = subject.slice if training else slice(None)
        with subject.calls.counted(), contextlib.nullcontext() if gradients else torch.no_grad():
            logits = subject.engine(**reference.common.inputs(part, subject.device), use_cache=False).logits
            came, arrived, moved = len(subject.calls.came), len(subject.calls.arrived), subject.calls.moved()
        found.append(
            {
                "mode": name,
                "calls": came,
                "expected_bypass": not training or subject.config.layout.sp == 1,
                "bypassed": arrived > 0 and moved == 0,
                "off": difference(reference.common, logits.detach(), reference.common_logits[:, part]),
            }
        )
        del logits
    return {"modes": found}


def difference(batch: Batch, logits: Tensor, expected: Tensor) -> float:
    """The largest at real tokens, of the largest logit; inf where it is not finite."""
    if batch.mask is None or batch.mask.shape[:2] != logits.shape[:2]:
        got, right = logits.float().cpu(), expected
    else:
        got, right = batch.real(logits.float().cpu()), batch.real(expected)
    off = float((got - right).abs().max() / right.abs().max())
    return off if off == off else float("inf")


def _attention_of(model: Any) -> Any:
    """The first layer's attention module."""
    return next(m for m in model.modules() if hasattr(m, "num_key_value_groups") and hasattr(m, "layer_idx"))
