"""Online runs with the real client against a server on loopback: everything arrives, trouble costs bounded time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "report"))  # made_up_results
from a_job import METRICS
from made_up_results import results, write
from processes import A_JOB, environment, logged, run_directories, track
from wandb_server import WandbServer

#: The probe, opening the run and the last upload together, with what a busy machine adds
BOUND_S = 30


def test_everything_arrives(tmp_path):
    with WandbServer() as server:
        told = track(tmp_path, "online", server=server.url)
    assert told["warnings"] == []
    (run_id,) = server.runs
    assert told["how_to_open"] == f"{server.url}/lab/ulysses-exp/runs/{run_id}"
    run = server.runs[run_id]
    assert (run["displayName"], run["groupName"], run["project"]) == ("tiny_llama-sp2-dp1-z3", "ladder", "ulysses-exp")
    assert sorted(run["tags"]) == ["reload", "train"]
    config = json.loads(run["config"])
    assert config["layout"] == {"value": "sp2-dp1-z3"}
    assert config["hub"] == {"value": {"api_key": "***", "token": "***"}}
    assert [row["_step"] for row in server.history] == [1, 2, 3]
    assert set(METRICS) <= set(server.history[0])
    assert server.summary["results/train/tokens_per_second"] == 1234.5
    assert server.exit_code == 0
    (table,) = (json.loads(content) for name, content in server.files.items() if name.startswith("media/table/reload"))
    assert table["data"][0][:4] == ["sp2-dp1-z3", "sp1-dp1-z0", "portable", "ok"]
    assert list((tmp_path / "run").rglob("*.wandb.synced")), "so `sync` does not send it again"


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"refuse": 401}, "answers 401"),
        ({"refuse": 503}, "answers 503"),
        ({"delay_s": 60.0}, "timed out"),
        ({"hang": ("UpsertBucket",)}, "Timed out"),
    ],
    ids=["refuses the key", "is broken", "is slow", "stalls when the run is opened"],
)
def test_server_that(tmp_path, trouble, said):
    with WandbServer(**trouble) as server:
        told = track(tmp_path, "online", server=server.url)
    _kept_offline(tmp_path, told, said)


def test_dead_server(tmp_path):
    told = track(tmp_path, "online", server="http://127.0.0.1:9")
    _kept_offline(tmp_path, told, "refused")


def test_no_key(tmp_path):
    told = track(tmp_path, "online", WANDB_BASE_URL="http://127.0.0.1:9")
    _kept_offline(tmp_path, told, "no API key")


def _kept_offline(place: Path, told: dict, said: str) -> None:
    (warning,) = told["warnings"]
    assert said in warning
    assert "ulysses_exp.tracking sync" in warning
    assert told["logging_s"] < 5
    assert told["seconds"] < BOUND_S
    assert told["how_to_open"].startswith("wandb leet ")
    (run,) = run_directories(place)
    assert run.name.startswith("offline-run-")
    assert sorted(logged(run)) == [1, 2, 3]


def test_server_that_dies_and_what_a_later_sync_sends(tmp_path):
    with WandbServer() as server:
        threading.Thread(target=_stop_after_first_rows, args=(server,), daemon=True).start()
        told = track(tmp_path, "online", 40, 0.1, server=server.url)
    (warning,) = told["warnings"]
    assert "stopped answering" in warning
    assert told["logging_s"] < 5
    assert told["finishing_s"] < BOUND_S
    runs = run_directories(tmp_path)
    assert sorted(logged(next(r for r in runs if r.name.startswith("run-")))) == list(range(1, 41))

    with WandbServer() as later:
        surroundings = environment(tmp_path) | {"WANDB_BASE_URL": later.url, "WANDB_API_KEY": "a" * 40}
        command = [sys.executable, "-m", "ulysses_exp.tracking", "sync", str(tmp_path)]
        first = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=60)
        assert first.returncode == 0, first.stderr
        assert list(later.runs) == list(server.runs), "the same run"
        assert {row["_step"] for row in later.history if "train/loss" in row} == set(range(1, 41))
        assert any(name.startswith("media/table/reload") for name in later.files)
        again = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=60)
        assert again.returncode == 0
        assert again.stdout.startswith("nothing to upload")


def _stop_after_first_rows(server: WandbServer) -> None:
    while "UpsertBucket" not in server.operations:
        time.sleep(0.02)
    time.sleep(1)
    server.stop()


def test_report_arrives_as_media(tmp_path):
    made = write(tmp_path / "ladder" / "a", results(2))
    cells = json.loads((made / "results.json").read_text())["stages"]["reload"]["cells"]
    with WandbServer() as server:
        surroundings = environment(tmp_path) | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        command = [sys.executable, "-m", "ulysses_exp.report", "ladder", "--tracker", "online"]
        done = subprocess.run(command, env=surroundings, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (run,) = server.runs.values()
    assert (run["displayName"], run["groupName"], run["tags"]) == ("report-ladder", "ladder", ["report"])
    pictures = {name.split("/")[3].split("_0_")[0] for name in server.files if name.startswith("media/images/report/")}
    assert pictures == {"loss", "eval", "reload", "step_split", "parity", "plan"}
    (table,) = (json.loads(content) for name, content in server.files.items() if name.startswith("media/table/runs"))
    assert table["data"][0][0] == "sp2-dp1-z3"
    (sent,) = (json.loads(content) for name, content in server.files.items() if name.startswith("media/table/reload"))
    assert sent["columns"][:2] == ["source", "target"]
    assert [row[:2] for row in sent["data"]] == [[cell["source"], cell["target"]] for cell in cells]


def test_sync_of_a_sweep_sends_every_job(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        track(tmp_path / name, "offline")
    with WandbServer() as server:
        surroundings = environment(tmp_path) | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        command = [sys.executable, "-m", "ulysses_exp.tracking", "sync", str(tmp_path)]
        (elsewhere := tmp_path / "elsewhere").mkdir()
        done = subprocess.run(command, cwd=elsewhere, env=surroundings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(server.runs) == 2
    assert not list(elsewhere.iterdir()), "logs of the client"
    assert all(run["groupName"] == "ladder" for run in server.runs.values())


def test_sync_says_that_the_server_is_gone(tmp_path):
    track(tmp_path, "offline")
    surroundings = environment(tmp_path) | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    command = [sys.executable, "-m", "ulysses_exp.tracking", "sync", str(tmp_path)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "not reachable" in done.stderr


def test_the_key_goes_to_no_server_that_the_current_folder_names(tmp_path):
    for name in ("wandb", "run"):
        (tmp_path / name).mkdir()
    with WandbServer() as server:
        (tmp_path / "wandb" / "settings").write_text(f"[default]\nbase_url = {server.url}\n")
        done = subprocess.run(
            [sys.executable, str(A_JOB), "online", str(tmp_path / "run")],
            env=environment(tmp_path) | {"WANDB_API_KEY": "a" * 40}, cwd=tmp_path, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        told = json.loads(done.stdout)
        assert not server.runs and not server.history
    assert "wandb/settings in this folder sets base_url" in told["warnings"][0]
    (run,) = run_directories(tmp_path)
    assert run.name.startswith("offline-"), "nothing is lost"
