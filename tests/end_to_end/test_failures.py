"""A rank that dies, a parent that dies, a user who stops: one clear end, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT, only_run
from descendants import alive, children, gone, left_in_shared_memory, nothing_left

from ulysses_exp.config.received.manifest import Manifest, stored_tensors
from ulysses_exp.launch import heartbeat


class LongJob:
    """A job that would train for minutes, once its ranks have made their first step."""

    def __init__(self, folder: Path, *more: str):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), "sp.size=2", "stages=[train]", "train.steps=100000",
             "train.seq_len=64", "device=cpu", *more],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        end = time.monotonic() + 90
        while not list(folder.glob("outputs/*/*/metrics.jsonl")):
            assert self.process.poll() is None and time.monotonic() < end, self.process.communicate()
            time.sleep(0.05)
        (self.server,) = [p for p in children(self.process.pid) if len(children(p)) == 2]
        self.ranks = children(self.server)
        self.all = [*self.ranks, self.server, *children(self.process.pid)]


@pytest.fixture
def long_job(tmp_path, request):
    before = left_in_shared_memory()
    job = LongJob(tmp_path, *getattr(request, "param", ()))
    yield job
    for pid in [job.process.pid, *job.all]:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    job.process.wait()
    assert nothing_left(before)


def test_a_killed_rank_ends_the_job_and_is_named(long_job, tmp_path):
    os.kill(long_job.ranks[1], signal.SIGKILL)
    began = time.monotonic()
    out, err = long_job.process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert long_job.process.returncode == 1
    results = json.loads((only_run(tmp_path) / "results.json").read_text())
    assert results["status"] == "failed"
    assert "rank 1" in results["error"] and "SIGKILL" in results["error"]
    assert "rank 1" in out and "Traceback" not in out + err
    assert gone(long_job.all, 10)


def test_ranks_do_not_outlive_a_killed_parent(long_job, tmp_path):
    os.kill(long_job.process.pid, signal.SIGKILL)
    assert gone(long_job.all, 10)
    lines = next(tmp_path.glob("outputs/*/*/metrics.jsonl")).read_text().splitlines()
    assert all("train/loss" in json.loads(line) for line in lines[:-1])


@pytest.mark.long
def test_ctrl_c_ends_a_job_at_once(long_job, tmp_path):
    os.kill(long_job.process.pid, signal.SIGINT)
    out, err = long_job.process.communicate(timeout=30)
    assert long_job.process.returncode == 130, out + err
    assert "Traceback" not in out + err
    assert json.loads((only_run(tmp_path) / "results.json").read_text())["status"] == "interrupted"
    assert not list(only_run(tmp_path).glob("checkpoints/*")) and "continue with" not in out + err
    assert gone(long_job.all, 10)


def test_sigterm_to_all_processes_saves_a_checkpoint(long_job, tmp_path):
    """As a batch system sends it that wants its machine back."""
    for pid in [*long_job.all, long_job.process.pid]:
        os.kill(pid, signal.SIGTERM)
    out, err = long_job.process.communicate(timeout=60)
    assert long_job.process.returncode == 130, out + err
    assert "Traceback" not in out + err
    run = only_run(tmp_path)
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "interrupted" and "SIGTERM" in results["error"]
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert results["stages"]["train"]["checkpoint"] == f"checkpoints/step{steps}", "every step is kept"
    saved = run / "checkpoints" / f"step{steps}"
    manifest = Manifest.read(saved)  # raises where it is not complete
    assert manifest.step == steps and stored_tensors(saved, manifest)
    assert [path.name for path in run.glob("checkpoints/.*")] == []
    assert "continue with: python run.py sp.size=2 'stages=[train]' train.steps=100000" in err
    assert f"hydra.run.dir={run.relative_to(tmp_path)}" in err
    assert gone(long_job.all, 10)


@pytest.mark.long
@pytest.mark.parametrize("long_job", [["launch.timeout_s=15"]], indirect=True)
def test_a_stopped_rank_is_named_and_ends_the_job(long_job, tmp_path):
    os.kill(long_job.ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    out, err = long_job.process.communicate(timeout=90)
    assert time.monotonic() - began < 45
    assert long_job.process.returncode == 1 and "Traceback" not in out + err
    error = json.loads((only_run(tmp_path) / "results.json").read_text())["error"]
    assert "rank 1: stands still since" in error and "SIGSTOP" in error and "rank 0 wait" in error
    assert "ulysses_exp/" in (only_run(tmp_path) / "run.log").read_text(), "the stack of the rank that waited"
    assert gone(long_job.all, 10)


@pytest.mark.long
def test_a_killed_server_is_told_of(long_job, tmp_path):
    os.kill(long_job.server, signal.SIGKILL)
    out, err = long_job.process.communicate(timeout=30)
    assert long_job.process.returncode == 1 and "Traceback" not in out + err
    error = json.loads((only_run(tmp_path) / "results.json").read_text())["error"]
    assert error == "stage train: the process that starts ranks was ended by SIGKILL"
    assert gone(long_job.all, 10)


@pytest.mark.long
@pytest.mark.parametrize(
    "long_job",
    [["stages=[train,eval]", "train.steps=2", "eval.sequences=400", "checkpoint.every=1"]],
    indirect=True,
)
def test_an_evaluation_that_its_ranks_could_not_end_is_made_again_and_logged_once(long_job, tmp_path):
    run = only_run(tmp_path)
    end = time.monotonic() + 60
    began = None  # beats when the evaluation began: a bypassed one makes none, that with all-to-alls many
    while began is None or heartbeat.last(run / "ranks" / "main", 0).count < began + 20:
        assert long_job.process.poll() is None and time.monotonic() < end
        beat = heartbeat.last(run / "ranks" / "main", 0)
        began = beat.count if began is None and beat is not None and beat.phase == "evaluating" else began
        time.sleep(0.005)
    os.kill(long_job.server, signal.SIGKILL)
    out, err = long_job.process.communicate(timeout=120)
    assert long_job.process.returncode == 0, out + err
    assert "ended by SIGKILL" in (run / "run.log").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [list(line)[1] for line in lines[2:]] == ["eval/bypass/loss", "eval/sp/loss"]
    assert all(line["step"] == 2 for line in lines[2:])


def test_an_error_in_a_rank_is_one_line_and_the_trace_is_in_the_log(command, tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 8,
                                                    "hidden_size": 64, "vocab_size": 256}))  # fmt: skip
    (broken / "model.safetensors").write_text("no weights")
    done = command("model=hub", f"model.name_or_path={broken}", "sp.size=2", "device=cpu", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    run = only_run(tmp_path)
    error = json.loads((run / "results.json").read_text())["error"]
    assert "rank 0" in error and "Safetensor" in error
    assert "Traceback" in (run / "run.log").read_text()
