"""Which jobs of a sweep need not run again, what their folders are called, and how far a sweep says it is."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ulysses_exp.cli.command import sweep_overrides
from ulysses_exp.config import ConfigError, resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.config.paths import CONF
from ulysses_exp.experiment.combinations import jobs_of
from ulysses_exp.experiment.job_name import check_names, job_name
from ulysses_exp.experiment.sweep import Sweep, fingerprint, finished, objective


@pytest.fixture(scope="module")
def config():
    return resolve(composed(["device=cpu"])[0])


def ended(folder, config, status):
    (folder / "results.json").write_text(json.dumps({"status": status, "fingerprint": fingerprint(config)}))


@pytest.mark.parametrize(
    ("rerun", "kept"),
    [
        ("changed", {"same ok"}),
        ("failed", {"same ok", "changed ok"}),
        ("all", set()),
    ],
)
def test_what_is_run_again(config, tmp_path, rerun, kept):
    changed = replace(config, seed=config.seed + 1)
    found = set()
    for what, before in (("same", config), ("changed", changed)):
        for status in ("ok", "failed", "interrupted", "skipped"):
            ended(tmp_path, before, status)
            if finished(replace(config, sweep=replace(config.sweep, rerun=rerun)), tmp_path):
                found.add(f"{what} {status}")
    assert found == kept


def test_a_job_that_left_nothing_or_half_a_file_is_run(config, tmp_path):
    assert not finished(config, tmp_path)
    (tmp_path / "results.json").write_text('{"status": "ok", "finger')
    assert not finished(config, tmp_path)


def test_where_and_how_a_job_runs_is_no_change(config):
    elsewhere = replace(config, tracker=replace(config.tracker, mode="online"))
    assert fingerprint(elsewhere) == fingerprint(config)


def test_a_source_that_was_trained_again_is_another_one(config, tmp_path):
    run = tmp_path / "run"
    step = run / "checkpoints" / "step5"
    step.mkdir(parents=True)
    (run / ".hydra").mkdir()
    (run / "checkpoints" / "latest").write_text("step5\n")
    (step / "manifest.json").write_text('{"weights": "a"}')
    evaluation = replace(config, checkpoint=replace(config.checkpoint, source=str(run)))
    before = fingerprint(evaluation)
    assert fingerprint(evaluation) == before
    (step / "manifest.json").write_text('{"weights": "b"}')
    assert fingerprint(evaluation) != before


@pytest.mark.parametrize(
    ("overrides", "axes", "name"),
    [
        (["zero.stage=3", "sp.size=2"], {"sp.size", "zero.stage"}, "sp2-z3"),
        (
            ["train.seq_len=4096", "zero.stage=0", "sp.size=2"],
            {"sp.size", "zero.stage", "train.seq_len"},
            "sp2-z0-len4096",
        ),
        (["sp.size=2", "stages=[train,eval]", "train.steps=3"], {"sp.size"}, "sp2"),
        (["memory=alst", "model=tiny_qwen3"], {"model", "memory"}, "model_tiny_qwen3-memory_alst"),
        (["optim.lr=1e-3", "seed=0"], {"optim.lr", "seed"}, "lr1e-3-seed0"),
        (["memory.tiled_mlp=-1"], {"memory.tiled_mlp"}, "tiled_mlp_-1"),
        (["optim.beta2=0.9"], {"optim.beta2"}, "beta2_0.9"),
        (["eval=bypass", "eval.sequences=2"], {"eval"}, "eval_bypass"),
        (["+model.architecture.num_hidden_layers=2"], {"model.architecture.num_hidden_layers"}, "num_hidden_layers2"),
        (["train.steps=3"], set(), "7"),
    ],
)
def test_a_job_is_called_by_what_the_sweep_varies(overrides, axes, name):
    assert job_name(overrides, 7, axes) == name


@given(
    st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=4, unique=True),
    st.lists(st.text("ab-_.=1", min_size=1, max_size=6), min_size=2, max_size=4, unique=True),
)
def test_names_of_jobs_are_different_and_nothing_to_a_shell(models, notes):
    axes = {"model.name_or_path", "tracker.project"}
    jobs = [[f"model.name_or_path={model}", f"tracker.project={note}"] for model in models for note in notes]
    names = [job_name(job, 0, axes) for job in jobs]
    assert len(set(names)) == len(jobs)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) and len(name) <= 110 for name in names), names
    assert names == [job_name(reversed(job), 9, axes) for job in jobs], "the order in which they are typed is nothing"


def test_names_that_are_cut_stay_different():
    folders = [f"/data/{sweep}/sp2-z{zero}" for sweep in ("a", "b") for zero in (1, 3)]
    names = [job_name([f"checkpoint.source='{f}'", "stages=[eval]"], 0, {"checkpoint.source"}) for f in folders]
    assert len(set(names)) == 4
    assert all(name.startswith("source_sp2-z") for name in names)
    long = [job_name([f"model.name_or_path={'x' * 200}{i}"], 0, {"model.name_or_path"}) for i in range(2)]
    assert len(set(long)) == 2 and max(map(len, long)) <= 110


def test_a_sweep_with_names_of_an_earlier_version_is_not_mixed(tmp_path):
    (tmp_path / "sp2-z0").mkdir()
    (tmp_path / "sp2-z0" / "results.json").write_text("{}")
    check_names(tmp_path, "sweep.name")
    check_names(tmp_path / "none", "sweep.name")
    (tmp_path / "sp.size=2,zero.stage=0").mkdir()
    check_names(tmp_path, "sweep.name")  # somebody's folder, no job
    (tmp_path / "sp.size=2,zero.stage=0" / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"sweep\.name: .* holds 1 jobs .* sp\.size=2,zero\.stage=0; set another"):
        check_names(tmp_path, "sweep.name")


@pytest.mark.parametrize("study", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_study_says_the_last_word(study):
    written = OmegaConf.load(study)
    for key in ("defaults", "hydra"):
        written.pop(key, None)
    plain, _ = composed([f"experiment={study.stem}"])
    assert OmegaConf.merge(plain, written) == plain


@pytest.mark.parametrize(
    ("overrides", "multirun", "jobs"),
    [
        (["experiment=zero_stages"], False, 4),
        (["experiment=zero_stages"], True, 4),
        (["experiment=zero_stages", "zero.stage=1,2"], False, 2),
        (["experiment=zero_stages", "zero.stage=3", "model=tiny_llama,tiny_qwen3"], False, 2),
        (["experiment=sp_scaling", "sp.size=1,2"], True, 6),
        (["sp.size=1,2", "zero.stage=0,1"], True, 4),
    ],
)
def test_axes_that_the_user_gives_take_the_place_of_the_studys(overrides, multirun, jobs):
    given = sweep_overrides(overrides, multirun)
    assert given is not None and len(jobs_of(given)) == jobs
    keys = [override.partition("=")[0] for override in given]
    assert len(keys) == len(set(keys))


def test_several_values_need_a_sweep():
    assert sweep_overrides(["sp.size=2"], False) is None
    with pytest.raises(ConfigError, match=r"sp\.size: has several values; add -m"):
        sweep_overrides(["sp.size=1,2"], False)


def test_a_search_gets_a_number_or_nothing():
    results = {"stages": {"train": {"loss": [3.0, 2.0]}, "eval": {"status": "failed"}}}
    assert objective("train.loss", results) == 2.0
    assert objective("eval.sp.loss", results) is None
    assert objective(None, results) is None


def test_headline_and_summary_count_every_job():
    sweep = Sweep(total=4)
    assert sweep.headline() == "sweep: 0 of 4 done, job 1 running"
    sweep.add("ok", "a", None)
    sweep.add("failed", "b", "rank 0: out of memory")
    assert sweep.headline().startswith("sweep: 2 of 4 done (1 ok, 1 failed), job 3 running, ")
    assert sweep.headline().endswith(" left")
    assert sweep.summary() == "sweep: 1 ok, 1 failed, 2 not run\n  b: failed: rank 0: out of memory"
    assert sweep.exit_code() == 1
