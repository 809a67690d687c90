"""Seconds and rates of saving and loading a checkpoint, beside what the disk takes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpu_steps import ranks
from gpu_steps.step import Row, Setting

if TYPE_CHECKING:
    from pathlib import Path

    from ulysses_exp.rank.session import Session


def parts(setting: Setting) -> list[str]:
    return setting.pick(["2", "3"], ["3"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: the ZeRO stage."""
    model = setting.pick(
        ["model=llama3_1b", "model.architecture.num_hidden_layers=4", "train.precision=bf16"], ["model=tiny_llama"]
    )
    config = ranks.configured(
        setting, *model, "data=synthetic", "train.seq_len=512", "train.global_batch_size=1", "sp.size=1",
        f"zero.stage={part}",
    )  # fmt: skip
    yield from ranks.rows(setting, f"z{part}", config, rates)


def rates(session: Session) -> Iterator[Row]:
    import torch.distributed as dist

    from ulysses_exp.rank import checkpoints
    from ulysses_exp.rank.step import optimizer_step

    session.engine.train()
    optimizer_step(session, 0)
    target = session.task.folder / "checkpoints" / "step1"
    for attempt in ("first", "again"):
        began = time.perf_counter()
        saving = checkpoints.begin(session.engine, target, layout=session.layout, step=1, state={})
        still = time.perf_counter() - began
        saving.wait()
        saved = time.perf_counter() - began
        size = sum(path.stat().st_size for path in target.rglob("*.safetensors"))
        began = time.perf_counter()
        checkpoints.load(session.engine, target, layout=session.layout)
        loaded = time.perf_counter() - began
        began = time.perf_counter()
        checkpoints.weights_identical(session.engine, dist.group.WORLD)
        compared = time.perf_counter() - began
        yield {
            "layout": session.layout.name,
            "attempt": attempt,
            "size_bytes": size,
            "training stands still_s": still,
            "save_s": saved,
            "save, GB/s": size / saved / 1e9,
            "load_s": loaded,
            "load, GB/s": size / loaded / 1e9,
            "weights compared_s": compared,
            "the disk, GB/s": min(size, 2**31) / _written(session.task.folder, min(size, 2**31)) / 1e9,
        }


def _written(folder: Path, size: int) -> float:
    """Seconds for so many bytes to a file and to disk."""
    block, path = os.urandom(min(size, 2**24)), folder / "bytes"
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, size // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return took
