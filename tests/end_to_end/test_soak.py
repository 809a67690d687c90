"""benchmarks/soak.py in short: jobs that are killed at random end with the numbers of jobs that are not."""

import json
import subprocess
import sys

import pytest
from checkout import ROOT


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_jobs_end_with_the_numbers_of_undisturbed_ones(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--kills", "3", "--jobs", "4", "--seed", "3",
         "--folder", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    assert len(report["kills"]) == 3 and report["jobs"] == 4
    assert report["differences"] == report["lost_checkpoints"] == report["left"] == []
