"""The house stands as docs/architecture.md draws it: who may import whom, how large a file may be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest
from checkout import ROOT

PACKAGE = ROOT / "ulysses_exp"
LONGEST = 400  # lines of a file
MOST_NAMES = 14  # side by side in ulysses_exp/
FOR_TYPES = "if TYPE_CHECKING:\n    "


def lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the package in `checkout`, by the contracts in its pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


def circle(graph: grimp.ImportGraph) -> list[str]:
    """Files that import one another, the first one last again; empty where there are none."""
    try:
        TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_files_import_one_another_in_a_circle():
    graph = grimp.build_graph("ulysses_exp", cache_dir=None, exclude_type_checking_imports=False)
    assert len(graph.modules) > 150
    found = circle(graph)
    assert not found, " <- ".join(found)


def test_imports_inside_functions_and_for_types_close_a_circle(tmp_path, monkeypatch):
    package = tmp_path / "made_up_house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("def one():\n    from made_up_house import two\n")
    (package / "two.py").write_text(f"from typing import TYPE_CHECKING\n{FOR_TYPES}from made_up_house import one\n")
    monkeypatch.syspath_prepend(tmp_path)
    graph = grimp.build_graph("made_up_house", cache_dir=None, exclude_type_checking_imports=False)
    assert set(circle(graph)) == {"made_up_house.one", "made_up_house.two"}


def copied(folder: Path) -> Path:
    """The package in a checkout at `folder`, for something to be planted in it."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    return shutil.copytree(PACKAGE, folder / "ulysses_exp", ignore=shutil.ignore_patterns("__pycache__"))


def test_arrows_go_down_only():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    recipe = subprocess.run(["make", "--dry-run", "lint"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "/lint-imports" in recipe.stdout, recipe.stdout + recipe.stderr


@pytest.mark.parametrize(
    ("file", "after", "planted", "said"),
    [
        ("experiment/job.py", "def _append(", "    import torch", "experiment.job -> torch"),
        ("stages/eval/parent.py", "def run(", "    import transformers", "stages.eval.parent -> transformers"),
        ("rank/session.py", "def open_session(", "    from ulysses_exp.report import units",
         "rank.session -> ulysses_exp.report"),
        ("launch/local.py", "def warm_up(", "    import ulysses_exp.rank.worker", "launch.local -> ulysses_exp.rank"),
        ("stages/train/parent.py", "def run(", "    from ulysses_exp.stages.eval import parent",
         "ulysses_exp.stages.train.parent -> ulysses_exp.stages.eval"),
    ],
    ids=lambda value: value if value.endswith(".py") else "",
)  # fmt: skip
def test_an_arrow_that_goes_up_is_told(tmp_path, file, after, planted, said):
    """Planted inside a function, where Python itself sees no circle."""
    path = copied(tmp_path) / file
    before, found, rest = path.read_text().partition(after)
    signature, end, body = rest.partition(":\n")
    assert found and end
    path.write_text(before + found + signature + end + planted + "\n" + body)
    done = lint(tmp_path)
    assert done.returncode == 1 and said in done.stdout.replace("\n", " "), done.stdout


def test_an_arrow_that_types_alone_need_is_one(tmp_path):
    with (copied(tmp_path) / "rank" / "worker.py").open("a") as file:
        file.write(f"\n\nfrom typing import TYPE_CHECKING\n\n{FOR_TYPES}from ulysses_exp.report import runs\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and "rank.worker -> ulysses_exp.report" in done.stdout.replace("\n", " "), done.stdout


def test_the_parent_imports_no_library_of_the_ranks():
    """All of its modules at once: a wrong configuration is told in half a second, and a sweep's parent is small."""
    script = """
import importlib, pkgutil, sys
import ulysses_exp
from ulysses_exp.config import stages
for name in ("cli", "config", "experiment", "launch", "report", "tracking", "plan.planner", "plan.step_time"):
    package = importlib.import_module(f"ulysses_exp.{name}")
    for found in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + "."):
        if not found.name.endswith(("__main__", "dashboard")):
            importlib.import_module(found.name)
for stage in stages.installed():
    for place in (stage.parent, stage.rules, stage.view, stage.after_training):
        place and stages.resolve(place)
print([name for name in ("torch", "transformers", "deepspeed", "accelerate", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr or done.stdout


def test_a_file_is_one_idea():
    long = {
        str(p.relative_to(ROOT)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > LONGEST
    }
    assert not long
    names = sorted(p.name for p in PACKAGE.iterdir() if p.name != "__pycache__")
    assert len(names) <= MOST_NAMES, names
    for folder in (p.parent for p in PACKAGE.rglob("__init__.py")):
        inside = [p for p in folder.iterdir() if p.name != "__pycache__"]
        assert len(inside) > 1, f"{folder} has nothing beside {inside[0].name}"
        assert folder.name not in ("utils", "helpers", "common", "misc")
    assert not [p for p in PACKAGE.rglob("*.py") if p.stem in ("utils", "helpers", "common", "misc")]
