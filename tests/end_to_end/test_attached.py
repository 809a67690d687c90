"""Ranks that torchrun has started: one output folder, the same numbers as launch=local."""

import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT, only_run

QUICK = ["sp.size=2", "zero.stage=3", "train.steps=3", "train.seq_len=64", "tracker.mode=disabled", "device=cpu",
         "reload.layouts=[sp1-dp1-z0,sp2-dp1-z2]"]  # fmt: skip


def test_torchrun_gives_what_local_gives(command, tmp_path):
    local, attached = tmp_path / "local", tmp_path / "attached"
    local.mkdir(), attached.mkdir()
    assert command(*QUICK, cwd=local).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
         "--master-port=29533", str(ROOT / "run.py"), "launch=attached", *QUICK],
        cwd=attached, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (json.loads((only_run(f) / "results.json").read_text()) for f in (attached, local))
    assert ours["status"] == "ok"
    assert ours["stages"]["train"]["loss"] == pytest.approx(theirs["stages"]["train"]["loss"], rel=1e-7)
    assert [c["status"] for c in ours["stages"]["reload"]["cells"]] == ["ok"] * 3
