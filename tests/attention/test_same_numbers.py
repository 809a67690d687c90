"""Logits and gradients under sequence parallelism are those of the unpatched model on whole sequences."""

from __future__ import annotations

import masked_batches as tiny
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool

from ulysses_exp.model.attention import ulysses

LOGITS, GRADIENTS = 1e-5, 1e-5  # absolute (logits are of order 5), and relative by norm


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _layouts(rank: int, family: str, kind: str) -> dict[str, float]:
    """The largest differences over sp 2 and 4, both exchanges, with and without begin()."""
    data = tiny.batch(kind)
    reference = tiny.model(family)
    # transformers' gpt-oss (5.23) makes its masks without positions, so packed documents see each other; Llama 4 scales
    # queries by places in the row
    leaks = (family == "gpt_oss" and kind == "packed") or family == "llama4"
    expected = tiny.alone(reference, data) if leaks else tiny.forward(reference, data)
    tiny.loss(expected, data).backward()
    whole = _gradients(reference)
    worst = {"logits": 0.0, "gradients": 0.0, "fused_is_deepspeed": 1.0}
    exchanges = ("fused",) if family in tiny.OURS_ALONE else ("deepspeed", "fused")
    for sp in (2, 4):
        part, seen = data.part(sp, rank), []
        for exchange in exchanges:
            model = tiny.model(family)
            with ulysses(model, sp=sp, exchange=exchange, micro_batch_size=tiny.BATCH) as handle:
                group = handle.mpu.get_sequence_parallel_group()
                for announced in (True, False):
                    model.zero_grad()
                    if announced:
                        handle.begin(data.position_ids, data.mask)
                    logits = tiny.forward(model, data, part, mask=not announced)
                    tiny.loss(logits, data, part).backward()
                    worst["logits"] = max(worst["logits"], tiny.largest(logits - expected[:, part], data, part))
                    for name, gradient in _gradients(model).items():
                        dist.all_reduce(gradient, group=group)
                        error = float((gradient - whole[name]).norm() / whole[name].norm())
                        worst["gradients"] = max(worst["gradients"], error)
            seen.append([logits, *_gradients(model).values()])
        if not all(torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True)):
            worst["fused_is_deepspeed"] = 0.0
    return worst


def _kinds(family: str) -> tuple[str, ...]:
    if family in ("gqa", "gemma3"):
        return tiny.BATCHES
    return ("packed",) if family in tiny.OURS_ALONE else ("packed", "left")


def _holds(ranks: RankPool, family: str, kind: str) -> None:
    for found in ranks.run(_layouts, family, kind):
        assert found["logits"] <= LOGITS, (kind, found)
        assert found["gradients"] <= GRADIENTS, (kind, found)
        assert found["fused_is_deepspeed"] == 1.0, f"{kind}: the exchanges differ in a bit"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layout_gives_the_unpatched_numbers(ranks: RankPool, family: str) -> None:
    for kind in _kinds(family):
        _holds(ranks, family, kind)


@pytest.mark.long
@pytest.mark.parametrize("family", tiny.OURS_ALONE)
@pytest.mark.parametrize("kind", tiny.BATCHES)
def test_also_of_every_kind_of_batch(ranks: RankPool, family: str, kind: str) -> None:
    _holds(ranks, family, kind)


def _checkpointed(rank: int, reentrant: bool, exchange: str, family: str) -> float:
    """Two forwards before the first backward: each is recomputed with its own documents."""
    batches = [tiny.batch("packed"), tiny.batch("left")]
    reference = tiny.model(family)
    whole_forward = tiny.alone if family == "llama4" else tiny.forward  # as above
    sum(tiny.loss(whole_forward(reference, data), data) for data in batches).backward()
    model = tiny.model(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with ulysses(model, sp=2, exchange=exchange, micro_batch_size=tiny.BATCH) as handle:
        losses = []
        for data in batches:
            handle.begin(data.position_ids, data.mask)
            part = data.part(2, rank)
            losses.append(tiny.loss(tiny.forward(model, data, part, mask=False), data, part))
        sum(losses).backward()
        group = handle.mpu.get_sequence_parallel_group()
        for gradient in _gradients(model).values():
            dist.all_reduce(gradient, group=group)
    whole = _gradients(reference)
    return max(float((g - whole[n]).norm() / whole[n].norm()) for n, g in _gradients(model).items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("exchange", ["deepspeed", "fused"])
def test_activation_checkpointing_recomputes_the_same(ranks: RankPool, reentrant: bool, exchange: str) -> None:
    assert max(ranks.run(_checkpointed, reentrant, exchange, "gemma3")) <= GRADIENTS


@pytest.mark.parametrize("reentrant", [False, True])
def test_also_where_attention_is_given_no_positions(ranks: RankPool, reentrant: bool) -> None:
    """Llama 4 hands its attention nothing that tells one forward from another."""
    assert max(ranks.run(_checkpointed, reentrant, "fused", "llama4")) <= GRADIENTS


def _sp_eval(rank: int) -> float:
    data, model = tiny.batch("packed"), tiny.model("gemma3").eval()
    part = data.part(4, rank)
    with torch.no_grad(), ulysses(model, sp=4, exchange="fused", micro_batch_size=2, disable_in_eval=False) as handle:
        sharded = tiny.forward(model, data, part)
        handle.disable_in_eval = True  # both ways in one process
        bypassed = tiny.forward(model, data)
    return tiny.largest(sharded - bypassed[:, part], data, part)


def test_eval_under_sequence_parallelism_agrees_with_the_bypass(ranks: RankPool) -> None:
    assert max(ranks.run(_sp_eval)) <= LOGITS


def _ignored(rank: int, family: str) -> float:
    """How far logits are off where what is special to the family is left out: what the tests above would see."""
    data = tiny.batch("plain")
    whole, special = tiny.model(family), tiny.model(family)
    expected = tiny.forward(whole, data)
    part = data.part(2, rank)
    if family == "gpt_oss":
        for layer in special.model.layers:
            layer.self_attn.sinks.data.fill_(-torch.inf)
    if family == "gemma2":
        for layer in special.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    if family == "llama4":
        special.config.attention_chunk_size = tiny.LENGTH
    with torch.no_grad(), ulysses(special, sp=2, micro_batch_size=tiny.BATCH):
        return tiny.largest(tiny.forward(special, data, part) - expected[:, part], data, part)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "llama4"])
def test_what_is_special_to_a_family_shows_in_the_logits(ranks: RankPool, family: str) -> None:
    assert max(ranks.run(_ignored, family)) > 0.1
