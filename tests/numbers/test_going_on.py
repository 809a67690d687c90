"""From a checkpoint on: exactly as before where nothing is asked for, and with what is asked for where it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints.checkpoint_ranks import run
from small_sessions import at, configured, session

from ulysses_exp.config import Config, ConfigError, lineage
from ulysses_exp.config.received.manifest import Manifest
from ulysses_exp.config.received.sources import inherit
from ulysses_exp.rank import step as training
from ulysses_exp.rank.checkpoints.huggingface_check import check
from ulysses_exp.rank.session import Session
from ulysses_exp.stages.reload.judgement import judged
from ulysses_exp.stages.train.rank import save

BEFORE, STEPS = 2, 4


def optim(config: Config, **changes: Any) -> Config:
    return replace(config, optim=replace(config.optim, **changes))


def go_on(opened: Session) -> list[tuple[float, float, float]]:
    steps = [training.optimizer_step(opened, number) for number in range(opened.step, STEPS)]
    return [(s.loss, s.grad_norm, s.learning_rate) for s in steps]


def resume(config: Config, folder: Path, checkpoint: Path) -> tuple[list[tuple[float, float, float]], dict, Any]:
    with session(config, folder, checkpoint=str(checkpoint), model_seed=7) as opened:
        opened.resume(training=True)
        opened.engine.train()
        losses = go_on(opened)
        group = opened.engine.basic_optimizer.param_groups[0]
        return losses, {k: v for k, v in group.items() if k != "params"}, opened.changed


def trained(config: Config, folder: Path) -> tuple[Path, list[tuple[float, float, float]]]:
    with session(config, folder) as opened:
        opened.engine.train()
        for _ in range(BEFORE):
            training.optimizer_step(opened, opened.step)
            opened.step += 1
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").touch()
        save(opened, [0]).wait()
        return folder / "checkpoints" / f"step{BEFORE}", go_on(opened)


def same_and_other(config: Config, folder: Path) -> list[str]:
    """What is wrong, in words, with going on as before and with each setting of the optimizer changed."""
    wrong = []
    for schedule, warmup in (("constant", 0), ("constant", 3), ("linear", 1), ("cosine", 3)):
        here = optim(config, schedule=schedule, warmup_steps=warmup)
        checkpoint, uninterrupted = trained(here, folder / f"{schedule}{warmup}")
        losses, _, changed = resume(here, folder, checkpoint)
        if losses != uninterrupted or changed != {}:
            wrong.append(f"{schedule} {warmup}: {losses} instead of {uninterrupted}, changed {changed}")
        if schedule == "constant" and warmup and uninterrupted[0][2] != here.optim.lr * (BEFORE / warmup):
            wrong.append(f"no warmup: {uninterrupted}")
    # `here` has the cosine schedule, and its checkpoint is the last one made
    rates = []
    for rate in (here.optim.lr / 2, here.optim.lr * 2):
        losses, group, changed = resume(optim(here, lr=rate), folder, checkpoint)
        rates.append(losses)
        expected = [rate / here.optim.lr * row[2] for row in uninterrupted]
        if [row[2] for row in losses] != pytest.approx(expected, rel=1e-12):
            wrong.append(f"lr {rate}: {losses}")
        if changed != {"optim.lr": [here.optim.lr, rate]}:
            wrong.append(f"changed: {changed}")
    if not rates[0][0][0] == rates[1][0][0] == uninterrupted[0][0] or rates[0][1][0] == rates[1][1][0]:
        wrong.append(f"another rate, no other weights: {rates}")
    key = "momentum" if config.optim.name == "sgd" else "betas"
    changes = {"weight_decay": 0.3} | ({"momentum": 0.5} if key == "momentum" else {"beta2": 0.5, "eps": 1e-4})
    _, group, _ = resume(optim(here, **changes), folder, checkpoint)
    values = {"momentum": 0.5, "weight_decay": 0.3, "betas": (0.9, 0.5), "eps": 1e-4}
    if any(group[name] != values[name] for name in group.keys() & values.keys()):
        wrong.append(f"hyperparameters: {group}")
    longer = replace(here, train=replace(here.train, steps=40))
    if (rate := resume(longer, folder, checkpoint)[0][1][2]) != here.optim.lr:
        wrong.append(f"the schedule does not follow train.steps: {rate}")  # 3 steps of warmup, then from the top
    return wrong


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_nothing_asked_nothing_changed_and_what_is_asked_for_is_used(name, tmp_path):
    momentum = ["optim.momentum=0.9"] if name == "sgd" else []
    config = configured("sp.size=1", f"optim={name}", f"train.steps={STEPS}", *momentum)
    assert run(1, same_and_other, at(config, "sp1-dp1-z2"), tmp_path, timeout=200)[0] == []


def on_other_data(config: Config, folder: Path) -> tuple[str, list[int]]:
    checkpoint, _ = trained(config, folder)
    went = []
    for options in ({}, {"data_chosen": True}):
        with session(config, folder, checkpoint=str(checkpoint), **options) as opened:
            opened.corpus = replace(opened.corpus, train=opened.corpus.train[::-1])
            try:
                opened.resume(training=True)
                went.append(opened.step)
            except ConfigError as error:
                said = str(error)
    with session(config, folder, checkpoint=str(checkpoint)) as opened:
        opened.corpus = replace(opened.corpus, train=opened.corpus.train[::-1])
        opened.resume()  # an evaluation may be of other data
        went.append(opened.step)
    return said, went


def test_other_data_is_refused_unless_it_is_asked_for(tmp_path):
    said, went = run(1, on_other_data, configured("sp.size=1"), tmp_path)[0]
    assert "trained on other data" in said and "data=text on the command line" in said
    assert went == [BEFORE, BEFORE]


def saved(config: Config, folder: Path) -> None:
    trained(config, folder)


@pytest.mark.parametrize(
    ("layout", "precision"), [("sp2-dp1-z3", "fp32"), ("sp1-dp2-z0", "bf16")], ids=["sp2 z3", "bf16"]
)
def test_the_export_computes_what_the_trained_model_did(layout, precision, tmp_path):
    config = at(configured(f"train.precision={precision}"), layout)
    run(2, saved, config, tmp_path)
    folder = tmp_path / "checkpoints" / f"step{BEFORE}"
    manifest = Manifest.read(folder)
    found = check(folder / "huggingface", manifest.module, None, manifest.function)
    assert (found["weights_bit_exact"], found["logits"], found["config_changed"]) == (True, "ok", [])
    path = folder / "huggingface" / "config.json"
    content = json.loads(path.read_text())
    content["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(content))
    found = check(folder / "huggingface", manifest.module, None, manifest.function)
    assert found["weights_bit_exact"] is True
    assert found["config_changed"] == ["rope_parameters.rope_theta: 10000.0 -> 100.0"]
    if precision == "fp32":
        assert found["logits"].startswith("the logits differ by")
    (folder / "logits.safetensors").write_bytes(b"")
    assert "damaged" in check(folder / "huggingface", None, None, manifest.function)["logits"]


CELL = {"weights_bit_exact": True, "optimizer_bit_exact": True}


@pytest.mark.parametrize(
    ("losses", "uninterrupted", "reason"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.0], [1.0, 2.1], "differ by 1.00e-01"),
        ([1.0, None], [1.0, None], "not finite"),
        ([1.0, math.nan], [1.0, 2.0], "not finite"),
        ([1.0], [math.nan], "not finite"),
        ([1.0], ["1.0"], "not finite"),
        ([1.0], None, "no losses to compare with"),
        ([], None, None),  # reload.steps=0
    ],
)
def test_what_is_not_finite_never_counts_as_equal(losses, uninterrupted, reason):
    cell = judged({**CELL, "loss": losses}, uninterrupted, 1e-6)
    assert cell["status"] == ("failed" if reason else "ok")
    assert (reason or "") in cell.get("reason", "")


def test_another_configuration_has_other_losses():
    config = configured("sp.size=1")
    state = json.loads(json.dumps({"trained_with": lineage.trained_with(config)}))
    assert lineage.changed(state, config) == {}
    assert lineage.changed(state, at(config, "sp2-dp1-z3")) == {}, "a layout changes no loss"
    shorter = replace(config, train=replace(config.train, seq_len=16, log_every=5))
    assert lineage.changed(state, shorter) == {"train.seq_len": [32, 16]}
    assert lineage.changed({}, config) is None, "a checkpoint that does not say"


def test_data_that_follow_from_a_setting_are_asked_for_by_it():
    """Synthetic tokens are drawn from the seed."""
    config = configured("sp.size=1", "data=synthetic")
    state = {"data_sha256": "a" * 16, "trained_with": lineage.trained_with(config)}
    lineage.check_data(state, replace(config, seed=1), "b" * 16, chosen=False)
    for then in (state, {"data_sha256": "a" * 16}):
        with pytest.raises(ConfigError, match="trained on other data"):
            lineage.check_data(then, config, "b" * 16, chosen=False)
    lineage.check_data({}, config, "b" * 16, chosen=False)


def test_another_optimizer_is_refused_before_a_rank_starts(tmp_path):
    from omegaconf import OmegaConf

    from ulysses_exp.config.composing import composed

    (tmp_path / ".hydra").mkdir()
    (tmp_path / "checkpoints" / "step5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step5")
    counters = {"global_steps": 5, "global_samples": 20, "skipped_steps": 0}
    engine = {**counters, "groups": [], "scheduler": None, "generators": []}
    Manifest("sp1-dp1-z0", 5, "AdamW", {}, {}, {}, {}, {}, engine).write(tmp_path / "checkpoints" / "step5")
    OmegaConf.save(composed([])[0], tmp_path / ".hydra" / "config.yaml")
    overrides = ["optim=sgd", f"checkpoint.source={tmp_path}"]
    with pytest.raises(ConfigError, match="optim: the checkpoint holds the states of adamw, not of sgd"):
        inherit(composed(overrides)[0], overrides)
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- +data.x=1\n- optim.lr=2\n")
    assert lineage.overridden(tmp_path, "data") and not lineage.overridden(tmp_path, "model")
