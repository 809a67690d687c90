"""benchmarks/gpu.py where there is no GPU: a step that crashes, hangs or fails costs no other one its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.config import accelerators

SCRIPT = ROOT / "benchmarks" / "gpu.py"
RESULTS = ROOT / "benchmarks" / "results"

#: A script with steps of its own, made up by their bodies
MADE_UP = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
import gpu_steps
from gpu_steps import command
from gpu_steps.step import Step
here = Path(__file__)
gpu_steps.__path__.append(str(here.parent / "steps"))
gpu_steps.STEPS = tuple(Step(p.stem, "?", 30) for p in sorted(here.parent.glob("steps/*.py")))
command.SCRIPT = here
sys.exit(command.main())
"""
STEPS = {
    "a_hangs": "yield {'figure': 1}\n    time.sleep(600)",
    "b_crashes": "yield {'figure': 2}\n    os.kill(os.getpid(), 9)",
    "c_fails": "yield {'figure': 3}\n    raise ValueError('words of its own\\nand more')",
    "d_tells": "yield {'figure': 4, 'trouble': 'not right'}",
    "e_works": "yield {'figure': 5, 'size_bytes': 2048, 'took_s': 0.5}",
}


def gpu(*arguments: str, script: Path = SCRIPT, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def made_up(tmp_path):
    """The script, and `write(name)` for its steps."""
    (tmp_path / "steps").mkdir()
    script = tmp_path / "gpu.py"
    script.write_text(MADE_UP)

    def write(name: str) -> None:
        body = f"import os, time\n\ndef run(setting, part):\n    {STEPS[name]}\n"
        (tmp_path / "steps" / f"{name}.py").write_text(body)

    return script, write


def test_what_ends_one_step_ends_no_other(made_up, tmp_path):
    script, write = made_up
    for name in STEPS:
        write(name)
    script.write_text(script.read_text().replace('"?", 30', '"?", 1 if p.stem == "a_hangs" else 30'))
    before = {p.name for p in RESULTS.iterdir()}
    done = gpu("--pretend", "--out", str(tmp_path / "out"), script=script)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "out" / "gpu_pretended.json").read_text())
    states = {name: entry["state"] for name, entry in report["steps"].items()}
    assert states["a_hangs"].startswith("ended after 4 s, its limit")
    assert states["b_crashes"].startswith("ended by SIGKILL")
    assert states["c_fails"] == "exit code 1: ValueError: words of its own"
    assert states["d_tells"] == "1 of 1 rows with trouble"
    assert states["e_works"] == "ok"
    assert [entry["rows"][0]["figure"] for entry in report["steps"].values()] == [1, 2, 3, 4, 5]
    page = (tmp_path / "out" / "gpu_pretended.md").read_text()
    assert page.startswith("# On a GPU: Pretended") and "| 5 | 2.00 KiB | 500 ms |" in page
    assert {p.name for p in RESULTS.iterdir()} == before


def test_steps_made_before_stay(made_up, tmp_path):
    script, write = made_up
    for name in ("d_tells", "e_works"):
        write(name)
    out = ("--pretend", "--out", str(tmp_path / "out"))
    assert gpu(*out, "--only", "d_tells", script=script).returncode == 1
    assert gpu(*out, "--only", "e_works", script=script).returncode == 0
    report = json.loads((tmp_path / "out" / "gpu_pretended.json").read_text())
    assert list(report["steps"]) == ["d_tells", "e_works"]


def test_it_is_refused_in_a_line():
    assert "no step is called kernel" in gpu("--only", "kernel").stderr
    if not accelerators():
        done = gpu()
        assert done.returncode == 2 and done.stderr.startswith("gpu.py: no GPU answers"), done.stderr


def test_every_step_is_listed_and_told_in_the_docs():
    listed = [line.split()[0] for line in gpu("--list").stdout.splitlines()]
    assert listed[0] == "start" and len(listed) > 8
    told = (ROOT / "docs" / "gpu.md").read_text()
    assert not [name for name in listed if f"`{name}`" not in told]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_steps_run_in_tiny(tmp_path):
    """An hour on a GPU is not spent on mistakes of the script."""
    done = gpu("--pretend", "--out", str(tmp_path), timeout=890)
    report = json.loads((tmp_path / "gpu_pretended.json").read_text())
    states = {name: entry["state"] for name, entry in report["steps"].items()}
    assert set(states.values()) == {"ok"} and len(states) > 8, states
    assert done.returncode == 0
    kernels = report["steps"]["kernels"]["rows"]
    assert {"sdpa", "flex", "varlen", "flash_attention_3", "sdpa's choice"} <= {row["kernel"] for row in kernels}
    assert "out of memory" in report["steps"]["out_of_memory"]["rows"][0]["error"]
