"""A covering subset of benchmarks/reload_matrix.py: every stage, sp, dp and number of ranks as source and as target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "reload_matrix.py"
LAYOUTS = ["sp1-dp1-z0", "sp2-dp1-z3", "sp1-dp2-z1", "sp4-dp1-z2"]


def test_sessions_of_the_project_go_on_in_other_layouts(tmp_path: Path) -> None:
    out = tmp_path / "matrix"
    command = [sys.executable, str(BENCHMARK), "--layouts", ",".join(LAYOUTS), "--out", str(out), "--without-plain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    cells = json.loads(out.with_suffix(".json").read_text())["cells"]
    assert len(cells) == len(LAYOUTS) ** 2 and all(cell["good"] for cell in cells)
