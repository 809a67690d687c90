"""The default job fits the memory of its ranks, or is told before it starts what to change."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkout import ROOT, only_run

from ulysses_exp.config import Config, ConfigError, fitting, footprint, resolve, rules
from ulysses_exp.config.composing import composed
from ulysses_exp.config.hardware import load
from ulysses_exp.layout import Layout

MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem != "hub")
H100 = load("h100")
EIGHT = ("sp.size=8",)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """`gpus(n)`: a machine with n of the GPUs that `plan.hardware` means by default."""

    def have(number: int) -> None:
        for place in ("machine", "rules", "layout_rules", "fitting"):
            monkeypatch.setattr(f"ulysses_exp.config.{place}.accelerators", lambda: number)
        monkeypatch.setattr(fitting, "gpu_memory", lambda: int(H100.memory_gib * 2**30))

    return have


def job(*overrides: str) -> Config:
    return resolve(composed(overrides)[0], overrides)


def parts(config: Config) -> dict[str, float]:
    """Bytes that a rank of each part of the job needs, by the formulas; `tests/plan` holds these against plans."""
    of = footprint.shape(config)
    if of is None:  # of a family that is not counted
        assert config.model.name.startswith("tiny")
        return {}
    needs = {name: footprint.training(config.at(Layout.parse(name)), of) for name in config.reload.layouts or ()}
    needs["train"] = footprint.training(config, of)
    if config.eval.mode in ("both", "bypass"):
        needs["eval"] = footprint.bypassed_evaluation(config, of)
    return {name: need.estimated for name, need in needs.items()}


@pytest.mark.parametrize("model", MODELS)
def test_the_default_job_of_each_model_fits_or_says_what_to_set(gpus, model):
    tiny = model.startswith("tiny")
    gpus(1 if tiny else 8)
    overrides = [f"model={model}", "sp.size=1" if tiny else "sp.size=8"]
    try:
        config = job(*overrides)
    except ConfigError as refused:
        message = str(refused)
        assert len(message) < 200 and "; set " in message, message
        settings = shlex.split(message.partition("; set ")[2])
        assert settings and settings[0].startswith(refused.key + "="), message
        config = job(*overrides, *settings)
        assert not any(line.startswith("zero") for line in fitting.remarks(config, overrides + settings))
    assert config.eval.mode == "both" and config.reload.layouts, "512 tokens are no trouble, and something is reopened"
    too_much = {name: f"{size / 2**30:.0f} GiB" for name, size in parts(config).items() if size > H100.budget}
    assert not too_much


@pytest.mark.parametrize("model", [model for model in MODELS if model.startswith("tiny")])
def test_tiny_models_have_the_targets_and_the_evaluation_that_they_had(model):
    config = job(f"model={model}", "train.seq_len=1048576")
    assert config.eval.mode == "both" and config.reload.layouts == ["sp1-dp1-z0", "sp2-dp1-z3", "sp1-dp2-z2"]
    assert fitting.remarks(config, ()) == []


LONG = ("model=llama3_8b", "sp.size=8", "zero.stage=3", "train.precision=bf16", "train.global_batch_size=1")


def test_a_sequence_that_one_rank_cannot_hold_is_evaluated_with_sequence_parallelism(gpus):
    gpus(8)
    overrides = [*LONG, "train.seq_len=524288", "memory=checkpointing"]
    config = job(*overrides)
    assert config.eval.mode == "sp"
    (evaluated, reloaded) = fitting.remarks(config, overrides)
    assert evaluated.startswith("eval.mode=sp: bypassed, a whole sequence takes about ")
    assert reloaded.startswith(f"reload.layouts=[{','.join(config.reload.layouts or ())}] in place of sp1-dp1-z0, ")
    assert all(size <= H100.budget for size in parts(config).values()), parts(config)


def test_documents_need_no_mask_where_attention_is_bypassed(gpus):
    gpus(8)
    assert job(*LONG, "train.seq_len=262144", "memory=alst").eval.mode == "both"
    assert job(*LONG, "train.seq_len=262144", "memory=alst", "data=packed").eval.mode == "both"


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ("eval.mode=both", "set eval.mode=sp"),
        ("eval=bypass", "set eval.mode=sp"),
        ("reload.layouts=[sp1-dp1-z0]", "set reload.layouts=[sp"),
        ("stages=[parity]", "set parity.reference=sp1-dp1-z3 with zero=stage3_offload"),
        ("zero.stage=0", "set zero.stage=3"),
    ],
)
def test_what_was_asked_for_and_cannot_fit_is_refused(gpus, setting, instead):
    gpus(8)
    overrides = [*LONG, "train.seq_len=1048576", "memory=checkpointing", setting]
    if not setting.startswith("eval"):
        overrides[-3] = "train.seq_len=131072"
    with pytest.raises(ConfigError) as refused:
        job(*overrides)
    assert instead in str(refused.value) and "a GPU of this machine has 77" in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 220


def test_machines_that_are_not_this_one_are_warned_of_not_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    overrides = ["model=llama3_70b", "launch=slurm", "sp.size=8", "reload.layouts=[sp1-dp1-z0]"]
    lines = fitting.remarks(job(*overrides), overrides)
    assert lines[0].startswith("zero: llama3_70b at sp8-dp1-z2 takes about ") and "plan.hardware=h100" in lines[0]
    assert any(line.startswith("reload.layouts: llama3_70b at sp1-dp1-z0 takes about ") for line in lines)
    wide = [*overrides, "device=cpu"]
    assert fitting.remarks(job(*wide), wide) == [], "of CPU nodes elsewhere nothing is known"


def test_ranks_on_cpu_are_never_refused_and_go_by_the_memory_of_this_machine(monkeypatch):
    monkeypatch.setattr(fitting, "host_memory", lambda: 24 * 2**30)
    overrides = ["model=llama3_8b", *EIGHT, "device=cpu", "stages=[train,eval,reload,parity]"]
    lines = fitting.remarks(job(*overrides), overrides)
    assert any("this machine for each of 8 ranks has 3" in line for line in lines)
    monkeypatch.setattr(fitting, "host_memory", lambda: 2048 * 2**30)
    config = job("model=llama3_8b", *EIGHT, "device=cpu")
    assert config.reload.layouts == ["sp1-dp1-z0", "sp2-dp1-z3", "sp1-dp2-z2"] and config.eval.mode == "both"


def test_a_study_means_what_it_says(gpus):
    gpus(8)
    study = ["experiment=eval_bypass", *LONG, "train.seq_len=1048576", "memory=checkpointing"]
    with pytest.raises(ConfigError, match=r"^eval\.mode: "):
        job(*study)


def test_a_plan_alone_is_about_any_machine(gpus):
    gpus(1)
    config = job("model=llama3_70b", "stages=[plan]", *EIGHT)
    assert fitting.remarks(config, ()) == []


def test_a_folder_is_known_by_its_configuration_and_a_name_on_a_hub_is_not(gpus, tmp_path):
    gpus(8)
    architecture = yaml.safe_load((ROOT / "conf" / "model" / "llama3_8b.yaml").read_text())["architecture"]
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    config = job("model=hub", f"model.name_or_path={tmp_path}", *EIGHT)
    assert "sp1-dp1-z0" not in (config.reload.layouts or ())
    assert "sp1-dp1-z0" in (job("model=hub", "model.name_or_path=some/model", *EIGHT).reload.layouts or ())


def test_offloading_saves_nothing_where_the_device_is_the_host(monkeypatch):
    monkeypatch.setattr(fitting, "host_memory", lambda: 12 * 2**30)
    plain = ["model=qwen3_0_6b", "sp.size=2", "device=cpu", "zero.stage=3"]
    offloaded = [*plain, "zero=stage3_offload"]
    assert fitting.remarks(job(*plain), plain)[0] == fitting.remarks(job(*offloaded), offloaded)[0]


def test_every_rule_knows_of_memory(gpus):
    """Of a sweep, jobs are checked one by one before any is composed (experiment/combinations.py)."""
    gpus(8)
    with pytest.raises(ConfigError, match="holds"):
        rules.check(job("model=llama3_8b", *EIGHT).at(Layout(8, 1, 0)))


@pytest.mark.long
def test_the_job_says_what_memory_decided(tmp_path):
    start = (
        "from ulysses_exp.config import fitting; fitting.SMALL = 1000; fitting.host_memory = lambda: 60 * 2**20;"
        "from ulysses_exp.cli import main; main()"
    )
    job = ["sp.size=2", "device=cpu", "train.steps=2", "reload.steps=1", "tracker.mode=disabled", "eval.sequences=2"]
    done = subprocess.run(
        [sys.executable, "-c", start, *job], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "reload.layouts=[" in line]
    folder = only_run(tmp_path)
    cells = json.loads((folder / "results.json").read_text())["stages"]["reload"]["cells"]
    targets = [cell["target"] for cell in cells if cell["route"] == "portable"]
    assert f"reload.layouts=[{','.join(targets)}] in place of " in line
    assert line.strip() in Path(folder / "run.log").read_text()
