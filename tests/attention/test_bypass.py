"""In eval with `disable_in_eval` a model is the unpatched one: padded, ragged and packed batches, generate, Trainer."""

from __future__ import annotations

import masked_batches as tiny
import pytest
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from rank_pool import RankPool
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ulysses_exp.model.attention import ulysses
from ulysses_exp.model.attention.exchange import FusedUlyssesAttention
from ulysses_exp.model.attention.upstream import entry
from ulysses_exp.rank.metrics.communication import AllToAllCounter


@torch.no_grad()
def _logits(rank: int, how: str, family: str, kind: str) -> float:
    """The largest difference from the unpatched logits at real tokens. Ranks have batches of different lengths."""
    data, model = tiny.batch(kind), tiny.model(family).eval()
    cut = tiny.LENGTH - 4 * rank
    expected = tiny.forward(model, data, slice(cut))
    with AllToAllCounter() as counter:
        if how == "upstream":
            with tiny.upstream(model, 2, disable_in_eval=True):
                found = tiny.forward(model, data, slice(cut))
        elif how in ("UlyssesSPAttentionHF", "FusedUlyssesAttention"):
            with entry(ALL_ATTENTION_FUNCTIONS, "sdpa"):
                kind_of = {"UlyssesSPAttentionHF": UlyssesSPAttentionHF, "FusedUlyssesAttention": FusedUlyssesAttention}
                ALL_ATTENTION_FUNCTIONS["sdpa"] = kind_of[how](
                    attn=ALL_ATTENTION_FUNCTIONS["sdpa"], batch_size=2, attn_head_count=8, attn_head_size=8,
                    kv_head_count=4, num_hidden_layers=2, process_group=torch.distributed.group.WORLD,
                    seq_length_is_variable=True, disable_in_eval=True,
                )  # fmt: skip
                found = tiny.forward(model, data, slice(cut))
        else:
            with ulysses(model, sp=2, exchange=how, micro_batch_size=1) as handle:
                if rank % 2:
                    handle.begin(data.position_ids)  # not asked for, and without effect
                found = tiny.forward(model, data, slice(cut))
    assert counter.calls == 0
    return tiny.largest(found - expected, data, slice(cut))


@pytest.mark.parametrize("how", ["deepspeed", "fused", "UlyssesSPAttentionHF", "FusedUlyssesAttention"])
@pytest.mark.parametrize("kind", ["left", "right", "packed"])
def test_logits_are_the_unpatched_models(ranks: RankPool, how: str, kind: str) -> None:
    """To the bit where transformers' function is called; the core attention makes no mask and rounds otherwise."""
    direct = "Ulysses" in how
    assert max(ranks.run(_logits, how, "gqa" if direct else "gemma3", kind)) <= (0.0 if direct else 5e-6)


@pytest.mark.parametrize("how", ["deepspeed", "fused"])
def test_logits_of_plain_batches_are_the_same_to_the_bit(ranks: RankPool, how: str) -> None:
    assert ranks.run(_logits, how, "gqa", "plain") == [0.0] * 4


def test_upstream_loses_the_mask(ranks: RankPool) -> None:
    assert min(ranks.run(_logits, "upstream", "gqa", "left")) > 0.1
    assert min(ranks.run(_logits, "upstream", "gqa", "packed")) > 0.1


@torch.no_grad()
def _generated(rank: int, register: str) -> tuple[bool, str]:
    """Whether eight greedy tokens after left-padded prompts are those of the unpatched model; an error otherwise."""
    data, model = tiny.batch("left"), tiny.model("gqa_replicated").eval()
    prompt = {"input_ids": data.input_ids, "attention_mask": data.mask}
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**prompt, **greedy)
    if register == "upstream":
        with tiny.upstream(model, 4, disable_in_eval=True):
            return torch.equal(model.generate(**prompt, **greedy), expected), ""
    with ulysses(model, sp=4, exchange="fused", micro_batch_size=2) as handle:
        handle.disable_in_eval = register == "bypass"
        try:
            same = torch.equal(model.generate(**prompt, **greedy), expected)
        except RuntimeError as error:
            return False, str(error)
        return same and torch.equal(model.generate(**prompt, **greedy, use_cache=False), expected), ""


def test_generate_works_under_bypass(ranks: RankPool) -> None:
    assert not any(same for same, _ in ranks.run(_generated, "upstream"))  # the masks are lost
    assert ranks.run(_generated, "bypass") == [(True, "")] * 4


def test_generate_is_refused_under_sequence_parallelism(ranks: RankPool) -> None:
    for same, message in ranks.run(_generated, "sp"):
        assert not same and "set eval.mode=bypass" in message


def _evaluated(rank: int, folder: str) -> tuple[float, float]:
    """`Trainer.evaluate()` of a bypassed and of the unpatched model, over sequences of many lengths, left-padded."""
    import os

    from transformers import Trainer, TrainingArguments

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # read, not used: the process group exists
    ids = tiny.batch("plain", rows=10).input_ids
    sequences = [{"input_ids": ids[i, : 9 * i + 5].tolist()} for i in range(10)]

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        pads = [width - len(row["input_ids"]) for row in rows]
        tokens = torch.tensor([[0] * n + row["input_ids"] for n, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in pads])
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    model = tiny.model("gqa_replicated")
    arguments = TrainingArguments(
        output_dir=folder, per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments, eval_dataset=sequences, data_collator=collate)
    unpatched = trainer.evaluate()["eval_loss"]
    with ulysses(model, sp=4, exchange="fused", micro_batch_size=1) as handle:
        bypassed = trainer.evaluate()["eval_loss"]
        assert handle.attention_calls > 0
    return unpatched, bypassed


def test_trainer_evaluates_a_bypassed_model(ranks: RankPool, tmp_path) -> None:
    results = ranks.run(_evaluated, str(tmp_path))
    assert all(abs(unpatched - bypassed) <= 1e-6 * unpatched for unpatched, bypassed in results)
    assert len(set(results)) == 1
