"""A registration leaves nothing behind, so that one process can run several layouts."""

from __future__ import annotations

import deepspeed
import deepspeed.runtime.sequence_parallel.parallel_state_sp as parallel_state
import masked_batches as tiny
import pytest
import torch
from rank_pool import RankPool
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.model.attention import ulysses


def _state(model: torch.nn.Module) -> list[object]:
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())  # DeepSpeed's engine leaves its own
    return [
        ALL_ATTENTION_FUNCTIONS["sdpa"], dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping),
        parallel_state._SEQUENCE_PARALLEL_GROUP, parallel_state._SEQUENCE_DATA_PARALLEL_GROUP,
        list(ALL_ATTENTION_FUNCTIONS), list(ALL_MASK_ATTENTION_FUNCTIONS), model.config._attn_implementation,
        deepspeed.utils.groups.mpu, dict(deepspeed.sequence.layer._all_to_all_groups),
        [h for h in hooks if "ulysses_exp" in h.__module__], "generate" in model.__dict__,
        [m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")],
    ]  # fmt: skip


def _groups() -> set[object]:
    return set(torch.distributed.distributed_c10d._world.pg_map)


def _everything_is_restored(rank: int, exchange: str) -> None:
    data, model = tiny.batch("packed"), tiny.model("mqa")
    before = _state(model)
    for sp in (4, 2, 1, 4):
        with ulysses(model, sp=sp, exchange=exchange, micro_batch_size=2) as handle:
            assert (handle.mpu is None) == (sp == 1)
            assert _state(model) != before
            engine, *_ = deepspeed.initialize(
                model=model, mpu=handle.mpu, config={"train_micro_batch_size_per_gpu": 2},
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            )  # fmt: skip
            part = data.part(sp, rank)
            handle.begin(data.position_ids)
            engine.backward(tiny.loss(tiny.forward(engine, data, part), data, part))
            assert handle.attention_calls == 2
            engine.destroy()
        left = [(was, now) for was, now in zip(before, _state(model), strict=True) if was != now]
        assert not left, f"after sp {sp}: {left}"


@pytest.mark.parametrize("exchange", ["deepspeed", "fused"])
def test_everything_is_restored(ranks: RankPool, exchange: str) -> None:
    ranks.run(_everything_is_restored, exchange)


def _after_an_error(rank: int) -> None:
    data, model = tiny.batch("packed"), tiny.model("mqa")
    before, groups = _state(model), _groups()
    part = data.part(4, rank)
    for where in ("registration", "context", "forward"):
        with pytest.raises((ZeroDivisionError, ValueError, RuntimeError)):  # noqa: SIM117
            with ulysses(model, sp=3 if where == "registration" else 4, exchange="fused", micro_batch_size=2) as handle:
                tiny.loss(tiny.forward(model, data, part), data, part).backward()
                if where == "forward":
                    handle.begin(data.position_ids[:, :8])
                    tiny.forward(model, data, part)
                raise ZeroDivisionError
        assert (_state(model), _groups()) == (before, groups)
    model.eval()
    tiny.forward(model, tiny.batch("left"))  # fails where KV groups are left for sp 4


def test_also_after_an_error(ranks: RankPool) -> None:
    ranks.run(_after_an_error)


def _another_model_is_left_alone(rank: int) -> None:
    data, model, teacher = tiny.batch("packed"), tiny.model("gqa"), tiny.model("window")
    expected = tiny.forward(teacher, data)
    with ulysses(model, sp=4, exchange="fused", micro_batch_size=2) as handle:
        assert torch.equal(tiny.forward(teacher, data), expected)
        assert handle.attention_calls == 0


def test_another_model_is_left_alone(ranks: RankPool) -> None:
    ranks.run(_another_model_is_left_alone)


def _two_models_of_other_sizes(rank: int) -> float:
    """A teacher at sp 2 and a student of more heads at sp 4, in turns; the largest difference of their logits."""
    data, worst = tiny.batch("packed"), 0.0
    models = {2: tiny.model("window"), 4: tiny.model("gqa", hidden_size=96, num_attention_heads=12)}
    expected = {sp: tiny.forward(model, data) for sp, model in models.items()}
    with (
        ulysses(models[2], sp=2, micro_batch_size=2) as teacher,
        ulysses(models[4], sp=4, micro_batch_size=2) as student,
    ):
        for _ in range(2):
            for sp, model in models.items():
                part = data.part(sp, rank)
                found = tiny.forward(model, data, part)
                worst = max(worst, tiny.largest(found - expected[sp][:, part], data, part))
        assert teacher.attention_calls == student.attention_calls == 4
    return worst


def test_two_models_of_a_process_have_sizes_of_their_own(ranks: RankPool) -> None:
    assert max(ranks.run(_two_models_of_other_sizes)) < 1e-5
