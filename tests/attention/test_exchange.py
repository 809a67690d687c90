"""Collectives and bytes of the exchanges, and their use as a drop-in for upstream's."""

from __future__ import annotations

import masked_batches as tiny
import pytest
import torch
from rank_pool import RankPool
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.model.attention import all_to_all_bytes, ulysses
from ulysses_exp.rank.metrics.communication import AllToAllCounter


def _counts(rank: int, family: str, sp: int, exchange: str, announced: bool) -> list[tuple[int, int, int]]:
    """(all-to-alls, bytes to other ranks, gathers) of a forward and of its backward."""
    data, model = tiny.batch("plain"), tiny.model(family)
    part = data.part(sp, rank)
    gathers, gather = [], torch.distributed.all_gather
    torch.distributed.all_gather = lambda *a, **k: (gathers.append(1), gather(*a, **k))[1]
    try:
        with AllToAllCounter() as counter, ulysses(model, sp=sp, exchange=exchange, micro_batch_size=2) as handle:
            if announced:
                handle.begin(data.position_ids)
            total = tiny.loss(tiny.forward(model, data, part), data, part)
            calls, size = counter.now
            forward = (calls, size, len(gathers))
            total.backward()
            return [forward, (counter.calls - calls, counter.bytes - size, len(gathers) - forward[2])]
    finally:
        torch.distributed.all_gather = gather


@pytest.mark.parametrize("family", ["mha", "gqa", "gqa_replicated", "mqa"])
@pytest.mark.parametrize("sp", [2, 4])
def test_two_all_to_alls_a_layer_and_direction_send_the_least(ranks: RankPool, family: str, sp: int) -> None:
    layers = 2
    least = layers * all_to_all_bytes(
        sp=sp, batch=2, seq_len=tiny.LENGTH, heads=8, head_dim=8, itemsize=4,
        kv_heads=tiny.FAMILIES[family]["num_key_value_heads"],
    )  # fmt: skip
    for forward, backward in ranks.run(_counts, family, sp, "fused", True):
        assert forward == (2 * layers, least, 0)
        assert backward == (2 * layers, least, 0)


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "sp"),
    [("uneven", 9, 3, 2), ("uneven", 9, 3, 4), ("few_heads", 2, 1, 4), ("one_kv_of_three", 3, 1, 4)],
)
def test_heads_that_do_not_divide_send_what_their_shares_say(
    ranks: RankPool, family: str, heads: int, kv_heads: int, sp: int
) -> None:
    layers = 2
    least = [
        layers
        * all_to_all_bytes(
            sp=sp, batch=2, seq_len=tiny.LENGTH, heads=heads, head_dim=8, itemsize=4, kv_heads=kv_heads, backward=back
        )
        for back in (False, True)
    ]
    found = ranks.run(_counts, family, sp, "fused", True)
    for direction in (0, 1):
        counts = [of_rank[direction] for of_rank in found]
        assert {(calls, gathers) for calls, _, gathers in counts} == {(2 * layers, 0)}
        assert max(size for _, size, _ in counts) == least[direction]


def test_what_upstreams_exchange_takes(ranks: RankPool) -> None:
    for forward, backward in ranks.run(_counts, "gqa", 2, "deepspeed", True):
        assert (forward[0], backward[0]) == (8, 8)


def test_without_begin_positions_are_gathered_once_a_forward(ranks: RankPool) -> None:
    for forward, backward in ranks.run(_counts, "gqa", 4, "fused", False):
        assert (forward[2], backward[2]) == (2, 0)  # shapes, then positions


def test_bytes_by_hand() -> None:
    # 1,024 tokens at sp 4: 256 a rank; each of 3 ranks gets 2 query, 1 key and 1 value head of 16 floats, returns 2
    assert all_to_all_bytes(
        sp=4, batch=1, seq_len=1024, heads=8, kv_heads=4, head_dim=16, itemsize=4
    ) == 3 * 256 * 6 * 16 * 4  # fmt: skip
    assert all_to_all_bytes(sp=1, batch=1, seq_len=64, heads=8, kv_heads=8, head_dim=16, itemsize=2) == 0


def _values_of_another_size(rank: int) -> tuple[float, float]:
    """Value heads of size 6 beside keys of size 8, one KV head for four ranks, against one process."""
    from ulysses_exp.model.attention.exchange import FusedUlyssesAttention

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = torch.nn.Module().train()
    module.num_key_value_groups = 8
    fused = FusedUlyssesAttention(
        attn=sdpa, batch_size=1, attn_head_count=8, attn_head_size=8, kv_head_count=1, num_hidden_layers=1,
        process_group=torch.distributed.group.WORLD, seq_length_is_variable=True,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = [torch.randn(3, heads, 32, dim, requires_grad=True) for heads, dim in ((8, 8), (1, 8), (1, 6))]
    expected = sdpa(module, *whole, None)[0].flatten(2)
    part = slice(rank * 8, (rank + 1) * 8)
    found, _ = fused(module, *(x[:, :, part] for x in whole), None)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weight[:, part]).sum(), whole)
    for gradient in ours:
        torch.distributed.all_reduce(gradient)
    theirs = torch.autograd.grad((expected * weight).sum(), whole)
    return float((found - expected[:, part]).abs().max()), max(
        float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)
    )


def test_value_heads_may_have_another_size(ranks: RankPool) -> None:
    for logits, gradients in ranks.run(_values_of_another_size):
        assert logits <= 1e-6
        assert gradients <= 1e-6


PLANNING = """
import torch, deepspeed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
import masked_batches as tiny
from ulysses_exp.model.attention import ulysses
from ulysses_exp.rank.metrics.communication import AllToAllCounter
from ulysses_exp.rank.upstream import without_operators_of_its_own

without_operators_of_its_own()
torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
packed = tiny.batch("packed")
for announced in (None, packed.position_ids):
    for exchange in ("fused", "deepspeed"):
        with FakeTensorMode(), AllToAllCounter() as counter:
            model = tiny.model("gemma3")
            with ulysses(model, sp=4, exchange=exchange, micro_batch_size=2) as handle:
                if announced is not None:
                    handle.begin(announced)
                ids = torch.zeros(2, tiny.LENGTH // 4, dtype=torch.int64)
                positions = torch.arange(tiny.LENGTH // 4).expand(2, -1)
                model(input_ids=ids, position_ids=positions, use_cache=False).logits.sum().backward()
            print(exchange, counter.calls)
"""


@pytest.mark.long
def test_a_fake_trace_plans_without_values(tmp_path) -> None:
    import os
    import subprocess
    import sys
    from pathlib import Path

    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PLANNING], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": f"{here}:{here.parent.parent}", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("fused", "deepspeed"))]
    assert lines == ["fused 8", "deepspeed 0"] * 2  # upstream's operator has a fake of its own, without the collective
