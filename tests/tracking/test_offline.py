"""Offline runs: complete, readable by wandb's own reader, and nothing outside the run folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from a_job import LATER, METRICS
from processes import A_JOB, environment, inspect, logged, records, run_directories, track


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of a job that ran to its end with tracker.mode=offline."""
    place = tmp_path_factory.mktemp("offline")
    told = track(place, "offline")
    assert told["warnings"] == []
    assert told["how_to_open"].startswith("wandb leet ")
    assert told["logging_s"] < 5, "a job does not wait for the client; the machine may be busy"
    return place


def test_every_metric_of_the_contract_can_be_read_back(finished):
    (run,) = run_directories(finished)
    rows = logged(run)
    assert sorted(rows) == [1, 2, 3], "a row an optimizer step"
    for step in (1, 2, 3):
        assert {name: rows[step][name] for name in METRICS} == {n: step + i / 10 for i, n in enumerate(METRICS)}
    assert all(rows[3][name] == 0.5 for name in LATER), "evaluation and reload belong to the last step"


def test_run_is_grouped_tagged_configured_and_summarised(finished):
    (run,) = run_directories(finished)
    seen = json.loads(inspect(run, "--summary"))
    assert (seen["name"], seen["project"], seen["exit_code"]) == ("tiny_llama-sp2-dp1-z3", "ulysses-exp", 0)
    assert sorted(seen["tags"]) == ["reload", "train"]
    assert seen["run_id"].startswith("tiny_llama-sp2-dp1-z3-"), "leet lists runs by their directory"
    assert {"ladder"} == {row["run"]["run_group"] for row in records(run) if row["type"] == "run"}
    flat = {"layout": "sp2-dp1-z3", "sp_size": 2, "dp_size": 1, "zero_stage": 3, "world_size": 2}
    assert flat.items() <= seen["config"].items()
    assert seen["config"]["sp"] == {"size": 2}
    summary = seen["summary"]
    assert summary["results/train/tokens_per_second"] == 1234.5
    assert summary["results/train/step_time_s/median"] == 0.25
    assert summary["train/loss"] == {"min": 1, "last": 3}
    assert summary["memory/peak_bytes_max"]["max"] == 3.9
    assert summary["reload"]["nrows"] == 1
    assert summary["claims"]["nrows"] == 2, "a row a side and layout"
    assert summary["results/claims/C6/upstream/verdict"] == "holds if"
    assert not [key for key in summary if "/cells/" in key]


def test_nothing_secret_is_written(finished):
    assert [p for p in finished.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()] == []
    (run,) = run_directories(finished)
    assert json.loads(inspect(run, "--summary"))["config"]["tokenizer"] == "bytes", "not everything with `token` is one"


def test_machine_is_not_named(finished):
    name = socket.gethostname().encode()
    (run,) = run_directories(finished)
    (started,) = [row["run"] for row in records(run) if row["type"] == "run"][:1]
    assert "host" not in started
    assert "program" not in started or started["program"] == "ulysses-exp"
    assert len(name) < 6 or name not in next(run.glob("*.wandb")).read_bytes(), "short names occur by chance"


def test_nothing_outside_the_run_folder(finished):
    assert {p.name for p in finished.iterdir()} <= {"run", "home", "tmp", "reader"}
    assert list((finished / "home").iterdir()) == []
    assert list((finished / "tmp").iterdir()) == []
    assert [p.name for p in (finished / "run").iterdir()] == ["wandb"]


def test_disabled_writes_nothing(tmp_path):
    assert track(tmp_path, "disabled")["warnings"] == []
    assert list((tmp_path / "run").iterdir()) == []


def test_killed_job_leaves_its_logged_steps_and_no_process(tmp_path):
    command = [sys.executable, str(A_JOB), "offline", str(tmp_path / "run"), "1000", "0.1"]
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        command, env=environment(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as job:
        assert job.stderr is not None
        opened = None  # the step at which the client had begun to write
        for line in job.stderr:
            if opened is None and any(log.stat().st_size > 100 for log in tmp_path.glob("run/wandb/*/*.wandb")):
                opened = int(line)
            if opened is not None and int(line) == opened + 50:
                os.kill(job.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while left := _processes_with(str(tmp_path)):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)
    (run,) = run_directories(tmp_path)
    steps = sorted(logged(run))
    assert steps == list(range(1, len(steps) + 1))
    assert opened is not None
    assert len(steps) >= opened + 20, "written every second, ten steps; the client's default of 15 s would leave fewer"


def _processes_with(text: str) -> list[str]:
    """Command lines of processes whose command or environment mentions `text`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (place / "environ").read_bytes() and int(place.name) != os.getpid():
                found.append((place / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_a_broken_client_does_not_end_the_job(tmp_path):
    (tmp_path / "shadow" / "wandb").mkdir(parents=True)
    (tmp_path / "shadow" / "wandb" / "__init__.py").write_text("raise RuntimeError('no such luck')\n")
    shadowed = f"{tmp_path / 'shadow'}:{environment(tmp_path)['PYTHONPATH']}"
    told = track(tmp_path, "offline", PYTHONPATH=shadowed)
    (warning,) = told["warnings"]
    assert "no such luck" in warning
    assert told["finishing_s"] < 5


def test_an_exception_finishes_the_run_as_failed(tmp_path):
    script = """
import pathlib, a_job
with a_job.tracker('offline', pathlib.Path('run')) as t:
    t.log({'train/loss': 1.0}, 1)
    raise SystemExit(0)
"""
    (tmp_path / "run").mkdir()
    subprocess.run([sys.executable, "-c", script], env=environment(tmp_path), cwd=tmp_path, check=True, timeout=60)
    (run,) = run_directories(tmp_path)
    assert json.loads(inspect(run, "--summary"))["exit_code"] == 1
    assert sorted(logged(run)) == [1]


def test_results_may_come_after_the_context(tmp_path):
    script = """
import pathlib, a_job
with a_job.tracker('offline', pathlib.Path('run')) as t:
    t.log({'train/loss': 1.0}, 1)
t.finish(a_job.RESULTS, failed=False)
"""
    (tmp_path / "run").mkdir()
    subprocess.run([sys.executable, "-c", script], env=environment(tmp_path), cwd=tmp_path, check=True, timeout=60)
    (run,) = run_directories(tmp_path)
    seen = json.loads(inspect(run, "--summary"))
    assert (seen["exit_code"], seen["summary"]["results/train/tokens_per_second"]) == (0, 1234.5)


def test_two_jobs_of_a_sweep_in_one_process(tmp_path):
    script = (
        "import sys, pathlib, a_job\nfor name in ('one', 'two'): a_job.main('offline', pathlib.Path(name), 2, 0.01)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["warnings"] for line in done.stdout.splitlines()] == [[], []]
    for name in ("one", "two"):
        (run,) = (p for p in (tmp_path / name / "wandb").glob("offline-run-*"))
        assert sorted(logged(run)) == [1, 2]
