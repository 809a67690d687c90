"""The workspace as code: built and serialised offline, every panel on figures that runs really log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")

sys.path.append(str(Path(__file__).parents[1] / "report"))  # made_up_results


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict:
    place = tmp_path_factory.mktemp("dashboard")
    command = [
        sys.executable,
        "-m",
        "ulysses_exp.report.dashboard",
        "--entity",
        "lab",
        "--project",
        "p",
        "--dry-run",
        "view.json",
    ]
    done = subprocess.run(command, env=environment(place), cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    view = json.loads((place / "view.json").read_text())
    assert (view["entity"], view["project"]) == ("lab", "p")
    return view["spec"]["section"] if isinstance(view["spec"], dict) else json.loads(view["spec"])["section"]


def _panels(spec: dict) -> list[dict]:
    return [panel for section in spec["panelBankConfig"]["sections"] for panel in section["panels"]]


def test_it_is_read_back_as_it_was_built(spec):
    from wandb_workspaces.workspaces import internal

    from ulysses_exp.report.dashboard import workspace

    model = workspace("lab", "p")._to_model()
    again = internal.View.model_validate_json(model.model_dump_json(by_alias=True))
    assert again.spec == model.spec


def test_throughput_and_memory_are_shown_by_layout(spec):
    by_layout = {p["config"]["metrics"][0] for p in _panels(spec) if p["config"].get("groupBy") == "layout.value"}
    assert {
        "results/train/tokens_per_second", "results/train/peak_memory_bytes/max", "perf/tokens_per_second",
        "memory/peak_bytes_max", "train/loss",
    } <= by_layout  # fmt: skip


def test_every_panel_shows_something_that_is_logged(spec):
    from a_job import LATER, METRICS
    from made_up_results import results

    from ulysses_exp.report.pictures import names
    from ulysses_exp.tracking.run import figures

    made = results()
    made["stages"]["reload"]["seconds"] = 1.0  # the job times its stages
    logged = {name for name, _ in figures(made)} | set(METRICS) | set(LATER) | {f"report/{name}" for name in names()}
    shown = {key for panel in _panels(spec) for key in panel["config"].get("metrics") or []}
    shown |= {key for panel in _panels(spec) for key in panel["config"].get("mediaKeys") or []}
    shown |= {
        panel["config"]["yAxis"].removeprefix("summary:") for panel in _panels(spec) if "yAxis" in panel["config"]
    }
    assert shown - logged == set()
    assert len(shown) > 20


def test_nothing_is_saved_without_a_server(tmp_path):
    surroundings = environment(tmp_path) | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    command = [sys.executable, "-m", "ulysses_exp.report.dashboard", "--entity", "lab"]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "not reachable" in done.stderr
