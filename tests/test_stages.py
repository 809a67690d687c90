"""The registry of stages, and a stage that another package brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.config import ConfigError, resolve, stages
from ulysses_exp.config.composing import composed
from ulysses_exp.report import views

TINY = [
    "device=cpu", "train.steps=1", "train.seq_len=16", "train.global_batch_size=1", "train.unmeasured_steps=0",
    "model.architecture.num_hidden_layers=1", "tracker.mode=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where the package of docs/probe is installed."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")  # setuptools builds beside its source
    for path in (ROOT / "docs/probe").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, "--target", target, source], check=True)
    return target


def run(site: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "run.py", *words], env=os.environ | {"PYTHONPATH": str(site)}, cwd=cwd,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_stage_of_ones_own_runs_like_any_other(installed, tmp_path):
    done = run(installed, "stages=[train,probe]", "probe.trainable=true", f"hydra.run.dir={tmp_path}", *TINY)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    known = results["model"]["parameters"]
    assert results["stages"]["probe"].items() >= {"status": "ok", "parameters": [known, known]}.items()
    assert f"probe        {known:,} and {known:,} parameters on the ranks" in done.stdout
    assert "trainable: true" in (tmp_path / ".hydra" / "config.yaml").read_text()


def test_a_stage_of_ones_own_is_in_the_help_and_its_keys_are_checked(installed, tmp_path):
    text = run(installed, "--help").stdout
    assert "\n  probe   parameters on every rank\n" in text and "\nprobe:\n  trainable: false\n" in text
    refused = run(installed, "stages=[probe]", "probe.trainabel=true", *TINY, cwd=tmp_path)
    assert refused.returncode == 2 and "did you mean probe.trainable?" in refused.stderr, refused.stderr
    refused = run(installed, "stages=[probe]", "probe.trainable=3", *TINY, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("probe.trainable: "), refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_stage_that_cannot_be_imported_is_an_error_of_the_jobs_that_ask_for_it(installed, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for path in installed.iterdir():
        if path.name.endswith(".dist-info"):
            path.rename(site / path.name)
            try:
                (site / "probe_stage.py").write_text("import a_module_that_is_not_here\n")
                refused = run(site, "stages=[probe]", *TINY, cwd=tmp_path)
                others = run(site, "--help")
            finally:
                (site / path.name).rename(path)
    assert refused.returncode == 2 and refused.stderr.startswith(
        "stages: probe of probe-stage cannot be imported (ModuleNotFoundError: No module named 'a_module_that"
    ), refused.stderr
    assert others.returncode == 0 and "probe" not in others.stdout


def test_what_lies_in_the_current_folder_is_not_installed(installed):
    """A folder from somebody else may hold anything, also what looks like an installed package."""
    module = [sys.executable, "-m", "ulysses_exp.report", "--help"]
    code = "from ulysses_exp.config import stages; print(stages.names())"
    for words in ([sys.executable, "-c", code], module):
        ended = subprocess.run(
            words, cwd=installed, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert ended.returncode == 0 and "probe" not in ended.stdout, ended


def test_its_settings_reach_attached_ranks(installed):
    """Their tasks come as JSON."""
    code = """
from pathlib import Path
from ulysses_exp.config import resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.report import views
from ulysses_exp.launch import Task
words = ["stages=[train,probe]", "probe.trainable=true", "device=cpu"]
task = Task("main", resolve(composed(words)[0]), ("train",), Path("/run"), {})
again = Task.from_json(task.to_json())
assert again == task and again.config.probe.trainable is True
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_a_view_that_raises_takes_no_job_down(monkeypatch):
    view = stages.resolve("ulysses_exp.stages.parity.view")
    monkeypatch.setattr(view, "facts", lambda result, arrow: [("parity", result["nothing"])])
    failed = views.facts("parity", {"status": "failed", "reason": "no memory"}, "->")
    assert [(label, str(text)) for label, text in failed] == [
        ("parity", "failed: no memory"), ("parity", "cannot be shown (KeyError: 'nothing')")
    ]  # fmt: skip


def test_every_stage_has_what_it_names():
    assert stages.names()[: len(stages.OWN)] == stages.OWN
    works: list[str] = []
    for stage in map(stages.stage, stages.OWN):
        works += stage.work
        functions = [work.function for work in stage.work.values()]
        for place in (stage.parent, stage.rules, stage.after_training, *functions):
            assert place is None or callable(stages.resolve(place)), place
        view = stages.resolve(stage.view)
        assert callable(view.facts) and view.SHAPE, f"{stage.name} is not shown"
    assert len(set(works)) == len(works), "a task could not tell them apart"


def test_the_documented_stage_is_the_one_that_is_tested():
    text = (ROOT / "docs/architecture.md").read_text()
    for path in (ROOT / "docs/probe/pyproject.toml", ROOT / "docs/probe/probe_stage.py"):
        assert path.read_text() in text, f"docs/architecture.md shows another {path.name}"


def test_the_readme_knows_every_stage():
    text = (ROOT / "README.md").read_text()
    for stage in map(stages.stage, stages.OWN):
        assert f"| `{stage.name}` | {stage.about} |" in text, f"README.md: | `{stage.name}` | {stage.about} |"


def test_a_stage_that_is_not_there():
    with pytest.raises(ConfigError, match=r"stages: 'trian' is not a choice; did you mean train\?"):
        resolve(composed(["stages=[trian]", "device=cpu"])[0])
