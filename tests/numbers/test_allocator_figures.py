"""Training tells what the allocator of each accelerator has reserved, and nothing of it where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoints.checkpoint_ranks import run
from small_sessions import configured, session

from ulysses_exp.config import Config
from ulysses_exp.rank.metrics import memory
from ulysses_exp.stages.train import view
from ulysses_exp.stages.train.rank import train

GIB = 2**30


def trained(config: Config, folder: Path, pretend: bool) -> dict[str, Any]:
    """Stage train's result; where `pretend`, of allocators that have reserved more at each look, rank 1's the most."""
    looks = iter(range(1, 100))
    if pretend:
        memory.allocator = lambda device: {
            "peak_reserved_bytes": (10 + next(looks)) * GIB + dist.get_rank(), "ooms": 0
        }  # fmt: skip
    with session(config, folder) as opened:
        return train(opened)


@pytest.mark.parametrize("pretend", [True, False])
def test_the_worst_rank_is_told_on_accelerators_and_nothing_on_cpu(tmp_path, pretend):
    config = configured("sp.size=2", "train.steps=2")
    result = run(2, trained, config, tmp_path, pretend)[0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result["peak_memory_bytes"]["max"] > 0
    if not pretend:
        assert "allocator" not in result
        names = {name for name in lines[0] if name.startswith("memory/")}
        assert names == {"memory/peak_bytes_max", "memory/peak_bytes_mean"}
        return
    assert result["allocator"] == {
        "peak_reserved_bytes": {"max": 12 * GIB + 1, "per_rank": [12 * GIB, 12 * GIB + 1]},
        "ooms": {"max": 0, "per_rank": [0, 0]},
    }
    assert [line["memory/peak_reserved_bytes_max"] for line in lines] == [11 * GIB + 1, 12 * GIB + 1]
    assert ("", "12.0 GiB reserved, rank 1") in view.facts(result, "->")
