"""Writing a checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ulysses_exp.config.received import manifest as manifests
from ulysses_exp.config.received.manifest import CheckpointError
from ulysses_exp.layout import Layout
from ulysses_exp.rank.checkpoints import function, publish
from ulysses_exp.rank.checkpoints.errors import written_together
from ulysses_exp.rank.checkpoints.fingerprints import from_digests, gather_scalars, names
from ulysses_exp.rank.checkpoints.homes import fragments
from ulysses_exp.rank.checkpoints.huggingface import write_huggingface
from ulysses_exp.rank.checkpoints.progress import engine_state
from ulysses_exp.rank.checkpoints.shards import plan
from ulysses_exp.rank.checkpoints.streaming import Files, write


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    folder: Path
    seconds: float  # from the first byte to the moved `latest`
    bytes: int  # of the portable part


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, **what: Any) -> Saved:
    """Writes `folder`, complete or not at all, and waits until it is on disk. Collective; arguments as `begin`'s."""
    return begin(engine, folder, **what).wait()


def begin(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    *,
    layout: Layout,
    step: int,
    state: dict[str, Any],
    keep: int | None = None,
    tokenizer: Any = None,
    logits: dict[str, torch.Tensor] | None = None,
) -> Saving:
    """Hands a checkpoint to the kernel; a thread brings it to disk and gives it its name while the engine goes on.

    Collective over the world. No copy of the state is made, so no memory is taken: what returns from here is in the
    page cache, and the engine may change what it holds.

    Args:
        folder: `<run>/checkpoints/step<N>`.
        state: what else resuming needs, as JSON.
        keep: how many step folders stay in `<run>/checkpoints`; None keeps all.
        logits: of a fixed batch, as `function.record` keeps them; None records none.

    Raises:
        CheckpointError: on all ranks, where one of them cannot write; what was there before is still there.
    """
    began = time.perf_counter()
    folder = Path(folder)
    rank = dist.get_rank()
    temporary = folder.parent / f".{folder.name}.partial"
    with _gone_if_it_fails(temporary, folder):
        with written_together(folder):
            if rank == 0:
                publish.begin(folder)
                (temporary / manifests.PORTABLE).mkdir()
        files, size = _write(engine, folder, temporary, layout, step, state, tokenizer, logits)
    return Saving(files, temporary, folder, keep, began, size)


@contextlib.contextmanager
def _gone_if_it_fails(temporary: Path, folder: Path) -> Iterator[None]:
    """Removes what could be written of a checkpoint that cannot: it would keep the disk full."""
    try:
        yield
    except CheckpointError as error:
        if dist.get_rank() == 0:
            for file in temporary.glob("*/*"):
                with contextlib.suppress(OSError):
                    os.truncate(file, 0)  # ranks that have it open would keep its bytes
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(folder, error.problem) from error


def _write(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    temporary: Path,
    layout: Layout,
    step: int,
    state: dict[str, Any],
    tokenizer: Any,
    logits: dict[str, torch.Tensor] | None,
) -> tuple[list[Files], int]:
    """Hands all of it to the kernel; returns the files, not yet synced, and the bytes of the portable part."""
    held = list(fragments(engine))
    shards = plan(held, names(engine))
    files = [Files(temporary / manifests.PORTABLE), Files(temporary / "huggingface")]
    digests = write(shards, held, files[0])
    found = from_digests(digests, gather_scalars(engine))
    module = write_huggingface(engine, files[1], temporary / "huggingface", tokenizer)
    counters = engine_state(engine)
    with written_together(folder):
        if dist.get_rank() == 0:
            computes = {"config": json.loads((temporary / "huggingface" / "config.json").read_text())}
            if logits is not None:
                computes["logits_sha256"] = function.write(logits, temporary)
            manifests.Manifest(
                layout=layout.name,
                step=step,
                optimizer=type(engine.basic_optimizer).__name__,
                weights=found.weights,
                states=found.optimizer,
                numbers=found.numbers,
                module=module,
                files={shard.file: shard.described() for shard in shards},
                engine=counters,
                state=state,
                function=computes,
                versions={name: version(name) for name in ("torch", "deepspeed", "transformers", "safetensors")},
            ).write(temporary)
    return files, sum(tensor.nbytes for shard in shards for tensor in shard.tensors)


class Saving:
    """A checkpoint on its way to disk. It counts once rank 0 has seen every rank's part there. Collective to make."""

    def __init__(self, files: list[Files], temporary: Path, folder: Path, keep: int | None, began: float, size: int):
        self._files, self._temporary, self._folder, self._keep = files, temporary, folder, keep
        self._began, self._bytes = began, size
        self._seconds = 0.0
        self._error: OSError | None = None
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name)
        # the ranks meet at the store, not in a collective, which would get between those of the engine
        self._store = dist.PrefixStore(f"checkpoint {name[0]}", _get_default_store())
        self._thread = threading.Thread(target=self._finish, name=f"saves {folder.name}", daemon=True)
        self._thread.start()

    def wait(self) -> Saved:
        """Returns when the checkpoint is on disk. Collective over the world.

        Raises:
            CheckpointError: on all ranks, where one of them could not write; what was there before is still there.
        """
        with _gone_if_it_fails(self._temporary, self._folder), written_together(self._folder):
            self._thread.join()
            if self._error is not None:
                raise self._error
        return Saved(self._folder, self._seconds, self._bytes)

    def _finish(self) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        try:
            for files in self._files:
                files.sync()
        except OSError as error:
            self._error = error
        if rank:
            self._store.set(str(rank), "failed" if self._error else "on disk")
            return
        others = [str(other) for other in range(1, world)]
        while others and not self._store.check(others):
            time.sleep(0.005)  # not `wait`, which would keep the store from the other threads
        if self._error is None and all(self._store.get(other) == b"on disk" for other in others):
            try:
                publish.publish(self._temporary, self._folder, self._keep)
            except OSError as error:
                self._error = error
        self._seconds = time.perf_counter() - self._began
