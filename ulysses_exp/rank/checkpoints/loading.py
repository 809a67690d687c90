"""Opening a checkpoint in any layout."""

from __future__ import annotations

import os
import time
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from ulysses_exp.config.received.manifest import NAME, CheckpointError, Manifest, Stored, stored_tensors
from ulysses_exp.layout import Layout
from ulysses_exp.rank.checkpoints import deepspeed_files
from ulysses_exp.rank.checkpoints.digest import digest_bytes, to_hex
from ulysses_exp.rank.checkpoints.errors import raise_together
from ulysses_exp.rank.checkpoints.fingerprints import fingerprint, module_digests
from ulysses_exp.rank.checkpoints.homes import WEIGHTS, Fragment, fragments, prepare_states, weights_changed
from ulysses_exp.rank.checkpoints.loaded import Loaded
from ulysses_exp.rank.checkpoints.progress import restore
from ulysses_exp.rank.checkpoints.shards import DTYPES

_PIECE_BYTES = 8 << 20


def load(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    *,
    layout: Layout,
    trust_pickle: bool = False,
) -> Loaded:
    """Takes over the checkpoint in `folder`, which any layout may have written. Collective over the world.

    Each rank reads the bytes of its own fragments into the memory where DeepSpeed keeps them; then the digests of what
    the engine holds are compared with those of the engine that was saved.

    Args:
        trust_pickle: where `folder` was written by DeepSpeed's `save_checkpoint`, open its pickled files.

    Raises:
        CheckpointError: on all ranks, where a file is missing, damaged or foreign, or belongs to another model or
            optimizer. Nothing in the folder has been changed or executed.
    """
    began = time.perf_counter()
    folder = Path(folder)
    if deepspeed_files.present(folder):
        return deepspeed_files.load(engine, folder, trusted=trust_pickle)
    error = None
    try:
        manifest = Manifest.read(folder)
        stored = stored_tensors(folder, manifest)
        _read(engine, folder, manifest, stored)
    except CheckpointError as found:
        error = found
    raise_together(error)
    weights_changed(engine)
    try:
        restore(engine, manifest.engine)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as found:
        error = CheckpointError(folder / NAME, f"has no state that this engine can take over ({repr(found)[:200]})")
    raise_together(error)

    now = fingerprint(engine)
    wrong = [(WEIGHTS, name) for name, value in now.weights.items() if value != manifest.weights[name]]
    wrong += [
        (kind, name)
        for kind, values in now.optimizer.items()
        for name, value in values.items()
        if value != manifest.states[kind][name]
    ]
    raise_together(_damage(stored, manifest, wrong))
    same_module = _everywhere(module_digests(engine) == manifest.module)
    return Loaded(
        route="portable",
        step=manifest.step,
        state=manifest.state,
        seconds=time.perf_counter() - began,
        bytes=sum(s.nbytes for s in stored.values()),
        weights_bit_exact=now.weights == manifest.weights and same_module,
        optimizer_bit_exact=now.optimizer == manifest.states and now.numbers == manifest.numbers,
    )


def source_layout(folder: Path) -> Layout:
    """The layout that wrote the checkpoint. Raises CheckpointError."""
    return Layout.parse(Manifest.read(Path(folder)).layout)


def _read(
    engine: deepspeed.DeepSpeedEngine, folder: Path, manifest: Manifest, stored: dict[tuple[str, str], Stored]
) -> None:
    """Fills this rank's fragments."""
    optimizer = type(engine.basic_optimizer).__name__
    if manifest.optimizer != optimizer:
        raise CheckpointError(folder / NAME, f"holds the states of {manifest.optimizer}, this run uses {optimizer}")
    kinds: dict[str, set[str]] = {}
    for kind, names in manifest.states.items():
        for name in names:
            kinds.setdefault(name, set()).add(kind)
    ours = {name for name, _ in engine.module.named_parameters()}
    theirs = set(manifest.weights)
    if missing := sorted(ours - theirs):
        raise CheckpointError(folder / NAME, f"belongs to another model: it has no {missing[0]}")
    prepare_states(engine, kinds, manifest.numbers)
    mine = list(fragments(engine))
    held = {f.name for f in mine}
    if foreign := sorted(theirs - ours - held):
        raise CheckpointError(folder / NAME, f"belongs to another model: this one has no {foreign[0]}")
    files: dict[Path, int] = {}
    try:
        for fragment in mine:
            where = stored[fragment.kind, fragment.name]
            if where.shape != fragment.shape or where.dtype != DTYPES[fragment.data.dtype]:
                raise CheckpointError(
                    where.path,
                    f"{fragment.name} is {where.dtype} {list(where.shape)}, "
                    f"this model's is {DTYPES[fragment.data.dtype]} {list(fragment.shape)}",
                )
        for fragment in mine:
            where = stored[fragment.kind, fragment.name]
            if where.path not in files:
                files[where.path] = os.open(where.path, os.O_RDONLY | os.O_NOFOLLOW)
            _fill(fragment, files[where.path], where)
    except OSError as error:
        raise CheckpointError(error.filename or folder, f"unreadable ({error.strerror})") from None
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _fill(fragment: Fragment, file: int, where: Stored) -> None:
    target = fragment.data.view(torch.uint8)
    position = where.position + fragment.start * fragment.data.element_size()
    for begin in range(0, len(target), _PIECE_BYTES):
        piece = target[begin : begin + _PIECE_BYTES]
        on_host = piece.device.type == "cpu"
        host = piece if on_host else torch.empty_like(piece, device="cpu", pin_memory=True)
        buffer = host.numpy().data
        at = position + begin
        while buffer:
            count = os.preadv(file, [buffer], at)
            if not count:
                raise CheckpointError(where.path, "damaged: shorter than its header says")
            buffer, at = buffer[count:], at + count
        if not on_host:
            piece.copy_(host, non_blocking=True)  # while the next piece is read; pinned memory is kept until it is done


def _damage(
    stored: dict[tuple[str, str], Stored], manifest: Manifest, wrong: list[tuple[str, str]]
) -> CheckpointError | None:
    """The file whose data is not what was saved, if that is why a digest of the engine is wrong."""
    for kind, name in wrong[:1]:
        where = stored[kind, name]
        recorded = manifest.weights[name] if kind == WEIGHTS else manifest.states[kind][name]
        total = 0
        with where.path.open("rb") as file:
            file.seek(where.position)
            for begin in range(0, where.nbytes, _PIECE_BYTES):
                data = file.read(min(_PIECE_BYTES, where.nbytes - begin))
                total += digest_bytes(np.frombuffer(data, np.uint8), begin)
        if to_hex(total) != recorded:
            return CheckpointError(where.path, f"damaged: {kind} of {name} is not what was saved")
    return None


def _everywhere(condition: bool) -> bool:
    every = [condition] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(every, condition)
    return all(every)
