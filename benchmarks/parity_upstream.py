"""How many layouts DeepSpeed's own recipe gets right: each against a plain torch loop in a single process.

    python benchmarks/parity_upstream.py

Writes benchmarks/results/parity_upstream.json and .md. Five SGD steps without clipping, in fp32, four sequences a step,
no label ignored: the easiest case there is. Tolerance 1e-6, relative: losses and gradient norms to the reference's, a
weight tensor's largest absolute difference to its largest absolute weight.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
os.environ.pop("LOCAL_SIZE", None)
sys.path.extend([str(Path(__file__).resolve().parent / "peers"), str(Path(__file__).resolve().parents[1])])

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.muon.original_muon  # the first ZeRO engine imports it: pay once, before the ranks fork
import numpy as np
import torch
from deepspeed_recipe import train
from job import Job
from torch.multiprocessing.spawn import ProcessException, start_processes
from transformers import AutoConfig, AutoModelForCausalLM

from ulysses_exp.layout import Layout

TOLERANCE = 1e-6
LAYOUTS = [Layout(sp, dp, zero) for sp in (1, 2, 4) for dp in (1, 2, 4) if sp * dp <= 4 for zero in range(4)]
STEPS, BATCH, LENGTH = 5, 4, 64
ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip


def prepare(_: int, folder: str) -> None:
    """Tokens and initial weights."""
    arguments = dict(ARCHITECTURE)
    torch.manual_seed(0)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/weights")
    np.save(f"{folder}/tokens.npy", np.random.default_rng(0).integers(0, 256, (STEPS, BATCH, LENGTH + 1)))


def reference(_: int, job: Job, result: str) -> None:
    """One process, one batch a step, torch alone."""
    torch.set_num_threads(1)
    model = job.model()
    optimizer = job.new_optimizer(model)
    losses, norms = [], []
    for batch in torch.from_numpy(job.read_tokens()):
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        losses.append(loss.item())
        optimizer.step()
    torch.save({"loss": losses, "grad_norm": norms, "weights": model.state_dict()}, result)


def recipe(rank: int, job: Job, result: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "gloo", False, init_method=f"file://{result}.store", rank=rank, world_size=job.sp * job.dp,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    engine, record = train(job)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=job.zero == 3):
        if rank == 0:
            torch.save({**record.result, "weights": engine.module.state_dict()}, result)
    torch.distributed.barrier()


def largest_difference(values: list[float | None], right: list[float]) -> float | None:
    """Relative; None where upstream reports none (the gradient norm of ZeRO 0)."""
    if None in values:
        return None
    return max(abs(value - true) / abs(true) for value, true in zip(values, right, strict=True))


def compare(found: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    weights = max(
        ((found["weights"][name] - weight).abs().max() / weight.abs().max()).item()
        for name, weight in right["weights"].items()
    )
    cell = {
        "max_rel_loss_diff": largest_difference(found["loss"], right["loss"]),
        "max_rel_grad_norm_diff": largest_difference(found["grad_norm"], right["grad_norm"]),
        "max_rel_weight_diff": weights,
        "first_grad_norm_factor": found["grad_norm"][0] and found["grad_norm"][0] / right["grad_norm"][0],
    }
    worst = max(cell[f"max_rel_{what}_diff"] or 0.0 for what in ("loss", "grad_norm", "weight"))
    return {"status": "right" if worst <= TOLERANCE else "wrong", **cell}


def count_right(cells: Iterable[dict[str, Any]]) -> int:
    return sum(cell["status"] == "right" for cell in cells)


def measure() -> dict[str, Any]:
    cells: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        start_processes(prepare, (folder,), nprocs=1, start_method="fork")
        job = {
            "architecture": ARCHITECTURE, "weights": f"{folder}/weights", "tokens": f"{folder}/tokens.npy",
            "lr": 0.1, "optimizer": "sgd", "grad_clip": 0.0, "steps": STEPS, "precision": "fp32",
        }  # fmt: skip
        single = Job(**job, sp=1, dp=1, zero=0)
        start_processes(reference, (single, f"{folder}/reference"), nprocs=1, start_method="fork")
        right = torch.load(f"{folder}/reference")
        for layout in LAYOUTS:
            result = f"{folder}/{layout}"
            try:
                start_processes(
                    recipe, (Job(**job, **asdict(layout)), result), nprocs=layout.world, start_method="fork"
                )
                cells[layout.name] = compare(torch.load(result), right)
            except ProcessException as failure:
                reason = str(failure).strip().splitlines()[-1].split("<")[0].strip()
                cells[layout.name] = {"status": "failed", "reason": reason}
            print(layout, cells[layout.name], flush=True)
    return {
        "tolerance": TOLERANCE,
        "right": count_right(cells.values()),
        "of": len(cells),
        "right_with_sp": count_right(cell for name, cell in cells.items() if Layout.parse(name).sp > 1),
        "of_with_sp": sum(layout.sp > 1 for layout in LAYOUTS),
        "steps": STEPS, "sequences_per_step": BATCH, "sequence_length": LENGTH, "architecture": ARCHITECTURE,
        "versions": {package: version(package) for package in ("torch", "transformers", "deepspeed")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, gloo",
        "cells": cells,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    lines = [
        "# DeepSpeed's own recipe against a single process",
        "",
        f"`python benchmarks/parity_upstream.py`: the tutorial's recipe gets **{result['right']} of {result['of']}** "
        f"layouts right to {result['tolerance']:g}, {result['right_with_sp']} of {result['of_with_sp']} of those with "
        f"sequence parallelism ({result['steps']} SGD steps without clipping, fp32, "
        f"{result['sequences_per_step']} sequences of {result['sequence_length']} tokens a step, no label ignored; "
        f"{versions}; {result['machine']}).",
        "",
        "Largest relative differences over all steps; the factor is first gradient norm / true gradient norm.",
        "",
        "| layout | | loss | gradient norm | weights | factor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cell in result["cells"].items():
        if cell["status"] == "failed":
            lines.append(f"| {name} | failed | {cell['reason']} | | | |")
            continue
        numbers = [cell[f"max_rel_{what}_diff"] for what in ("loss", "grad_norm", "weight")]
        columns = ["not reported" if number is None else f"{number:.1e}" for number in numbers]
        factor = cell["first_grad_norm_factor"]
        columns.append("not reported" if factor is None else f"{factor:.4f}")
        lines.append(f"| {name} | {cell['status']} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    result = measure()
    results = Path(__file__).resolve().parent / "results"
    results.mkdir(exist_ok=True)
    (results / "parity_upstream.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "parity_upstream.md").write_text(table(result))
    print(f"{result['right']} of {result['of']} layouts right")
