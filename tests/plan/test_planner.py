"""Plans of tiny models, traced for a GPU that is not there."""

from __future__ import annotations

from dataclasses import replace

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


@pytest.mark.long
def test_two_depths_tell_the_whole(pool):
    config = configured(num_hidden_layers=6)
    planner = Planner(config, gpu=True, pool=pool)
    assert planner.depths == (3, 4)
    part, whole = planner.at(4096), planner.full()
    assert part.parameters == whole.parameters
    assert (part.all_to_all_calls, part.all_to_all_bytes) == (whole.all_to_all_calls, whole.all_to_all_bytes)
    for phase, kinds in whole.device.items():
        assert sum(part.device[phase].values()) == pytest.approx(sum(kinds.values()), rel=0.01), phase


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


@pytest.mark.long
def test_the_longest_sequence_just_fits(pool):
    planner = Planner(configured(), gpu=True, pool=pool)
    budget = planner.at(4096).peak() * 3
    longest = planner.longest(64, budget)
    assert longest > 4096
    assert longest % 64 == 0
    assert planner.at(longest).peak() == pytest.approx(budget, rel=0.02)
    assert planner.longest(64, budget, host_bytes=0) == 0


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
    assert depths(config, 4, 10**6) == (4,), "a shallow model is traced whole"
    assert depths(config, 32, 10**6) == (3, 4)
    assert depths(config, 36, 10**6, period=6) == (6, 12)
    config.zero = replace(config.zero, stage=2)
    few, more = depths(config, 80, 50_000_000)
    assert few * 50_000_000 > 500_000_000, "stage 2 reduces when a bucket of 500 M is full"
    assert more == few + 1
