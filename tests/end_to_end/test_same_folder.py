"""A job that was ended, called again: the same numbers as if nothing had happened, and nothing lost on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT
from descendants import children, gone, left_in_shared_memory, nothing_left
from warm_command import WarmCommand

JOB = ["stages=[train,eval]", "train.steps=6", "train.seq_len=64", "checkpoint.every=2", "sp.size=2", "device=cpu",
       "optim.schedule=cosine", "tracker.mode=disabled"]  # fmt: skip

#: What measures time or memory, or says that a job was continued
_MEASURED = {"seconds", "started", "tokens_per_second", "step_time_s", "peak_memory_bytes", "first_step_finished",
             "continued_from"}  # fmt: skip


def without_measures(node):
    if isinstance(node, dict):
        return {key: without_measures(value) for key, value in node.items() if key not in _MEASURED}
    return [without_measures(item) for item in node] if isinstance(node, list) else node


def numbers(folder: Path):
    """results.json and metrics.jsonl, without what measures time or memory."""
    results = json.loads((folder / "results.json").read_text().replace(str(folder), "FOLDER"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "comm/all_to_all_calls", "eval/sp/loss")
    return without_measures(results), [{name: line.get(name) for name in names} for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("same_folder")


#: Whether this user may mount a small disk where nobody else sees it
MAY_MOUNT = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0

#: Starts a command beside a disk of 16 MiB: one checkpoint fits
_WITH_A_DISK = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16m none disk; exec "$@"', "sh")


@pytest.fixture(scope="module")
def warm(place):
    (place / "disk").mkdir()
    command = WarmCommand(place, inside=_WITH_A_DISK if MAY_MOUNT else ())
    yield command
    command.close()


@pytest.fixture(scope="module")
def whole(warm, place) -> Path:
    """A run that nothing has disturbed."""
    code, said = warm(*JOB, "hydra.run.dir=whole")
    assert code == 0, said
    return place / "whole"


def killed(whole: Path, name: str, left: tuple[str, ...]) -> Path:
    """A copy of `whole` as a kill would have left it: of the ranks' results only `left`, none of the job's."""
    folder = whole.parent / name
    shutil.copytree(whole, folder)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"status": "running", "stages": {}}))
    for work in {"train", "eval"} - set(left):
        (folder / "ranks" / "main" / f"{work}.json").unlink()
    return folder


def test_a_kill_in_training_leaves_no_trace_in_the_numbers(warm, whole):
    folder = killed(whole, "in_training", ())
    shutil.rmtree(folder / "checkpoints" / "step6")
    (folder / "checkpoints" / "latest").write_text("step4")
    (folder / "checkpoints" / ".step6.partial").mkdir()
    (folder / "ranks" / "main" / "error-rank1.json").write_text('{"time": 0, "message": "of then", "trace": ""}')
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:5], lines[5][:40]]))
    code, said = warm(*JOB, "hydra.run.dir=in_training")
    assert code == 0 and "continues at step 4 of 6" in said, said
    assert numbers(folder) == numbers(whole)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step4", "step6", "latest"}


@pytest.mark.parametrize("left", [(), ("train",)], ids=["as the last checkpoint was done", "in eval"])
def test_what_was_trained_is_not_trained_again(warm, whole, left):
    name = f"trained{len(left)}"
    folder = killed(whole, name, left)
    saved = (folder / "checkpoints" / "step6" / "manifest.json").stat().st_mtime_ns
    code, said = warm(*JOB, f"hydra.run.dir={name}")
    assert code == 0 and "continues at step 6 of 6" in said, said
    assert numbers(folder) == numbers(whole)
    assert (folder / "checkpoints" / "step6" / "manifest.json").stat().st_mtime_ns == saved


def test_a_job_that_is_done_is_not_done_again(warm, whole):
    before = (whole / "results.json").read_bytes()
    code, said = warm(*JOB, f"hydra.run.dir={whole}")
    assert code == 0 and "done whole already" in said
    assert (whole / "results.json").read_bytes() == before and not (whole / "previous").exists()


def test_a_finished_run_continued_is_a_success_that_says_so(warm, whole, place):
    code, said = warm("checkpoint.source=whole", "stages=[train,eval]", "eval.mode=sp", "tracker.mode=disabled",
                      "hydra.run.dir=rest")  # fmt: skip
    assert code == 0 and "already at step 6" in said, said
    stages = json.loads((place / "rest" / "results.json").read_text())["stages"]
    train = stages["train"]
    assert (train["steps"], train["first_step"], train["loss"], train["checkpoint"]) == (0, 6, [], None)
    assert stages["eval"]["sp"]["loss"] == numbers(whole)[0]["stages"]["eval"]["sp"]["loss"]


def test_a_disk_that_fills_up_is_said_and_the_last_checkpoint_stays(warm, place):
    if not MAY_MOUNT:
        pytest.skip("needs a file system of its own")
    code, said = warm(*JOB, "sp.size=1", "hydra.run.dir=disk/run")
    assert code == 1 and "Traceback" not in said, said
    assert "step4: the checkpoint cannot be written: No space left on device" in said
    folder = Path(f"/proc/{warm.pid}/root{place}/disk/run")  # as the command sees it
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step2", "latest"}
    assert json.loads((folder / "results.json").read_text())["status"] == "failed"


class Command:
    """`python run.py` as a process."""

    def __init__(self, folder: Path, *overrides: str):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *overrides], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def kill(self) -> None:
        started = children(self.process.pid)
        started += [rank for process in started for rank in children(process)]
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        assert gone(started, 10)


@pytest.mark.long
@pytest.mark.timeout(900)  # eight starts
def test_a_job_killed_again_and_again_gives_the_numbers_of_one_that_was_not(command, tmp_path):
    """SIGKILL of the parent at any moment: while it starts, trains, saves, evaluates, reloads."""
    job = [*JOB, "stages=[train,eval,reload]", "train.steps=40", "checkpoint.every=3", "reload.layouts=[sp1-dp1-z0]"]
    assert command(*job, "hydra.run.dir=whole", cwd=tmp_path).returncode == 0
    before, chance, metrics = left_in_shared_memory(), random.Random(0), tmp_path / "killed" / "metrics.jsonl"
    for kill in range(6):
        size = metrics.stat().st_size if metrics.exists() else 0
        running = Command(tmp_path, *job, "hydra.run.dir=killed")
        end = time.monotonic() + 60
        while kill and running.process.poll() is None and time.monotonic() < end:
            if metrics.exists() and metrics.stat().st_size not in (0, size):
                break
            time.sleep(0.01)
        time.sleep(chance.random() * 2)
        if running.process.poll() is not None:
            break
        if kill == 1:
            second = command(*job, "hydra.run.dir=killed", cwd=tmp_path)
            assert second.returncode == 2 and f"in use by process {running.process.pid}" in second.stderr
        running.kill()
    done = command(*job, "hydra.run.dir=killed", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert nothing_left(before)


@pytest.mark.long
def test_one_sweep_called_twice_at_once_is_refused(command, tmp_path):
    sweep = ["-m", "sweep.name=both", "seed=0,1", *JOB, "train.steps=60"]
    first = Command(tmp_path, *sweep)
    end = time.monotonic() + 90
    while not list(tmp_path.glob("outputs/sweeps/both/seed0/metrics.jsonl")) and time.monotonic() < end:
        time.sleep(0.05)
    second = command(*sweep, cwd=tmp_path)
    assert second.returncode == 2 and f"sweep.name: {tmp_path}/outputs/sweeps/both is in use by" in second.stderr
    said, _ = first.process.communicate(timeout=200)
    assert first.process.returncode == 0 and "sweep: 2 ok" in said, said
