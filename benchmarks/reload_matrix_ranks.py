"""What the ranks of benchmarks/reload_matrix.py do: many cells in one process group, an engine after the other."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ulysses_exp.config import Config
from ulysses_exp.config.received.manifest import Manifest
from ulysses_exp.launch import Task
from ulysses_exp.layout import Layout
from ulysses_exp.rank import checkpoints
from ulysses_exp.rank.session import Session, open_session
from ulysses_exp.rank.step import optimizer_step
from ulysses_exp.rank.upstream import without_operators_of_its_own

BEFORE, AFTER = 3, 3  # optimizer steps before the checkpoint, and after it


def on_rank(
    rank: int, world: int, folder: Path, work: str, configs: list[Config], cells: list[tuple[str, str]]
) -> None:
    """Runs `work` over `configs` in a process group of its own; results go to `folder`/<work>-<world>.jsonl."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    without_operators_of_its_own()
    meeting = folder / f"meeting-{work}-{world}-{os.getppid()}"
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    with (folder / f"{work}-{world}.jsonl").open("a") as file:
        for result in globals()[work](rank, folder, configs, cells):
            if rank == 0:
                file.write(json.dumps(result) + "\n")
                file.flush()
    dist.destroy_process_group()


def save(rank: int, folder: Path, configs: list[Config], _: Any) -> Iterator[dict[str, Any]]:
    """Trains each layout, saves it by both ways, and trains on: the uninterrupted run."""
    for config in configs:
        layout = config.layout
        with _session(config, rank, folder, seed=0) as session:
            first = [optimizer_step(session, step).loss for step in range(BEFORE)]
            saved = checkpoints.save(
                session.engine, checkpoint(folder, layout.name), layout=layout, step=BEFORE, state={"cursor": BEFORE}
            )
            session.engine.save_checkpoint(str(plain_folder(folder, layout.name)), tag="step")
            yield {
                "source": layout.name, "before": first, "after": _continue(session),
                "seconds": saved.seconds, "bytes": saved.bytes,
            }  # fmt: skip


def load(rank: int, folder: Path, configs: list[Config], cells: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Opens every source in each target, one engine a target: it moves on after each cell, so each load has work."""
    for config in configs:
        with _session(config, rank, folder, seed=1) as session:
            for source, target in cells:
                if target == config.layout.name:
                    loaded = checkpoints.load(session.engine, checkpoint(folder, source), layout=config.layout)
                    yield {
                        "source": source, "target": target, "route": loaded.route,
                        "weights_bit_exact": loaded.weights_bit_exact,
                        "optimizer_bit_exact": loaded.optimizer_bit_exact,
                        "seconds": loaded.seconds, "bytes": loaded.bytes, "after": _continue(session),
                    }  # fmt: skip


def plain(rank: int, folder: Path, configs: list[Config], cells: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """DeepSpeed's own `load_checkpoint` with its defaults, each cell in a fresh engine."""
    by_name = {config.layout.name: config for config in configs}
    for source, target in cells:
        if target not in by_name:
            continue
        with _session(by_name[target], rank, folder, seed=1) as session:
            error = None
            try:
                path, _ = session.engine.load_checkpoint(str(plain_folder(folder, source)), tag="step")
                if path is None:
                    error = "load_checkpoint returned None"
            except Exception as failure:
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"
            errors: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(errors, error)
            result: dict[str, Any] = {"source": source, "target": target}
            if found := [e for e in errors if e]:
                yield result | {"error": found[0]}
                continue
            saved, now = Manifest.read(checkpoint(folder, source)), checkpoints.fingerprint(session.engine)
            yield result | {
                "weights_bit_exact": now.weights == saved.weights,
                "optimizer_bit_exact": now.optimizer == saved.states and now.numbers == saved.numbers,
                "after": _continue(session),
            }


def checkpoint(folder: Path, name: str) -> Path:
    return folder / name / "checkpoints" / f"step{BEFORE}"


def plain_folder(folder: Path, name: str) -> Path:
    return folder / name / "deepspeed"


@contextlib.contextmanager
def _session(config: Config, rank: int, folder: Path, seed: int) -> Iterator[Session]:
    task = Task("matrix", config, (), folder, {"model_seed": seed})
    with open_session(task, rank) as session:
        session.engine.train()
        yield session


def _continue(session: Session) -> list[float]:
    return [optimizer_step(session, step).loss for step in range(BEFORE, BEFORE + AFTER)]


def layouts(world: int | None = None) -> list[Layout]:
    """The 24 layouts of at most four ranks, or those of `world` ranks."""
    every = [Layout(s, d, z) for s in (1, 2, 4) for d in (1, 2, 4) for z in range(4) if s * d <= 4]
    return [layout for layout in every if world in (None, layout.world)]
