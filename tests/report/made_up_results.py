"""Made-up results in the shape of CONTRACT section 3, with known figures for the report to show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

GIB = 2**30


def results(sp: int = 4, dp: int = 1, zero: int = 3, seq_len: int = 4096, steps: int = 20) -> dict[str, Any]:
    """A job with all stages; its step time grows with the sequence and falls with sp."""
    name = f"sp{sp}-dp{dp}-z{zero}"
    world = sp * dp
    loss = [5.5 * math.exp(-0.03 * i) + 0.02 * math.sin(i) for i in range(steps)]
    compute = 2e-5 * seq_len / world * (1 + seq_len / 16384)
    exchange = 0.0 if sp == 1 else 3e-6 * seq_len / dp
    step = compute + exchange + 0.02 + 0.004 * zero
    memory = int(GIB * (0.4 + seq_len / 4096 * 0.9 / sp + 0.3 / (world if zero else 1)))
    targets = [("sp1-dp1-z0", "huggingface"), ("sp2-dp1-z3", "portable"), ("sp1-dp2-z2", "universal"), (name, "direct")]
    return {
        "schema_version": 1,
        "status": "ok",
        "error": None,
        "layout": {"world": world, "sp": sp, "dp": dp, "zero": zero, "name": name},
        "model": {
            "name": "tiny_llama", "parameters": 852_608, "layers": 4, "hidden": 128, "heads": 8, "kv_heads": 4,
            "attention": "sdpa",
        },
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"},
        "device": "cpu",
        "stages": {
            "train": {
                "status": "ok", "steps": steps, "loss": loss,
                "grad_norm": [1 + 0.1 * math.cos(i) for i in range(steps)],
                "tokens_per_second": seq_len * 4 / step,
                "step_time_s": {"median": step, "p90": step * 1.15},
                "step_split_s": {"compute": compute, "exchange": exchange, "zero": 0.004 * zero, "input": 0.02},
                "model_flops_per_step": 3.1e10, "hardware_flops_per_step": 4.1e10, "mfu": None, "hfu": None,
                "peak_memory_bytes": {"max": memory, "per_rank": [memory - i * 1024 for i in range(world)]},
                "communication": {
                    "all_to_all_calls_per_step": 0 if sp == 1 else 128,
                    "all_to_all_bytes_per_step": 0 if sp == 1 else seq_len * 128 * 4 * 24,
                },
                "checkpoint": f"checkpoints/step{steps}", "weights_identical_across_ranks": True,
            },
            "eval": {
                "status": "ok",
                "bypass": {
                    "loss": 3.2101, "perplexity": math.exp(3.2101), "all_to_all_calls": 0, "tokens_per_second": 9000.0,
                },
                "sp": {
                    "loss": 3.2101, "perplexity": math.exp(3.2101), "all_to_all_calls": 0 if sp == 1 else 16,
                    "tokens_per_second": 9000.0 * world * 0.8,
                },
                "max_abs_logit_diff": 0.0 if sp == 1 else 2.4e-7,
            },
            "reload": {
                "status": "ok",
                "cells": [
                    {
                        "source": name, "target": target, "route": route, "status": "ok", "weights_bit_exact": True,
                        "optimizer_bit_exact": None if route == "huggingface" else True,
                        "continuation_max_abs_loss_diff": 0.0 if route != "universal" else 4.8e-7, "seconds": 1.4,
                    }
                    for target, route in targets
                ],
            },
            "parity": {
                "status": "ok", "reference": "sp1-dp1-z0", "max_rel_loss_diff": 1.4e-8,
                "max_rel_grad_norm_diff": 3.1e-8, "max_rel_weight_diff": 8.8e-9,
            },
            "plan": {
                "status": "ok",
                "peak_memory_bytes_per_rank": {
                    "total": 52 * GIB, "parameters": 15 * GIB, "gradients": 4 * GIB, "optimizer": 12 * GIB,
                    "activations": 21 * GIB,
                },
                "all_to_all_bytes_per_step": 3 * GIB, "fits": True, "max_seq_len": 131072,
                "hardware": "H100 SXM 80 GB", "seq_len": 65536, "settings": "bf16, adamw", "fits_host": True,
                "budget_bytes_per_rank": 77 * GIB, "host_memory_bytes_per_rank": 0, "peak_is_in": "forward_backward",
                "phases": {"forward_backward": {
                    "parameters": 15 * GIB, "gradients": 4 * GIB, "optimizer": 12 * GIB, "activations": 21 * GIB,
                }},
                "at_rest": {"parameters": 15 * GIB, "gradients": 4 * GIB, "optimizer": 12 * GIB},
                "collectives": [
                    {"name": "all_to_all", "ranks": 8, "calls": 128, "bytes_sent": 3 * GIB, "seconds": 0.007},
                ],
                "step_time_s": {
                    "compute": 3.0, "all_to_all": 0.007, "zero": 0.5, "host": 0.0, "total": 3.007, "mfu_bound": 0.41,
                    "communication_share": 0.002,
                },
                "assumptions": ["no fragments"],
                "calibration": {
                    "measured_on": "CPU and gloo", "cells": 44, "all_to_all_bytes_exact": True,
                    "max_abs_relative_memory_error": 0.01, "gpu": "not measured",
                },
            },
        },
    }  # fmt: skip


def write(folder: Path, made: dict[str, Any], seq_len: int = 4096) -> Path:
    """A run folder as a job leaves it: results.json, metrics.jsonl, .hydra/config.yaml."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(f"train:\n  seq_len: {seq_len}\ndata:\n  name: text\n")
    (folder / "results.json").write_text(json.dumps(made))
    train = made["stages"].get("train", {})
    with open(folder / "metrics.jsonl", "w") as lines:
        for i, loss in enumerate(train.get("loss", [])):
            line = {
                "step": i + 1, "train/loss": loss, "train/grad_norm": train["grad_norm"][i],
                "perf/tokens_per_second": train["tokens_per_second"],
                "memory/peak_bytes_max": train["peak_memory_bytes"]["max"],
                "perf/step_time_s": train["step_time_s"]["median"],
            }  # fmt: skip
            lines.write(json.dumps(line) + "\n")
    return folder
