"""Writing a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from ulysses_exp.checkpoints import manifest as manifests
from ulysses_exp.checkpoints import publish
from ulysses_exp.checkpoints.errors import written_together
from ulysses_exp.checkpoints.fingerprints import from_digests, gather_scalars, names
from ulysses_exp.checkpoints.homes import fragments
from ulysses_exp.checkpoints.huggingface import export_huggingface
from ulysses_exp.checkpoints.progress import engine_state
from ulysses_exp.checkpoints.shards import plan
from ulysses_exp.checkpoints.streaming import write
from ulysses_exp.layout import Layout


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    folder: Path
    seconds: float
    bytes: int  # of the portable part


def save(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    *,
    layout: Layout,
    step: int,
    state: dict[str, Any],
    keep: int | None = None,
    tokenizer: Any = None,
) -> Saved:
    """Writes `folder`, complete or not at all. Collective over the world.

    Args:
        folder: `<run>/checkpoints/step<N>`.
        state: what else resuming needs, as JSON.
        keep: how many step folders stay in `<run>/checkpoints`; None keeps all.

    Raises:
        CheckpointError: on all ranks, where one of them cannot write; what was there before is still there.
    """
    began = time.perf_counter()
    folder = Path(folder)
    rank = dist.get_rank()
    temporary = folder.parent / f".{folder.name}.partial"
    with written_together(folder):
        if rank == 0:
            publish.begin(folder)
            (temporary / manifests.PORTABLE).mkdir()
    held = list(fragments(engine))
    shards = plan(held, names(engine))
    with written_together(folder):
        digests = write(shards, held, temporary / manifests.PORTABLE)
    found = from_digests(digests, gather_scalars(engine))
    module = export_huggingface(engine, temporary / "huggingface", tokenizer)
    counters = engine_state(engine)
    with written_together(folder):
        if rank == 0:
            manifests.Manifest(
                layout=layout.name,
                step=step,
                optimizer=type(engine.basic_optimizer).__name__,
                weights=found.weights,
                states=found.optimizer,
                numbers=found.numbers,
                module=module,
                files={shard.file: manifests.describe(shard) for shard in shards},
                engine=counters,
                state=state,
                versions={name: version(name) for name in ("torch", "deepspeed", "transformers", "safetensors")},
            ).write(temporary)
            publish.publish(temporary, folder, keep)
    size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return Saved(folder, time.perf_counter() - began, size)
