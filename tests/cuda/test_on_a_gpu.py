"""What a GPU alone can show: `make test-gpu`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from checkout import ROOT

from ulysses_exp.config import accelerators

sys.path.append(str(ROOT / "benchmarks"))

from gpu_steps import kernels, start, two_ranks
from gpu_steps.attention_kernels import NAMES, Missing, kernel
from gpu_steps.step import Setting

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def gpus() -> int:
    """How many there are. These tests are asked for by name, so without one they fail."""
    found = accelerators()
    assert found, "no GPU is here"
    return found


@pytest.fixture
def setting(gpus: int, tmp_path: Path) -> Setting:
    return Setting(pretend=False, gpus=gpus, folder=tmp_path)


@pytest.mark.parametrize("case", kernels.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", kernels.RIGHT)
def test_what_a_job_runs_by_default_is_right(setting, dtype, case):
    """`sp.attention=sdpa`, forward and backward, beside fp32 numbers of the CPU."""
    row = kernels.errors(setting, kernel("sdpa"), dtype, case, 2048)
    assert row["result"] == "right", row


@pytest.mark.parametrize("name", NAMES[1:])
def test_no_other_kernel_is_silently_wrong(setting, name):
    try:
        attend = kernel(name)
    except Missing as missing:
        pytest.skip(str(missing))
    rows = [kernels.one(setting, attend, dtype, case) for dtype in kernels.RIGHT for case in kernels.CASES]
    assert not [row for row in rows if row.get("trouble")], rows


def test_ranks_start_as_forks_and_spawned(setting):
    rows = list(start.run(setting, ""))
    assert [row["trouble"] for row in rows] == [None, None], rows
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_ranks_share_a_gpu(setting, stage):
    (row,) = two_ranks.run(setting, stage)
    assert row["trouble"] is None and row["eval"] == row["reload"] == "ok", row
    assert row["loss, last"] < row["loss, first"]
