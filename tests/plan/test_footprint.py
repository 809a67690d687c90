"""The closed formulas of memory say what plans say, to a quarter; and count the parameters that transformers makes."""

from __future__ import annotations

import pytest
from checkout import ROOT

from ulysses_exp.config import Config, fitting, footprint, resolve
from ulysses_exp.config.composing import composed, unchecked
from ulysses_exp.config.hardware import load
from ulysses_exp.layout import Layout
from ulysses_exp.plan.forks import Forks, forks
from ulysses_exp.plan.planner import Planner, look_at

MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem != "hub")
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 512, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 128},
    "gemma2": {"head_dim": 128},
    "gemma3_text": {"head_dim": 128},
}
WIDE = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    with forks(Config()) as pool:
        yield pool


def planned(pool: Forks, config: Config) -> tuple[float, float]:
    """Bytes of a rank: at the fullest moment of training, and of a bypassed evaluation by the engine that trains."""
    planner = Planner(config, gpu=True, pool=pool)
    trained, evaluated = planner.at(config.train.seq_len), planner.evaluation()
    evaluation = evaluated.peak("evaluation") - sum(evaluated.rest.values())
    return trained.peak(), evaluation + sum(trained.rest.values())


@pytest.mark.long
def test_parameters_are_those_that_transformers_makes(pool):
    configs = [unchecked([f"model={model}"]) for model in MODELS]
    for config in configs:
        config.model.architecture["num_hidden_layers"] = 4  # one is like another; building 80 takes its time
    for kind, more in FAMILIES.items():
        configs.append(unchecked(["model=tiny_llama"]))
        configs[-1].model.architecture = {"model_type": kind, **WIDE, **more}
    for config, model in zip(configs, pool.map(look_at, configs), strict=True):
        of = footprint.shape(config)
        assert of is not None and of.parameters == pytest.approx(model.parameters, rel=0.005), config.model


def test_a_model_of_another_kind_is_not_known():
    config = unchecked(["model=tiny_llama"])
    config.model.architecture = {"model_type": "gpt_neox", **WIDE}
    assert footprint.shape(config) is None, "its MLP has two matrices, not three"


@pytest.mark.long
def test_the_formulas_say_what_a_plan_says(pool):
    """Of a model of six layers whose logits are half of what is needed."""
    config = unchecked(
        ["model=llama3_1b", "sp.size=2", "train.seq_len=8192", "train.global_batch_size=2", "eval=bypass"]
    )
    config.model.architecture["num_hidden_layers"] = 6
    of = footprint.shape(config)
    training, evaluation = planned(pool, config)
    assert footprint.training(config, of).estimated == pytest.approx(training, rel=0.25)
    assert footprint.bypassed_evaluation(config, of).estimated == pytest.approx(evaluation, rel=0.25)
    assert footprint.training(config, of).held < training
    assert footprint.bypassed_evaluation(config, of).held < evaluation


CASES = [
    "qwen3_0_6b sp.size=8 train.seq_len=4096 zero.stage=0 train.precision=bf16",
    "qwen3_0_6b sp.size=1 train.seq_len=4096 zero.stage=1 train.precision=bf16",
    "qwen3_0_6b sp.size=8 train.seq_len=4096 zero.stage=2 train.precision=bf16 memory=checkpointing",
    "llama3_1b sp.size=2 train.seq_len=8192 zero.stage=3 train.precision=bf16 memory=alst",
    "llama3_1b sp.size=4 train.seq_len=512 zero.stage=2",
    "llama3_8b sp.size=8 train.seq_len=131072 zero.stage=3 train.precision=bf16 memory=alst",
    "llama3_8b sp.size=8 train.seq_len=131072 zero.stage=2 train.precision=bf16 memory=checkpointing",
    "llama3_8b sp.size=8 train.seq_len=878592 zero.stage=3 train.precision=bf16 memory=checkpointing",
]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_the_formulas_say_what_a_plan_of_a_real_model_says(pool, case):
    config = unchecked([f"model={case.split()[0]}", *case.split()[1:], "train.global_batch_size=1", "eval=bypass"])
    of = footprint.shape(config)
    training, evaluation = planned(pool, config)
    assert footprint.training(config, of).estimated == pytest.approx(training, rel=0.25)
    assert footprint.training(config, of).held < training
    if config.sp.size > 1:
        assert footprint.bypassed_evaluation(config, of).estimated == pytest.approx(evaluation, rel=0.25)
        assert footprint.bypassed_evaluation(config, of).held < evaluation * 1.01


@pytest.mark.long
@pytest.mark.parametrize("model", ["llama3_8b", "llama3_1b"])
def test_a_plan_of_each_part_of_the_default_job_fits(pool, monkeypatch, model):
    """What `tests/test_fitting.py` says by formulas for every model."""
    h100 = load("h100")
    for place in ("machine", "rules", "layout_rules", "fitting"):
        monkeypatch.setattr(f"ulysses_exp.config.{place}.accelerators", lambda: 8)
    monkeypatch.setattr(fitting, "gpu_memory", lambda: int(h100.memory_gib * 2**30))
    config = resolve(composed([f"model={model}", "sp.size=8"])[0])
    assert config.eval.mode == "both"
    for name in (config.layout.name, *(config.reload.layouts or ())):
        assert max(planned(pool, config.at(Layout.parse(name)))) <= h100.budget, name
