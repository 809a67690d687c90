"""Saving and loading take a few megabytes, however large the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_ranks import run
from tiny_engine import Recipe, engine, steps

from ulysses_exp.layout import Layout
from ulysses_exp.rank import checkpoints

LARGE = Recipe(hidden=512, layers=2, vocabulary=16384)
LARGEST = 16384 * 512 * 4  # bytes of the embeddings; about 250 MB of state in all
BOUND = 3 * LARGEST + (64 << 20)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def _peak_of(work) -> int:
    """Bytes by which the resident set of this process grew at most during `work()`."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def peaks(folder: Path, layout: Layout) -> tuple[int, int]:
    with engine(layout, LARGE) as made:
        steps(made, layout, 0, 1)
        save = _peak_of(lambda: checkpoints.save(made, folder, layout=layout, step=1, state={}))
        load = _peak_of(lambda: checkpoints.load(made, folder, layout=layout))
        return save, load


@pytest.mark.parametrize("name", ["sp1-dp2-z0", "sp1-dp2-z2", "sp1-dp2-z3"])
def test_peak_is_bounded(name: str, tmp_path: Path) -> None:
    for save, load in run(2, peaks, tmp_path / "step1", Layout.parse(name)):
        print(f"{name}: save +{save >> 20} MiB, load +{load >> 20} MiB, bound {BOUND >> 20} MiB")
        assert save < BOUND and load < BOUND
