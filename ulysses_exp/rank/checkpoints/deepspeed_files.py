"""A checkpoint that DeepSpeed's `save_checkpoint` wrote in a program of its user's own: pickled, so opened on trust.

This project writes none: the portable format resumes as exactly and as fast at the same layout (benchmarks/results:
checkpoint_io, reload_matrix), and DeepSpeed opens its own in few others.
"""

from __future__ import annotations

import time
from pathlib import Path

import deepspeed

from ulysses_exp.config.received.manifest import CheckpointError
from ulysses_exp.rank.checkpoints.errors import raise_together
from ulysses_exp.rank.checkpoints.loaded import Loaded
from ulysses_exp.rank.checkpoints.progress import go_to


def present(folder: Path) -> bool:
    """Whether `folder` is one of DeepSpeed's, and none of ours."""
    return not (folder / "manifest.json").exists() and any(folder.glob("*_states.pt"))


def load(engine: deepspeed.DeepSpeedEngine, folder: Path, *, trusted: bool) -> Loaded:
    """Opens `folder`, a tag below the `save_dir` of `save_checkpoint`. Collective over the world.

    Its files hold no digests, so nothing is known of what they held when they were saved.

    Raises:
        CheckpointError: not trusted, or DeepSpeed does not open it in this layout.
    """
    if not trusted:
        raise CheckpointError(
            folder, "holds pickled files, which can execute code; set checkpoint.trust_pickle=true if you trust them"
        )
    began = time.perf_counter()
    error = None
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.basic_optimizer.param_groups]
    rates = list(engine.lr_scheduler.base_lrs) if engine.lr_scheduler is not None else []
    try:
        # never load_module_only: under ZeRO 3 it loads nothing and says nothing (docs/findings.md)
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            error = CheckpointError(folder, "is no checkpoint that DeepSpeed can open")
    except Exception as failure:
        problem = " ".join(str(failure).split())[:120] or type(failure).__name__
        error = CheckpointError(folder, f"DeepSpeed opens it in the layout that wrote it, not in this one ({problem})")
    raise_together(error)
    for group, own in zip(engine.basic_optimizer.param_groups, groups, strict=True):
        group.update(own)  # as this job is configured, whatever was saved
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.base_lrs = rates
        go_to(engine, engine.global_steps)
    return Loaded(
        route="direct",
        step=engine.global_steps,
        state={},
        seconds=time.perf_counter() - began,
        bytes=sum(file.stat().st_size for file in folder.glob("*_states.pt")),
        weights_bit_exact=None,
        optimizer_bit_exact=None,
    )
