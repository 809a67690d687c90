"""Which types of models run right in slices: the instrument that tries all, and the check before a job's first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted_models
import pytest
import torch
from checkout import ROOT
from transformers import AutoConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ulysses_exp.config import Config, ConfigError, ModelConfig, tried
from ulysses_exp.experiment import model_check
from ulysses_exp.model import outside_attention
from ulysses_exp.model.outside_attention import mixes_outside_attention
from ulysses_exp.model.tiny.settings import DEFAULTS


@pytest.mark.parametrize(
    "kind, said",
    [
        ("llama", None),
        ("gpt_oss", None),
        ("gemma4_text", None),
        ("bloom", "bloom keeps its own attention code"),
        ("falcon", "falcon keeps its own attention code"),
        ("qwen3_next", None),
        ("recurrent_gemma", None),
        ("minimax", "minimax mixes tokens outside of attention"),
        ("doge", "doge reads attention masks outside of the attention function"),
        ("bart", "bart takes positions from the place in a slice"),
    ],
)
def test_a_tiny_copy_shows_whether_tokens_meet_outside_of_attention(kind, said):
    state = torch.get_rng_state()
    found = mixes_outside_attention(AutoConfig.for_model(kind))
    assert found is None if said is None else found.startswith(said)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [4.0] * 64, "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_follow_the_longest_position_of_a_slice_are_found(rope):
    """Each rank would turn its tokens by frequencies of its own."""
    rope |= {"rope_theta": 10000.0, "original_max_position_embeddings": 2048}
    found = mixes_outside_attention(AutoConfig.for_model("llama", rope_parameters=rope))
    assert found is not None and "or from the longest in it, not from position_ids" in found


def test_models_of_somebody_else_with_a_planted_fault_are_found():
    assert mixes_outside_attention(planted_models.model(LlamaForCausalLM)) is None
    assert "mixes tokens outside" in str(mixes_outside_attention(planted_models.model(planted_models.Shifted)))
    assert "takes positions from the place" in str(
        mixes_outside_attention(planted_models.model(planted_models.Counting))
    )


def configured(kind: str, sp: int) -> Config:
    config = Config(stages=["train"])
    config.sp.size = sp
    config.model = ModelConfig(
        name="hub", architecture={"model_type": kind, "num_key_value_heads": 8, "n_positions": 512}
    )
    return config


def test_what_the_process_that_tries_models_answers():
    assert outside_attention.read(None, {"model_type": "llama"}) == {"why": None}
    assert "own attention code" in str(outside_attention.read(None, {"model_type": "bloom"})["why"])


@pytest.mark.long  # a process that imports torch
def test_an_unknown_model_is_refused_before_ranks_start(monkeypatch):
    assert tried.right("llama", {}) and not tried.right("bloom", {})
    assert not tried.right("llama", {"rope_parameters": {"rope_type": "longrope"}})
    monkeypatch.setattr(model_check, "_answers", {})
    try:
        monkeypatch.setattr(model_check.model_rules, "why_not_sharded", lambda *_: None)
        with pytest.raises(ConfigError, match=r"^sp\.size: bloom keeps its own attention code.*set sp\.size=1"):
            model_check._check_sharding(configured("bloom", 2), {"num_attention_heads": 8}, "bloom")
        model_check._check_sharding(configured("bloom", 1), {"num_attention_heads": 8}, "bloom")
        answered = len(model_check._answers)
        model_check._check_sharding(configured("llama", 2), {"num_attention_heads": 8}, "llama")
        assert len(model_check._answers) == answered, "what is known to be right is not tried"
    finally:
        model_check.close()


def test_what_another_transformers_ran_right_is_tried_again(tmp_path, monkeypatch):
    (tmp_path / "tried.json").write_text(json.dumps({"transformers": "5.0.0", "right": ["llama"]}))
    monkeypatch.setattr(tried, "FILE", tmp_path / "tried.json")
    tried._found.cache_clear()
    try:
        assert not tried.right("llama", {})
    finally:
        tried._found.cache_clear()


def table(folder: Path, *types: str) -> dict[str, Any]:
    files = [
        "--out",
        str(folder / "out.json"),
        "--docs",
        str(folder / "docs.md"),
        "--known",
        str(folder / "known.json"),
    ]
    subprocess.run(
        [sys.executable, "benchmarks/models.py", "--types", ",".join(types), *files],
        cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())["types"]
    page = (folder / "docs.md").read_text()
    assert all(f"| {kind} | {found[kind]['result']} |" in page for kind in types)
    good = [kind for kind in found if found[kind]["result"] == "right"]
    assert json.loads((folder / "known.json").read_text())["right"] == good
    return found


@pytest.mark.long
def test_the_table_of_a_spread_of_types(tmp_path):
    right = ("llama", "mistral", "qwen2", "qwen3_moe", "gemma3_text", "olmo3", "deepseek_v3", "cohere2", "bamba")
    not_right = ("bloom", "doge", "minimax", "reformer")
    found = table(tmp_path, *right, *not_right)
    assert {kind: found[kind]["result"] for kind in right} == dict.fromkeys(right, "right")
    results = [found[kind]["result"] for kind in not_right]
    assert results == ["refused", "refused", "refused", "not buildable"]
    assert all(found[kind]["reason"] for kind in not_right)
    trials = found["llama"]["trials"]
    assert len(trials) == 10 and all(t["logits"] < 1e-6 for t in trials.values())
    assert found["gemma3_text"]["layers"] == ["attention", "windows"] and "experts" in found["qwen3_moe"]["layers"]
    known = table(tmp_path, "bloom")
    assert known.keys() == found.keys(), "results of other types stay"


@pytest.mark.long
def test_no_type_that_runs_right_is_refused_for_what_its_tiny_copy_shows():
    refused = {}
    for kind in json.loads(tried.FILE.read_text())["right"]:
        config = CONFIG_MAPPING[kind](**DEFAULTS.get(kind, {}))
        if (why := mixes_outside_attention(config)) is not None:
            refused[kind] = why
    assert refused == {}


@pytest.mark.long
def test_the_instrument_finds_planted_faults():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "tests/planted_models.py"], cwd=ROOT, check=True, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["LlamaForCausalLM"]["result"] == "right"
    assert found["Shifted"]["result"] == found["Counting"]["result"] == "wrong"
    assert found["Shifted"]["trials"]["plain sp2"]["logits"] > 1e-3
