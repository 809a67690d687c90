"""A plan that is ended leaves no process, and says so where it can."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.config import Config
from ulysses_exp.plan.forks import TraceError, forks

#: A trace that takes long enough to be met.
LARGE = ["model=llama3_8b", "sp.size=8", "zero.stage=3", "train.precision=bf16", "train.seq_len=131072",
         "train.global_batch_size=1", "memory=alst", "tracker.mode=disabled"]  # fmt: skip


def processes(mark: str) -> list[list[str]]:
    """Command lines of the processes that have `mark` in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes() and (line := (entry / "cmdline").read_bytes()):
                found.append(line.decode().split("\0"))
        except OSError:  # gone, or somebody else's
            continue
    return found


def until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 130), pytest.param(signal.SIGHUP, 130, marks=pytest.mark.long),
     pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.long)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)  # fmt: skip
def test_no_process_is_left(tmp_path: Path, number: signal.Signals, code: int) -> None:
    mark = f"ENDED_PLAN={uuid.uuid4()}"
    name, value = mark.split("=")
    command = [sys.executable, str(ROOT / "run.py"), "stages=[plan]", *LARGE, "hydra.run.dir=run"]
    with (tmp_path / "out").open("wb") as out:
        job = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {name: value}, stdout=out, stderr=out)
    try:
        forked = until(lambda: sum("ulysses_exp.launch.server" in " ".join(p) for p in processes(mark)) > 1, 200)
        assert forked, (tmp_path / "out").read_text()
        job.send_signal(number)
        assert job.wait(30) == code, (tmp_path / "out").read_text()
        assert until(lambda: not processes(mark), 20), processes(mark)
    finally:
        job.kill()
        job.wait()
    if code == 130:
        assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "interrupted"
        assert "Traceback" not in (tmp_path / "out").read_text()


def test_a_trace_that_was_ended_says_what_to_do() -> None:
    with forks(Config()) as pool:
        with pytest.raises(TraceError, match="SIGKILL, as the kernel does where memory runs out"):
            pool.map(signal.raise_signal, [int(signal.SIGKILL)])
        with pytest.raises(TraceError, match=r"SIGALRM; run the plan again"):
            pool.map(signal.raise_signal, [int(signal.SIGALRM)])
