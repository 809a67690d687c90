"""What cannot run raises the same error on every rank, beside what upstream does: a wrong number or a hang."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import masked_batches as tiny
import pytest
import torch
from rank_pool import Failed, RankPool
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from ulysses_exp.experiment.model_check import ATTENTION
from ulysses_exp.model.attention import ulysses


def registered(model: PreTrainedModel, by: str, sp: int) -> AbstractContextManager[Any]:
    return tiny.upstream(model, sp) if by == "upstream" else ulysses(model, sp=sp, exchange=by, micro_batch_size=2)


def _error(rank: int, by: str, case: str) -> float:
    """The largest error of a training forward's logits at sp 4, where one comes back."""
    data = tiny.batch({"packed": "packed", "window": "plain"}.get(case, "plain"))
    model = tiny.model("window" if case == "window" else "gqa")
    if case == "attention_of_its_own":
        _attend_alone(model)
    whole = slice(tiny.LENGTH)
    part = data.part(4, rank)
    if case == "not_divisible":
        whole = slice(94)
        part = slice(rank * 24, min(94, (rank + 1) * 24))  # torch.chunk(4): 24, 24, 24, 22 tokens
    if case == "cut":  # each rank takes 94 // 4 tokens: two fall off
        whole = slice(94)
        part = slice(rank * 23, (rank + 1) * 23)
    expected = tiny.forward(model, data, whole)[:, part]
    rows = slice(1) if case == "micro_batch" or (case == "ragged_rows" and rank == 3) else slice(tiny.BATCH)
    positions = None if case == "no_positions" else data.position_ids[rows, part]
    if case == "positions_on_some" and rank == 2:
        positions = None
    with registered(model, by, 4) as handle:
        if case == "cut" and handle is not None:
            handle.begin(data.position_ids[:, whole])
        found = model(input_ids=data.input_ids[rows, part], position_ids=positions, use_cache=False).logits
    return float((found - expected[rows]).detach().abs().max())


def _attend_alone(model: PreTrainedModel) -> None:
    """An attention that never asks for ALL_ATTENTION_FUNCTIONS, as in models of older or remote code."""

    class Alone(modeling_llama.LlamaAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o_proj(out.transpose(1, 2).flatten(2)), None

    for layer in model.model.layers:
        layer.self_attn.__class__ = Alone


def everywhere(outcomes: list[Any], message: str) -> None:
    """Every rank failed, with the same message."""
    assert all(isinstance(o, Failed) for o in outcomes), outcomes
    assert len({o.message for o in outcomes}) == 1, outcomes
    assert message in outcomes[0].message


@pytest.mark.parametrize("case", ["packed", "window", "no_positions"])
def test_what_upstream_gets_wrong_is_right(ranks: RankPool, case: str) -> None:
    assert max(ranks.run(_error, "upstream", case)) > 0.1
    assert max(ranks.run(_error, "deepspeed", case)) < 1e-5
    assert max(ranks.run(_error, "fused", case)) < 1e-5


def test_an_attention_of_its_own(ranks: RankPool) -> None:
    assert max(ranks.run(_error, "upstream", "attention_of_its_own")) > 0.1
    everywhere(ranks.outcomes(_error, "fused", "attention_of_its_own"), "called the patched attention 0 times")


def test_a_length_cut_to_a_multiple_of_sp(ranks: RankPool) -> None:
    assert not any(isinstance(o, Failed) for o in ranks.outcomes(_error, "upstream", "cut"))  # and 2 tokens are gone
    everywhere(ranks.outcomes(_error, "fused", "cut"), "94 tokens do not divide over sp.size=4")


@pytest.mark.parametrize(
    ("case", "message"),
    [("not_divisible", "hold 24, 24, 24, 22 tokens"), ("ragged_rows", "hold 2, 2, 2, 1 rows")],
)
def test_ragged_ranks(ranks: RankPool, case: str, message: str) -> None:
    outcomes = ranks.outcomes(_error, "upstream", case, timeout=10)
    assert any(isinstance(o, Failed) for o in outcomes)
    assert not any(isinstance(o, Failed) and message in o.message for o in outcomes)  # a hang or a broken connection
    for exchange in ("deepspeed", "fused"):
        everywhere(ranks.outcomes(_error, exchange, case), message)


def test_positions_on_some_ranks_only(ranks: RankPool) -> None:
    outcomes = ranks.outcomes(_error, "upstream", "positions_on_some", timeout=10)  # a broken connection or a dead rank
    assert any(isinstance(o, Failed) for o in outcomes)
    assert not any(isinstance(o, Failed) and "position_ids" in o.message for o in outcomes)
    everywhere(ranks.outcomes(_error, "fused", "positions_on_some"), "ranks [2] of the group have no position_ids")


def test_another_micro_batch_than_registered(ranks: RankPool) -> None:
    outcomes = ranks.outcomes(_error, "upstream", "micro_batch", timeout=20)
    assert all(isinstance(o, Failed) and "sp.exchange" not in o.message for o in outcomes)
    everywhere(ranks.outcomes(_error, "deepspeed", "micro_batch"), "set train.micro_batch_size=1, or sp.exchange=fused")
    assert max(ranks.run(_error, "fused", "micro_batch")) < 1e-5


def _registration(rank: int, case: str) -> None:
    changes: dict[str, Any] = {}
    family, attention = "gqa", "sdpa"
    if case == "eager":
        attention = "eager"
    if case == "layer_types":
        changes["layer_types"] = ["full_attention", "linear_attention"]
    if case == "heads":
        changes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    exchange = "deepspeed" if case in ("heads", "widths", "twice") else "fused"
    family = "gemma4" if case == "widths" else family
    model = tiny.model(family, attention, **changes)
    attention = {"unknown": "sage", "transformers": "transformers"}.get(case, attention)
    with ulysses(model, sp=4, attention=attention, exchange=exchange, micro_batch_size=1):
        if case == "twice":
            with ulysses(tiny.model(family), sp=2, exchange=exchange, micro_batch_size=1):
                pass


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("eager", "set sp.attention=sdpa"),
        ("unknown", "sp.attention=sage"),
        ("transformers", "makes masks of n x n, which Ulysses cannot shard; set sp.size=1"),
        ("layer_types", "layers of type linear_attention"),
        ("heads", "6 query heads and 3 KV heads do not divide over sp.size=4 in sp.exchange=deepspeed"),
        ("widths", "heads of 2 widths, for which sp.exchange=deepspeed has no shapes"),
        ("twice", "already registered in this process"),
    ],
)
def test_what_no_registration_takes(ranks: RankPool, case: str, message: str) -> None:
    everywhere(ranks.outcomes(_registration, case), message)


def _call(rank: int, case: str) -> None:
    attention = "flex_attention" if case == "flex_training" else "sdpa"
    data, model = tiny.batch("left"), tiny.model("gqa", attention)
    part = data.part(4, rank)
    arguments: dict[str, Any] = {"input_ids": data.input_ids[:, part], "position_ids": data.position_ids[:, part]}
    with ulysses(model, sp=4, attention=attention, exchange="fused", micro_batch_size=2) as handle:
        if case == "cache":
            cache = model(**arguments, use_cache=True).past_key_values
            arguments["past_key_values"] = cache
        if case == "mask_4d":
            arguments["attention_mask"] = torch.ones(2, 1, 24, 24)
        if case == "begin_of_another_length":
            handle.begin(data.position_ids[:, :48])
        if case == "begin_without_the_mask":
            handle.begin(data.position_ids)
            arguments["attention_mask"] = data.mask[:, part]
        if case == "part_of_the_model":
            model.model(**arguments)
        model(**arguments)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cache", "a KV cache under sequence parallelism"),
        ("mask_4d", "attention_mask has another shape than input_ids"),
        ("begin_of_another_length", "begin() told of 2 x 48 tokens, this rank got 2 x 24"),
        ("begin_without_the_mask", "begin() got no attention_mask"),
        ("flex_training", "flex_attention has no backward on CPU; set sp.attention=sdpa"),
        ("part_of_the_model", "call the model, not its parts"),
    ],
)
def test_what_no_forward_takes(ranks: RankPool, case: str, message: str) -> None:
    everywhere(ranks.outcomes(_call, case), message)


def test_names_of_attention_are_transformers_own():
    known = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in name and name != "eager"}
    assert known <= set(ATTENTION)
