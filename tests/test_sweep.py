"""Which jobs of a sweep need not run again, what their folders are called, and how far a sweep says it is."""

import json
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir

from ulysses_exp.cli import CONF
from ulysses_exp.config import resolve
from ulysses_exp.sweep import Sweep, fingerprint, finished, job_name, objective


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("config", ["device=cpu"]))


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
    ("overrides", "name"),
    [
        ("sp.size=2,zero.stage=3", "sp.size=2,zero.stage=3"),
        ("experiment=mine,sp.size=2,stages=[train,eval]", "sp.size=2,stages=_train,eval"),
        ("experiment=other,sp.size=2", "experiment=other,sp.size=2"),
        ("", "7"),
    ],
)
def test_a_job_is_called_by_its_overrides(overrides, name):
    assert job_name(overrides, 7, "mine") == name


def test_names_that_are_cut_stay_different():
    folders = [f"checkpoint.source='/data/{sweep}/sp.size=2',stages=[eval]" for sweep in ("a", "b")]
    names = {job_name(overrides, 0, None) for overrides in folders}
    assert len(names) == 2
    assert all(name.startswith("checkpoint.source=sp.size=2,stages=_eval_") or len(name) < 120 for name in names)
    long = [f"model.name_or_path={'x' * 200}{i}" for i in range(2)]
    assert len({job_name(overrides, 0, None) for overrides in long}) == 2
    assert max(len(job_name(overrides, 0, None)) for overrides in long) <= 110


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
