"""Plans of tiny models, traced for a GPU that is not there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import yaml
from checkout import ROOT

from ulysses_exp.config import Config, ConfigError, MemoryConfig, ModelConfig, OptimConfig
from ulysses_exp.layout import Layout
from ulysses_exp.plan.depth import depths
from ulysses_exp.plan.forks import TraceError, forks
from ulysses_exp.plan.planner import Planner, bypassed_evaluation_bytes, longest_sequence, look_at
from ulysses_exp.plan.trace import Request, trace


def configured(model: str = "tiny_llama", memory: MemoryConfig | None = None, **architecture) -> Config:
    config = Config()
    config.model = ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / f"{model}.yaml").read_text()))
    config.model.architecture.update(architecture)
    config.memory = memory or MemoryConfig(name="none")
    config.optim = OptimConfig(name="adamw")
    config.zero = replace(config.zero, stage=3)
    config.train = replace(config.train, seq_len=4096, global_batch_size=1, precision="bf16")
    return config


@pytest.fixture(scope="module")
def pool():
    with forks(Config()) as pool:
        yield pool


def test_a_plan_is_of_all_layers(pool):
    """A bucket that is full in the fourth layer, as DeepSpeed's is with Llama 8B, is in a plan once. Extrapolated from
    three and four layers it is there once for every layer that is not traced."""
    config = configured(
        memory=MemoryConfig(name="m", checkpointing="non_reentrant", tiled_loss=4), num_hidden_layers=12
    )
    config.sp = replace(config.sp, size=8)
    buckets = {"reduce_bucket_size": 700_000, "stage3_param_persistence_threshold": 0}  # in elements
    planner = Planner(config, gpu=True, pool=pool, deepspeed={"zero_optimization": buckets})
    planner.depths = (3, 4)
    guessed, planned = planner.guess(2048), planner.at(2048)
    assert planned.layers == 12
    assert planned.parameters == planner.model.parameters == guessed.parameters
    assert (planned.all_to_all_calls, planned.all_to_all_bytes) == (guessed.all_to_all_calls, guessed.all_to_all_bytes)
    assert sum(planned.rest.values()) == pytest.approx(sum(guessed.rest.values()), rel=0.01)
    assert planned.peak() < guessed.peak() / 1.3


def test_both_exchanges_are_counted(pool):
    config = configured()
    config.sp = replace(config.sp, size=2)
    requests = [
        Request(replace(config, sp=replace(config.sp, exchange=name)), 2, gpu=True) for name in ("fused", "deepspeed")
    ]
    fused, upstream = pool.map(trace, requests)
    # head_dim 16: a rank sends half of what it has of q, k, v and o, forward and backward, in bf16
    assert fused.all_to_all_bytes == 2 * 2 * (4096 // 2) * (8 + 4 + 4 + 8) * 16 // 2 * 2
    assert upstream.all_to_all_bytes == fused.all_to_all_bytes
    assert (fused.all_to_all_calls, upstream.all_to_all_calls) == (2 * 2 * 2, 2 * 2 * 4)


def test_few_tiles_tell_of_many(pool):
    tiled = MemoryConfig(name="tiled", checkpointing="non_reentrant", tiled_mlp=6, tiled_loss=6)
    request = Request(configured(memory=tiled), 2, gpu=True)
    few, all_tiles = pool.map(trace, [request, replace(request, few_tiles=False)])
    assert few.peak() == pytest.approx(all_tiles.peak(), rel=0.01)


def test_many_ranks_are_traced_as_few_are(pool):
    config = configured()
    config.sp, config.dp = replace(config.sp, size=4), replace(config.dp, size=12)
    config.zero = replace(config.zero, param_persistence_threshold=0)
    config.train = replace(config.train, seq_len=256, global_batch_size=12)
    request = Request(config, 2, gpu=True)
    one_by_one = partial(patch.multiple, "ulysses_exp.plan.many_ranks", FEW=10**9)
    at_once, each = pool.map(trace, [request, replace(request, within=one_by_one)])
    assert at_once.collectives == each.collectives
    for phase, kinds in each.device.items():
        assert sum(at_once.device[phase].values()) == pytest.approx(sum(kinds.values()), rel=0.01), phase


@pytest.mark.long
def test_the_longest_sequence_just_fits(pool):
    planner = Planner(configured(), gpu=True, pool=pool)
    budget = planner.at(4096).peak() * 3
    longest = planner.longest(64, budget)
    assert longest > 4096
    assert longest % 64 == 0
    assert planner.at(longest).peak() == pytest.approx(budget, rel=0.02)
    assert planner.longest(64, budget, host_bytes=0) == 0


@pytest.mark.long
def test_a_search_ends_where_all_layers_fit(pool):
    """Wherever the guesses have led it."""
    planner = Planner(configured(num_hidden_layers=6), gpu=True, pool=pool)
    budget = planner.at(4096).peak() * 2
    right = planner.longest(64, budget)
    planner.guess = lambda length: replace(
        planner.at(length), device={"forward_backward": {"activations": 100 * length}}
    )
    assert planner.longest(64, budget) == pytest.approx(right, rel=0.02)


def test_a_first_guess_for_a_search():
    config = replace(configured(), device="cpu")
    guess = longest_sequence(config, Layout(2, 1, 0), 150 * 2**20)
    assert guess is not None
    assert guess > 1000
    assert guess % 2 == 0


@pytest.mark.long
def test_accumulation_adds_no_length(pool):
    """A search counts the optimizer's states, which DeepSpeed makes in the first step only."""
    config = configured()
    config.train = replace(config.train, global_batch_size=4)
    budget = Planner(config, gpu=True, pool=pool).at(4096).peak()
    assert 0 < Planner(config, gpu=True, pool=pool).longest(64, budget - 1) < 4096


def test_a_bypassed_evaluation_holds_the_whole_sequences_logits():
    config = replace(configured(), device="cpu", sp=replace(Config().sp, size=4))
    logits = 4096 * 256 * (2 + 4)  # tokens x bytes as vocabulary x (bf16 + fp32)
    needs = bypassed_evaluation_bytes(config)
    assert logits < needs < 3 * logits


def test_what_cannot_run_says_why(pool):
    experts = configured()
    experts.model.architecture.update(model_type="mixtral", num_local_experts=4)
    experts.memory = MemoryConfig(name="tiled", tiled_mlp=4)
    with pytest.raises(ConfigError, match=r"memory\.tiled_mlp: .* without a dense MLP"):
        Planner(experts, gpu=True, pool=pool).at(4096)
    nonsense = configured()
    nonsense.model.architecture["model_type"] = "no_such_model"
    with pytest.raises(TraceError, match="no_such_model"):
        pool.map(look_at, [nonsense])


def test_depths_cover_a_period_and_a_bucket():
    config = configured()
    assert depths(config, 7, 300_000_000) == (7,), "a shallow model is traced whole"
    assert depths(config, 32, 10**6) == (32,), "and one that fills no bucket"
    assert depths(config, 32, 300_000_000) == (3, 4)
    assert depths(config, 36, 300_000_000, period=6) == (6, 12)
    for stage in (1, 2, 3):
        config.zero = replace(config.zero, stage=stage)
        few, more = depths(config, 80, 50_000_000)
        assert few * 50_000_000 > 500_000_000, "gradients are reduced when a bucket of 500 M is full"
        assert more == few + 1
