"""`stages=[plan]` as a user runs it."""

from __future__ import annotations

import json
import subprocess

import pytest


def test_a_gpu_that_is_not_here_and_a_model_of_which_only_the_configuration_is(command, tmp_path):
    shape = {
        "model_type": "qwen3", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    done: subprocess.CompletedProcess[str] = command(
        "stages=[plan]", "model=hub", "model.name_or_path=model", "sp.size=4", "zero.stage=3", "memory=alst",
        "train.precision=bf16", "train.seq_len=65536", "train.global_batch_size=1", "plan.search=false",
        "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    for expected in ("65,536 tokens: fits", "H100", "all-to-all", "activations", "assumed:", "accuracy:"):
        assert expected in done.stdout, done.stdout
    plan = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]["plan"]
    memory = dict(plan["peak_memory_bytes_per_rank"])
    assert memory.pop("total") == sum(memory.values())
    assert {"parameters", "gradients", "optimizer", "activations"} <= set(memory)
    projections = 64 * 16 * (4 + 2 + 2) + 4 * 16 * 64 + 2 * 16
    assert plan["parameters"] == 2 * 320 * 64 + 12 * (projections + 3 * 64 * 128 + 2 * 64) + 64
    assert plan["fits"] is True
    assert "max_seq_len" not in plan
    assert plan["all_to_all_bytes_per_step"] > 0
    assert plan["step_time_s"]["total"] >= plan["step_time_s"]["compute"] > 0


def test_an_unknown_machine_ends_before_anything_starts(command, tmp_path):
    done = command("stages=[plan]", "plan.hardware=h10", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "plan.hardware: 'h10' is not a choice; did you mean h100?"
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_auto_evaluation_asks_the_plan(command, tmp_path):
    done = command(
        "stages=[train,eval]", "eval.mode=auto", "train.steps=1", "train.seq_len=128", "eval.sequences=2",
        "hydra.run.dir=run", "tracker.mode=disabled", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    evaluated = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]["eval"]
    assert evaluated["mode"] == "bypass"
    assert "on one rank by the plan" in evaluated["mode_reason"]
