"""Every memory option leaves loss, gradient norm and weights of every family as they are, in ZeRO 0, 2 and 3."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

import memory_ranks as ranks
import torch
from torch.multiprocessing.spawn import start_processes

PRELOAD = ["memory_ranks", "deepspeed.runtime.zero.muon.original_muon"]
TOLERANCE = 1e-6
#: Gemma's norms store their offset from 1, which starts at 0: their weights count as no smaller than this.
SMALLEST_WEIGHT = 1e-2

#: Nothing stays gathered for its smallness, and what is gathered stays for about one of the model's layers: as with
#: DeepSpeed's defaults (1e9 elements) and a model of billions of parameters.
AS_A_LARGE_MODEL = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 200_000,
    "stage3_max_live_parameters": 200_000,
}


EACH = [option for option in ranks.OPTIONS if option != "none"]
ALL_AT_ONCE = ["alst", "alst_reentrant"]


def run(
    tmp_path: Path, name: str, zero: dict[str, Any], options: list[str], bf16: bool = False
) -> dict[str, dict[str, Any]]:
    multiprocessing.set_forkserver_preload(PRELOAD)
    arguments = (str(tmp_path), name, zero, options, bf16)
    start_processes(ranks.train_with_each_option, arguments, nprocs=ranks.SP, start_method="forkserver")
    return torch.load(tmp_path / "results")


def relative(values: list[float], right: list[float]) -> float:
    return max(abs(value - true) / abs(true) for value, true in zip(values, right, strict=True))


@pytest.mark.parametrize(
    ("name", "stage", "options"),
    [
        ("tiny_llama", 0, EACH),
        ("tiny_llama", 2, EACH),
        ("tiny_llama", 3, EACH),
        ("tiny_llama_tied", 2, ALL_AT_ONCE),
        ("tiny_llama_tied", 3, [*ALL_AT_ONCE, "tiled_loss"]),  # its lm_head belongs to two modules
        ("tiny_mistral", 3, ALL_AT_ONCE),
        ("tiny_qwen3", 3, ALL_AT_ONCE),
        ("tiny_gemma3", 0, ALL_AT_ONCE),
        ("tiny_gemma3", 2, EACH),
        ("tiny_gemma3", 3, ALL_AT_ONCE),
    ],
)
def test_numbers_stay(tmp_path: Path, name: str, stage: int, options: list[str]) -> None:
    zero = AS_A_LARGE_MODEL if stage == 3 else {"stage": stage}
    results = run(tmp_path, name, zero, ["none", *options])
    right = results.pop("none")
    for option, result in results.items():
        assert relative(result["loss"], right["loss"]) <= TOLERANCE, option
        assert relative(result["norm"], right["norm"]) <= TOLERANCE, option
        assert result["weights"].keys() == right["weights"].keys()
        for key, weight in right["weights"].items():
            scale = max(weight.abs().max().item(), SMALLEST_WEIGHT)
            assert (result["weights"][key] - weight).abs().max().item() <= TOLERANCE * scale, (option, key)


def test_tiles_gather_weights_once(tmp_path: Path) -> None:
    """ZeRO 3 keeps a weight that the next tile uses again (`stage3_max_reuse_distance`)."""
    results = run(tmp_path, "tiny_llama", AS_A_LARGE_MODEL, ["none", "tiled_mlp", "tiled_loss"])
    for option in ("tiled_mlp", "tiled_loss"):
        assert results[option]["gathered"] <= 1.1 * results["none"]["gathered"], option


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_tiles_in_bf16_lose_no_gradient(tmp_path: Path, stage: int) -> None:
    """To what bf16 rounds: DeepSpeed reduces each weight's gradient once, with all tiles in it."""
    zero = AS_A_LARGE_MODEL if stage == 3 else {"stage": stage}
    results = run(tmp_path, "tiny_llama", zero, ["none", *ALL_AT_ONCE], bf16=True)
    right = results.pop("none")
    for option, result in results.items():
        assert relative(result["loss"], right["loss"]) <= 1e-3, option
        assert relative(result["norm"], right["norm"]) <= 5e-3, option
        for key, weight in right["weights"].items():
            assert (result["weights"][key] - weight).norm() <= 2e-3 * weight.norm(), (option, key)
