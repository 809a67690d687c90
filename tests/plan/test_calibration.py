"""Plans beside real ranks: the part of benchmarks/plan_calibration.py that fits into a test run."""

from __future__ import annotations

import sys

import pytest
from checkout import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from plan_calibration import Cell, compared

#: the extremes: nothing sharded; everything sharded, with more ranks than KV heads
CELLS = [Cell("tiny_llama", 2, 0), Cell("tiny_llama_mqa", 4, 3)]


@pytest.mark.long
@pytest.mark.timeout(200)
def test_bytes_are_exact_and_memory_is_within_five_percent():
    for row in compared(CELLS):
        assert row["predicted_all_to_all_bytes"] == row["measured_all_to_all_bytes"] > 0, row
        assert row["predicted_all_to_all_calls"] == row["measured_all_to_all_calls"] > 0, row
        assert abs(row["relative"]) < 0.05, row
