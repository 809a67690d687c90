"""Symptoms of DeepSpeed 0.19.8 that `attention/upstream.py` works around. A failure here says: mended."""

from __future__ import annotations

from datetime import timedelta

import deepspeed.runtime.sequence_parallel.parallel_state_sp as parallel_state
import masked_batches as tiny
import pytest
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from rank_pool import RankPool
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.model.attention.upstream import attention_module, group_timeout


def _a_second_registration_fails(rank: int) -> None:
    with tiny.upstream(tiny.model("gqa"), 4), pytest.raises(AssertionError, match="already initialized"):
        UlyssesSPAttentionHF.register_with_transformers(tiny.model("gqa"), "sdpa", 4, 1)


def _with_the_groups_forgotten_it_wraps_the_wrapper(rank: int) -> None:
    with tiny.upstream(tiny.model("gqa"), 4):
        first = ALL_ATTENTION_FUNCTIONS["sdpa"]
        groups = parallel_state._SEQUENCE_PARALLEL_GROUP, parallel_state._SEQUENCE_DATA_PARALLEL_GROUP
        parallel_state._release_sequence_parallel_groups()
        UlyssesSPAttentionHF.register_with_transformers(tiny.model("gqa"), "sdpa", 4, 1)
        assert attention_module(ALL_ATTENTION_FUNCTIONS["sdpa"]).attn is first
        torch.distributed.barrier()
        for group in groups:
            torch.distributed.destroy_process_group(group)


def _kv_groups_change_for_good(rank: int) -> None:
    model, data = tiny.model("gqa_replicated"), tiny.batch("plain")
    attention = model.model.layers[0].self_attn
    with tiny.upstream(model, 4):
        assert attention.num_key_value_groups == 4
        tiny.forward(model, data, data.part(4, rank))
        assert attention.num_key_value_groups == 2
    assert attention.num_key_value_groups == 4  # restored by `kv_groups`


def _groups_wait_for_half_an_hour(rank: int) -> None:
    """Whatever the world's timeout is; `group_timeout` gives them one."""

    def waits() -> timedelta:
        group = parallel_state.get_sequence_parallel_group()
        return group._get_backend(torch.device("cpu")).options._timeout

    with tiny.upstream(tiny.model("gqa"), 4):
        assert waits() == timedelta(minutes=30)
    with group_timeout(timedelta(seconds=77)), tiny.upstream(tiny.model("gqa"), 4):
        assert waits() == timedelta(seconds=77)


@pytest.mark.parametrize(
    "check",
    [
        _groups_wait_for_half_an_hour,
        _a_second_registration_fails,
        _with_the_groups_forgotten_it_wraps_the_wrapper,
        _kv_groups_change_for_good,
    ],
    ids=lambda check: check.__name__.strip("_"),
)
def test_upstream_still(ranks: RankPool, check) -> None:
    ranks.run(check)
