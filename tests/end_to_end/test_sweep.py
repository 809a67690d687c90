"""Multirun: all jobs run, wrong combinations are skipped, done jobs are not run again, whatever ended the last try."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from checkout import ROOT
from descendants import alive, children, gone, left_in_shared_memory, nothing_left
from omegaconf import OmegaConf

QUICK = ["stages=[train]", "train.steps=2", "train.seq_len=32", "train.unmeasured_steps=0", "device=cpu",
         "tracker.mode=disabled"]  # fmt: skip

SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip


def statuses(folder):
    return {
        p.parent.name: json.loads(p.read_text())["status"]
        for p in sorted(folder.glob("outputs/sweeps/names/*/results.json"))
    }


def stamps(folder):
    """When each job of the sweep last logged a step."""
    return {p.parent.name: p.stat().st_mtime_ns for p in sorted(folder.glob("outputs/sweeps/names/*/metrics.jsonl"))}


def test_every_job_runs_whatever_becomes_of_another_and_again_where_it_changed(command, tmp_path):
    broken = tmp_path / "no_model"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    (broken / "model.safetensors").write_text("no weights")
    sweep = [
        "-m",
        "sweep.name=names",
        f"model.name_or_path={broken},null",
        "sp.size=2,3",
        "sp.exchange=deepspeed",
        *QUICK,
    ]
    done = command(*sweep, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert sorted(statuses(tmp_path).values()) == ["failed", "ok", "skipped", "skipped"]
    assert "job 4 running" in done.stdout
    assert "sweep: 2 skipped, 1 failed, 1 ok" in done.stdout and "SafetensorError" in done.stdout
    assert done.stdout.count("query heads do not divide over sp 3") == 1 and "skipped 2 jobs" in done.stdout
    (trained,) = stamps(tmp_path)

    done = command(*[o.replace("train.steps=2", "train.steps=3") for o in sweep], cwd=tmp_path)
    assert done.returncode == 1
    (log,) = tmp_path.glob("outputs/sweeps/names/*/metrics.jsonl")
    assert log.parent.name == trained, "in its place"
    assert len(log.read_text().splitlines()) == 3


@pytest.mark.long
def test_optuna_gets_the_figure_that_it_asked_for(command, tmp_path):
    done = command(
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "optim.lr=interval(1e-4,1e-2)",
        "optimize.metric=train.loss", "sweep.name=names", "sp.size=1", *QUICK, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep: 1 of 2 done (1 ok), job 2 running" in done.stdout
    found = OmegaConf.load(tmp_path / "outputs/sweeps/names/optimization_results.yaml")
    last = [json.loads(p.read_text())["stages"]["train"]["loss"][-1] for p in tmp_path.glob("outputs/**/results.json")]
    assert len(last) == 2 and found.best_value == min(last)


class RunningSweep:
    """Three jobs of one rank, stopped while the second trains."""

    SECONDS = 90

    def __init__(self, folder):
        self.folder, self.began = folder, time.time()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), "-m", "sweep.name=names", "sp.size=1", "seed=0,1,2", *QUICK,
             "train.steps=60", "train.global_batch_size=1"],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def send(self, number):
        """Sends a signal once the second job has made a step; returns the processes that the sweep had by then."""
        end = time.monotonic() + self.SECONDS
        while not self._trains():
            assert self.process.poll() is None and time.monotonic() < end, self.process.communicate()
            time.sleep(0.01)
        started = children(self.process.pid)
        started += [rank for process in started for rank in children(process)]
        os.kill(self.process.pid, number)
        return started

    def _trains(self):
        logs = list(self.folder.glob("outputs/sweeps/names/*seed1*/metrics.jsonl"))
        return bool(logs) and logs[0].stat().st_mtime > self.began and logs[0].stat().st_size > 0


@pytest.mark.long
def test_a_sweep_goes_on_after_ctrl_c_and_after_sigkill(tmp_path):
    before = left_in_shared_memory()
    sweep = RunningSweep(tmp_path)
    started = sweep.send(signal.SIGINT)
    out, err = sweep.process.communicate(timeout=30)
    assert sweep.process.returncode == 130, out + err
    assert "sweep: 1 ok, 1 interrupted, 1 not run" in out and "Traceback" not in out + err
    assert gone(started, 10)
    assert list(statuses(tmp_path).values()) == ["ok", "interrupted"]
    first = next(iter(stamps(tmp_path).items()))

    sweep = RunningSweep(tmp_path)
    started = sweep.send(signal.SIGKILL)
    assert len(started) >= 2, "a server and a rank"
    assert gone(started, 10), "ranks outlive their parent"
    sweep.process.communicate()
    assert first in stamps(tmp_path).items()

    sweep = RunningSweep(tmp_path)
    out, err = sweep.process.communicate(timeout=RunningSweep.SECONDS)
    assert sweep.process.returncode == 0, out + err
    assert list(statuses(tmp_path).values()) == ["ok"] * 3
    assert first in stamps(tmp_path).items(), "what was done is not run again"
    assert nothing_left(before) and not any(map(alive, started))
