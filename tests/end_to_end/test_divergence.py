"""Training that diverges: a failed run that says where, its last good checkpoint, and the way on from it."""

import json
import sys

import pytest
from checkout import only_run

from ulysses_exp.report.__main__ import main as report

QUICK = ["stages=[train]", "sp.size=1", "train.seq_len=64", "tracker.mode=disabled", "device=cpu"]


def strictly(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_run_that_diverges_fails_and_goes_on_from_its_last_good_checkpoint(command, tmp_path, monkeypatch):
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.mkdir()
    good.mkdir()
    done = command(*QUICK, "train.steps=6", "checkpoint.every=1", "optim.lr=1e9", cwd=bad)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    run = only_run(bad)
    results = strictly(run / "results.json")
    train = results["stages"]["train"]
    assert (results["status"], train["status"]) == ("failed", "failed")
    assert results["error"].startswith("stage train: step 2: the loss is") and "rank 0" in results["error"]
    assert "the last good checkpoint is step1; set optim.lr lower, or train.on_nonfinite=" in results["error"]
    assert (len(train["loss"]), train["loss"][1], train["nonfinite_steps"]) == (2, None, [2])
    assert [path.name for path in (run / "checkpoints").glob("step*")] == ["step1"]
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    report()
    assert "step 2: the loss is" in (run / "report.md").read_text()

    # its weights are as the one step of that size left them
    more = [f"checkpoint.source={run}", "tracker.mode=disabled", "stages=[train]", "optim.lr=1e-3"]
    done = command(*more, "train.on_nonfinite=keep", "train.steps=3", cwd=good)
    kept = strictly(only_run(good) / "results.json")["stages"]["train"]
    assert done.returncode == 1 and kept["steps"] == 2, "it goes to the end, and is failed all the same"
    assert "2 of 2 steps are not finite, the first: step 2" in kept["reason"]
    assert kept["learning_rate"] == [1e-3, 1e-3] and kept["changed"]["optim.lr"] == [1e9, 1e-3]


@pytest.mark.long
def test_a_right_checkpoint_is_right_at_another_length_too(command, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert command(*QUICK, "train.steps=2", "stages=[train,reload]", cwd=first).returncode == 0
    again = ["stages=[reload]", f"checkpoint.source={only_run(first)}", "tracker.mode=disabled", "train.seq_len=32"]
    assert command(*again, "reload.layouts=[sp2-dp1-z1]", cwd=second).returncode == 0
    (cell, _) = json.loads((only_run(second) / "results.json").read_text())["stages"]["reload"]["cells"]
    assert cell["status"] == "ok" and cell["continuation_max_abs_loss_diff"] < 1e-5
