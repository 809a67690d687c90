"""What is in a folder stays: marks, locks and moves, without ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.cli import main
from ulysses_exp.config import ConfigError, resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.config.received import sources
from ulysses_exp.config.received.manifest import Manifest
from ulysses_exp.experiment import before_start, continuing, sweep
from ulysses_exp.launch import run_folder
from ulysses_exp.report import runs

HOLDER = """
import sys, time
from pathlib import Path
from ulysses_exp.launch import run_folder
run_folder.lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def nothing_stays_locked():
    yield
    for folder in list(run_folder._held):
        run_folder.release(folder)


@pytest.fixture(scope="module")
def config():
    return resolve(composed(["device=cpu", "train.steps=6"])[0])


def command(monkeypatch, capsys, *overrides: str) -> tuple[object, str]:
    """(exit code, stderr) of a command that is refused."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["run.py", *overrides])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err and len(err.splitlines()) <= 2
    return ended.value.code, err


def contents(folder: Path) -> dict[str, str | None]:
    """Every file below `folder` and what is in it."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in folder.rglob("*")}


def a_run(folder: Path, fingerprint: str = "a") -> Path:
    """A folder as a run leaves it, as far as moving goes."""
    run_folder.lock(folder)
    run_folder.begin(folder, fingerprint, ["seed=1"])
    (folder / ".hydra").mkdir()
    (folder / "checkpoints" / "step5").mkdir(parents=True)
    counters = {"global_steps": 5, "global_samples": 20, "skipped_steps": 0}
    engine = {**counters, "groups": [], "scheduler": None, "generators": []}
    Manifest("sp1-dp1-z0", 5, "AdamW", {}, {}, {}, {}, {}, engine).write(folder / "checkpoints" / "step5")
    (folder / "checkpoints" / "latest").write_text("step5")
    (folder / "results.json").write_text('{"status": "ok"}')
    run_folder.release(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [("checkpoints/thesis.pt", "checkpoints/"), ("wandb/mine", "wandb/"), ("run.log", "run.log"),
     ("results.json", "results.json"), ("previous/1/x", "previous/"), (".hydra/config.yaml", ".hydra/")],
)  # fmt: skip
def test_a_folder_with_somebodys_files_is_refused_and_untouched(tmp_path, monkeypatch, capsys, name, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text("years of work")
    before = contents(tmp_path)
    code, err = command(monkeypatch, capsys, "stages=[train]", "hydra.run.dir=mine")
    assert code == 2 and err.startswith("hydra.run.dir: ") and f"holds {kind}, which no run" in err
    assert contents(tmp_path) == before


def test_files_that_a_job_does_not_write_and_links_to_empty_disks_are_no_hindrance(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoints").symlink_to("../disk")
    run_folder.lock(tmp_path / "run")
    assert run_folder.begin(tmp_path / "run", "a", []) == (False, None)
    assert (tmp_path / "run" / "checkpoints").readlink() == Path("../disk")


@pytest.mark.parametrize(
    "place", ["afile", "afile/x", "/proc/x", "/dev/full"], ids=["a file", "below a file", "proc", "a device"]
)
def test_a_place_where_nothing_can_be_written_is_refused(tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    code, err = command(monkeypatch, capsys, "stages=[train]", f"hydra.run.dir={place}")
    assert code == 2 and err.startswith("hydra.run.dir: ") and "cannot be written" in err
    assert [p.name for p in tmp_path.iterdir()] == ["afile"]


def test_a_sweep_folder_of_another_program_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/sweeps/x").mkdir(parents=True)
    (tmp_path / "outputs/sweeps/x/multirun.yaml").write_text("hydra: theirs")
    before = contents(tmp_path)
    code, err = command(monkeypatch, capsys, "-m", "sweep.name=x", "seed=1,2")
    assert code == 2 and err.startswith("sweep.name: ") and "multirun.yaml" in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("way", ["R", "./R", "link", "R/checkpoints/step5", "link/checkpoints/step5"])
@pytest.mark.parametrize("target", ["R", "link", "sub/../R"])
def test_a_run_does_not_start_from_its_own_folder(tmp_path, monkeypatch, capsys, way, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    a_run(tmp_path / "R")
    (tmp_path / "link").symlink_to("R")
    before = contents(tmp_path)
    code, err = command(
        monkeypatch, capsys, "stages=[train]", f"checkpoint.source={way}", f"hydra.run.dir={target}", "train.steps=99"
    )
    assert code == 2 and err.startswith("checkpoint.source: ") and "own folder; leave hydra.run.dir out" in err
    assert contents(tmp_path) == before


def test_a_model_in_the_folder_is_not_moved_away_from_its_job(tmp_path, config):
    model = a_run(tmp_path / "R") / "checkpoints" / "step5" / "huggingface"
    model.mkdir()
    reads = replace(config, model=replace(config.model, name_or_path=str(model)))
    with pytest.raises(ConfigError, match=r"model\.name_or_path: .* own folder"):
        before_start.refuse_own(reads, tmp_path / "R")
    before_start.refuse_own(reads, tmp_path / "other")


def test_another_job_moves_what_is_there_aside(tmp_path):
    folder = a_run(tmp_path / "R")
    before = contents(folder)
    for number, job in enumerate(("b", "c"), 1):
        run_folder.lock(folder)
        assert run_folder.begin(folder, job, []) == (False, folder / "previous" / str(number))
        assert {p.name for p in folder.iterdir()} == {run_folder.MARKER, "previous"}
        (folder / "run.log").write_text(job)
        run_folder.release(folder)
    assert contents(folder / "previous" / "1") == before, "its marker, too: it is a run folder as before"
    assert (folder / "previous" / "2" / "run.log").read_text() == "b"
    assert sources.run_folders(str(tmp_path)) == [], "what was moved aside is no run of a sweep"


def test_the_same_job_finds_its_things_in_place(tmp_path):
    folder = a_run(tmp_path / "R")
    before = contents(folder / "checkpoints")
    run_folder.lock(folder)
    assert run_folder.begin(folder, "a", []) == (True, None)
    assert contents(folder / "checkpoints") == before
    assert run_folder.begin(folder, "a", [], fresh=True)[1] == folder / "previous" / "1"


def test_a_link_is_moved_and_what_it_leads_to_stays(tmp_path):
    folder = a_run(tmp_path / "R")
    (folder / "checkpoints").rename(tmp_path / "disk")
    (folder / "checkpoints").symlink_to("../disk")
    run_folder.set_aside(folder)
    moved = folder / "previous" / "1" / "checkpoints"
    assert moved.is_symlink() and (moved / "latest").read_text() == "step5"
    assert (tmp_path / "disk" / "step5" / "manifest.json").exists() and not (folder / "checkpoints").exists()


def test_what_cannot_be_moved_leaves_all_where_it_was(tmp_path, monkeypatch):
    folder = a_run(tmp_path / "R")
    before = contents(folder)
    rename = os.rename

    def busy(path, to):
        if Path(path) == folder / "checkpoints":  # a mount point answers so
            raise OSError(16, "Device or resource busy", str(path))
        rename(path, to)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(OSError, match="busy"):
        run_folder.set_aside(folder)
    assert contents(folder) == before | {"previous": None}


def test_a_damaged_marker_is_ours_and_nobodys_job(tmp_path):
    folder = a_run(tmp_path / "R")
    for damage in (b"", b"\xff\xfe", b"[1]", b'{"fingerprint": 3'):
        (folder / run_folder.MARKER).write_bytes(damage)
        (folder / "run.log").write_text("x")
        run_folder.lock(folder)
        same, place = run_folder.begin(folder, "a", [])
        assert not same and place is not None and (place / "run.log").exists()
        run_folder.release(folder)


def test_a_folder_in_use_says_by_whom_and_is_free_when_that_process_is_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, "R"], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as holder:  # fmt: skip
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert run_folder.is_held(tmp_path / "R")
        code, err = command(monkeypatch, capsys, "stages=[train]", "hydra.run.dir=R")
        assert code == 2 and f"R is in use by process {holder.pid} on " in err
        results = {"status": "running", "error": None}
        assert run_folder.settled(results, tmp_path / "R") == results
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert not run_folder.is_held(tmp_path / "R")
    assert run_folder.settled(results, tmp_path / "R")["status"] == "interrupted"
    run_folder.lock(tmp_path / "R")


def test_a_fork_does_not_hold_the_folder_of_its_parent(tmp_path):
    run_folder.lock(tmp_path / "R")
    child_end, own_end = socket.socketpair()
    if (child := os.fork()) == 0:
        own_end.close()
        child_end.send(b"x")
        child_end.recv(1)  # lives until the parent has looked
        os._exit(0)
    child_end.close()
    own_end.recv(1)
    run_folder.release(tmp_path / "R")
    try:
        assert not run_folder.is_held(tmp_path / "R")
    finally:
        own_end.close()
        os.waitpid(child, 0)


def test_a_refused_command_leaves_no_folder(tmp_path):
    run_folder.lock(tmp_path / "a" / "b")
    run_folder.abandon()
    assert not list(tmp_path.iterdir()) and not run_folder._held


def test_readers_call_a_job_without_a_process_interrupted(tmp_path):
    folder = a_run(tmp_path / "sweep" / "job")
    (folder / "results.json").write_text('{"status": "running", "error": null, "stages": {}}')
    (run,) = runs.find([tmp_path])
    assert run.status == "interrupted"
    jobs = sweep.Sweep()
    jobs.read(tmp_path / "sweep", 0)
    assert jobs.outcomes == ["interrupted"]
    run_folder.lock(folder)
    assert runs.find([tmp_path])[0].status == "running"


def logged(folder: Path, steps: range, torn: str = "") -> None:
    lines = [json.dumps({"step": n, "train/loss": 1 / n, "train/grad_norm": n / 3, "train/learning_rate": 1e-3,
                         "perf/step_time_s": 0.1 * n, "perf/tokens_per_second": 64 / (0.1 * n), "perf/mfu": None,
                         "comm/all_to_all_calls": 4, "comm/all_to_all_bytes": 1024}) for n in steps]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + torn)


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        place = folder / "checkpoints" / f"step{step}"
        place.mkdir(parents=True)
        (place / "manifest.json").write_text(json.dumps({"step": step, "state": {"peak_memory_bytes": [7, 9]}}))


def test_a_job_goes_on_from_the_newest_checkpoint_with_every_step_before_it(tmp_path, config):
    saved(tmp_path, 2, 4)
    (tmp_path / "checkpoints" / ".step6.partial").mkdir()
    logged(tmp_path, range(1, 6), torn='{"step": 6, "tra')
    found = continuing.earlier(config, tmp_path)
    assert found is not None and found.step == 4 and len(found.lines) == 4 and found.train is None
    (tmp_path / run_folder.MARKER).write_text("{}")
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "error-rank0.json").write_text("{}")
    all_logged = (tmp_path / "metrics.jsonl").read_text()
    continuing.tidy(tmp_path, found)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == all_logged.splitlines()[:4]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step2", "step4"}
    assert not (tmp_path / "ranks").exists(), "an error of then is no error of now"
    assert (tmp_path / "previous" / "1" / "metrics.jsonl").read_text() == all_logged

    lines = all_logged.splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[3]]))  # the figures of step 3 are lost
    found = continuing.earlier(config, tmp_path)
    assert found is not None and found.step == 2
    (tmp_path / "metrics.jsonl").unlink()
    assert continuing.earlier(config, tmp_path) is None


def test_a_result_is_made_of_the_steps_of_all_attempts(tmp_path, config):
    saved(tmp_path, 6)
    logged(tmp_path, range(1, 7))
    found = continuing.earlier(config, tmp_path)
    assert found is not None and found.train is None
    nothing = {"status": "ok", "steps": 0, "already_at_step": 6, "checkpoint": None, "peak_memory_bytes": {"max": 1}}
    whole = continuing.joined(nothing, tmp_path, config, found)
    assert whole["steps"] == 6 and whole["first_step"] == 0 and whole["continued_from"] == 6
    assert whole["loss"] == [1 / n for n in range(1, 7)] and whole["grad_norm"] == [n / 3 for n in range(1, 7)]
    assert whole["tokens_per_step"] == 64 and whole["unmeasured_steps"] == 3
    assert whole["step_time_s"]["median"] == 0.1 * 5
    assert whole["checkpoint"] == "checkpoints/step6" and "already_at_step" not in whole
    assert whole["peak_memory_bytes"] == {"max": 9, "per_rank": [7, 9]}
    assert whole["communication"]["all_to_all_calls_per_step"] == 4
    (tmp_path / "results.json").write_text(json.dumps({"status": "running", "stages": {"train": whole}}))
    again = continuing.earlier(config, tmp_path)
    assert again is not None and again.train == whole, "what has ended is not trained again"
