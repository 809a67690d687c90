"""Stage `reload`, the part of the parent: a cell a target layout, and one for transformers alone."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from ulysses_exp.experiment.job import Job
from ulysses_exp.launch import RankFailure, Task
from ulysses_exp.layout import REFERENCE, Layout
from ulysses_exp.stages.reload.judgement import CONTINUATION_TOLERANCE, judged
from ulysses_exp.stages.reload.source import Source, comparison_source

log = logging.getLogger("ulysses_exp")


def run(job: Job, note: Callable[[str], None]) -> None:
    """A task a target layout, and transformers alone on the exported weights."""
    job.needs("train")
    source = comparison_source(job, note)
    cells = []
    targets = [Layout.parse(name) for name in job.config.reload.layouts or ()]
    with _transformers_alone(job, source) as alone:
        for number, target in enumerate(targets, 1):
            note(f"reload {source.layout} -> {target} ({number}/{len(targets)})")
            cells.append({"source": source.layout.name, "target": target.name, **_reload_cell(job, source, target)})
        note(f"reload {source.layout} -> one process, transformers alone")
        cells.append({"source": source.layout.name, "target": REFERENCE.name, **_huggingface_cell(job, alone)})
    failed = [cell for cell in cells if cell["status"] != "ok"]
    stage = {"status": "failed" if failed else "ok", "checkpoint": str(source.checkpoint), "cells": cells}
    if failed:
        stage["reason"] = f"{len(failed)} of {len(cells)} cells: {failed[0]['target']}: {failed[0]['reason']}"
    job.take("reload", stage)


def _reload_cell(job: Job, source: Source, target: Layout) -> dict[str, Any]:
    options = {
        "checkpoint": str(source.checkpoint),
        "trust_pickle": job.config.checkpoint.trust_pickle,
        "model_seed": job.config.seed + 1,  # other weights: a load that loads nothing cannot pass
    }
    task = Task(f"reload-{target.name}", job.config.at(target), ("reload",), job.folder, options)
    began = time.perf_counter()
    try:
        cell = job.do(task, "reload")
    except RankFailure as error:
        log.error("reload %s failed: %s\n%s", target, error, error.trace)
        return {"route": "portable", "status": "failed", "reason": str(error), "weights_bit_exact": None,
                "optimizer_bit_exact": None, "seconds": time.perf_counter() - began}  # fmt: skip
    return judged(cell, source.continuation, CONTINUATION_TOLERANCE[job.config.train.precision])


def after_training(job: Job, note: Callable[[str], None]) -> tuple[tuple[str, ...], dict[str, Any]] | None:
    """The engine that has trained goes on for a few steps, which the cells are compared with."""
    return (("continuation",), {}) if job.config.reload.steps else None


@contextlib.contextmanager
def _transformers_alone(job: Job, source: Source) -> Iterator[subprocess.Popen[str]]:
    """A fresh process in which deepspeed cannot be imported. It imports what it needs, for seconds, and waits."""
    out = job.folder / "ranks" / "huggingface.json"
    out.parent.mkdir(exist_ok=True)
    command = [
        sys.executable, "-P", "-m", "ulysses_exp.rank.checkpoints.huggingface_check", str(source.checkpoint),
        "--out", str(out), "--wait",
    ]  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _huggingface_cell(job: Job, process: subprocess.Popen[str]) -> dict[str, Any]:
    """`from_pretrained` in the process that waits for it."""
    began = time.perf_counter()
    out = job.folder / "ranks" / "huggingface.json"
    _, errors = process.communicate("go\n")
    seconds = time.perf_counter() - began
    if process.returncode:
        log.error("reload by from_pretrained failed:\n%s", errors)
        reason = (errors.strip().splitlines() or ["no message"])[-1]
        return {"route": "huggingface", "status": "failed", "reason": reason, "weights_bit_exact": None,
                "optimizer_bit_exact": None, "seconds": seconds}  # fmt: skip
    result = json.loads(out.read_text())
    problems = []
    if not result["weights_bit_exact"]:
        problems.append("the weights that from_pretrained loads are not those that were trained")
    if changes := result.get("config_changed"):
        problems.append(f"huggingface/config.json is not as it was saved ({'; '.join(changes)})")
    if (logits := result.get("logits")) not in ("ok", "not recorded"):
        although = ", although the weights are equal" if result["weights_bit_exact"] else ""
        problems.append(f"{logits}{although}")
    cell = {
        "route": "huggingface",
        "status": "failed" if problems else "ok",
        "optimizer_bit_exact": None,
        "seconds": seconds,
        **result,
    }
    if problems:
        cell["reason"] = "; ".join(problems)
    return cell
