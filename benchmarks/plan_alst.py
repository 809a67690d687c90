"""The longest sequences that ALST publishes for Llama 3.1 8B on H100 80 GB, beside those that the plan predicts.

    python benchmarks/plan_alst.py [--rows 8-all ...]

Published: Arctic Long Sequence Training (arXiv 2506.13996), the feature ablation on 8 GPUs and the maxima on 1, 8 and
32 GPUs. Settings, and what nvidia-smi showed at some lengths, from the recipes beside it (snowflakedb/ArcticTraining,
projects/sequence-parallelism/run-h?00-*.yml): ZeRO 3, optimizer states in host memory, gradients reduced in bf16, micro
batch 1, FlashAttention 2, every layer checkpointed; on 1 GPU the weights in host memory too. All but the baselines load
Liger's kernels: planned with transformers' own modules, which is what this project trains, and with Liger's allocations
(plan_alst_kernels.py). Nothing is fitted: a row that is off says by which component. Rows are recorded as they come,
`--rows` makes some of them anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])  # for the processes that trace

from plan_alst_kernels import liger  # noqa: E402

from ulysses_exp.config import Config, MemoryConfig, ModelConfig, OptimConfig  # noqa: E402
from ulysses_exp.config.hardware import GIB, load  # noqa: E402
from ulysses_exp.plan.forks import Forks, forks  # noqa: E402
from ulysses_exp.plan.planner import Planner  # noqa: E402
from ulysses_exp.plan.step_time import step_time, work  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"

HIDDEN, VOCABULARY = 4096, 128256
#: run-h100-*.yml; DeepSpeed's default reduces gradients in fp32 under sequence parallelism
RECIPE = {"seq_parallel_communication_data_type": "bf16"}


@dataclass(frozen=True)
class Row:
    """A row of the paper. `published` in tokens, `seconds` an iteration."""

    key: str
    what: str
    gpus: int
    sp: int
    published: int
    seconds: int | None = None
    reported_gb: float | None = None  # of the GPU's memory in use at `published`, where a recipe says so
    hardware: str = "h100"
    liger: bool = False  # with the kernels of the recipe, else with transformers' own modules
    tiled_loss: bool = True
    tiled_mlp: bool = False
    offload_activations: bool = False
    offload_parameters: bool = False


ROWS = (
    Row("8-baseline", "8 GPUs, baseline", 8, 1, 32_000, 17, tiled_loss=False),
    Row("8-loss", "8 GPUs, + tiled loss", 8, 1, 160_000),
    Row("8-ulysses", "8 GPUs, + Ulysses", 8, 8, 1_100_000),
    Row("8-mlp", "8 GPUs, + tiled MLP", 8, 8, 1_200_000, tiled_mlp=True),
    Row("8-offload", "8 GPUs, + activation offload, no tiled MLP", 8, 8, 2_400_000, offload_activations=True),
    Row("8-all", "8 GPUs, all", 8, 8, 3_700_000, 6455, tiled_mlp=True, offload_activations=True),
    Row("1-baseline", "1 GPU, baseline", 1, 1, 32_000, reported_gb=71.91, tiled_loss=False, offload_parameters=True),
    Row("1-all", "1 GPU, all", 1, 1, 500_000, tiled_mlp=True, offload_activations=True, offload_parameters=True),
    Row("32-all", "32 GPUs, all", 32, 32, 15_000_000, tiled_mlp=True, offload_activations=True),
)


#: Lengths at which the recipes for one H200 say how much memory is in use; their attention is FlashAttention 3.
REPORTED = (
    Row(
        "h200-baseline", "1 H200, baseline", 1, 1, 65_000, None, 137.36, "h200",
        tiled_loss=False, offload_parameters=True,
    ),
    Row("h200-loss", "1 H200, + tiled loss", 1, 1, 300_000, None, 134.96, "h200", offload_parameters=True),
    Row(
        "h200-offload", "1 H200, + activation offload", 1, 1, 650_000, None, 126.81, "h200",
        offload_activations=True, offload_parameters=True,
    ),
    Row(
        "h200-all", "1 H200, all", 1, 1, 1_200_000, None, 136.15, "h200",
        tiled_mlp=True, offload_activations=True, offload_parameters=True,
    ),
)  # fmt: skip


#: All but the baselines, as this project does not run them: with the kernels that the recipes load.
WITH_LIGER = tuple(replace(row, key=f"{row.key}-liger", liger=True) for row in (*ROWS, *REPORTED) if row.tiled_loss)


def configuration(row: Row) -> Config:
    """`row` in this project's terms. Tile sizes are ALST's: an MLP tile has as many tokens as the model is wide
    (deepspeed/runtime/sequence_parallel/ulysses_sp.py, TiledMLP's recipe), the loss vocabulary / width tiles, as in
    Liger's fused cross-entropy (its docstring's inc_factor)."""
    model = yaml.safe_load((ROOT / "conf" / "model" / "llama3_8b.yaml").read_text())
    local = row.published // row.sp
    config = Config()
    config.model = ModelConfig(**model)
    config.sp = replace(config.sp, size=row.sp, exchange="deepspeed")
    config.dp = replace(config.dp, size=row.gpus // row.sp)
    config.zero = replace(config.zero, stage=3, offload_optimizer=True, offload_parameters=row.offload_parameters)
    config.memory = MemoryConfig(
        name="alst",
        checkpointing="non_reentrant",
        offload_activations=row.offload_activations,
        tiled_mlp=math.ceil(local / HIDDEN) if row.tiled_mlp else 0,
        tiled_loss=math.ceil(VOCABULARY / HIDDEN) if row.tiled_loss else 0,
        loss_in_place=False,
    )
    config.optim = OptimConfig(name="adamw")
    config.train = replace(
        config.train,
        seq_len=row.published,
        precision="bf16",
        micro_batch_size=1,
        global_batch_size=config.dp.size,
    )
    config.launch = replace(config.launch, name="attached")
    return config


def predict(row: Row, pool: Forks) -> dict[str, Any]:
    """`row` with what the plan says of it; sizes in bytes, times in seconds."""
    began = time.perf_counter()
    hardware = load(row.hardware)
    config = configuration(row)
    planner = Planner(config, gpu=True, pool=pool, deepspeed=RECIPE, within=liger if row.liger else nullcontext)
    planner.begin(row.published)
    longest = planner.longest(256 * row.sp, hardware.budget, hardware.host_budget(row.gpus))
    trace = planner.at(row.published)
    phase = max(trace.device, key=trace.peak)
    (operations,) = pool.map(work, [config])
    seconds = step_time(config, hardware, trace, operations)
    return {
        **asdict(row),
        "predicted": longest,
        "relative": longest / row.published - 1,
        "peak_bytes_at_published": trace.peak(),
        "by_kind": trace.device[phase],
        "peak_is_in": phase,
        "budget_bytes": hardware.budget,
        "reserved_bytes": int(hardware.reserved_gib * GIB),
        "host_bytes_per_rank": max(sum(kinds.values()) for kinds in trace.host.values()),
        "host_budget_bytes_per_rank": hardware.host_budget(row.gpus),
        "predicted_seconds": None if seconds is None else seconds.total,
        "tiles": {"mlp": config.memory.tiled_mlp, "loss": config.memory.tiled_loss},
        "traced_layers": [trace.layers],
        "planning_seconds": time.perf_counter() - began,
    }


def table(rows: list[dict[str, Any]], with_liger: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| setting | published | predicted | difference | peak at the published length | with Liger's kernels | "
        "iteration: published | predicted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        fused = with_liger.get(f"{r['key']}-liger")
        lines.append(
            f"| {r['what']} | {r['published']:,} | {r['predicted']:,} | {r['relative']:+.1%} | "
            f"{r['peak_bytes_at_published'] / GIB:.1f} of {r['budget_bytes'] / GIB:.1f} GiB | "
            f"{'' if fused is None else format(fused['predicted'], ',')} | "
            f"{'' if r['seconds'] is None else format(r['seconds'], ',') + ' s'} | {r['predicted_seconds']:,.0f} s |"
        )
    return lines


def components(rows: list[dict[str, Any]]) -> list[str]:
    kinds = ("parameters", "gathered_parameters", "gradients", "optimizer", "buffers", "activations")
    lines = ["| setting | " + " | ".join(k.replace("_", " ") for k in kinds) + " | host memory a rank |"]
    lines.append("| --- |" + " ---: |" * (len(kinds) + 1))
    for r in rows:
        cells = [f"{r['by_kind'].get(kind, 0) / GIB:.2f}" for kind in kinds]
        lines.append(f"| {r['what']} | {' | '.join(cells)} | {r['host_bytes_per_rank'] / GIB:.1f} |")
    return lines


def reported(rows: list[dict[str, Any]], with_liger: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| setting | tokens | in use, GB: reported | predicted | with Liger's kernels |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]

    def in_use(r: dict[str, Any] | None) -> str:
        return "" if r is None else f"{(r['peak_bytes_at_published'] + r['reserved_bytes']) / 1e9:.1f}"

    for r in rows:
        lines.append(
            f"| {r['what']} | {r['published']:,} | {r['reported_gb']:.1f} | {in_use(r)} | "
            f"{in_use(with_liger.get(r['key'] + '-liger'))} |"
        )
    return lines


def written(results: dict[str, dict[str, Any]]) -> str:
    """The recorded rows as a page."""
    maxima = [results[row.key] for row in ROWS if row.key in results]
    notes = RESULTS / "plan_alst_notes.md"
    text = [
        "# Published and predicted: the longest sequences of ALST",
        "",
        "Llama 3.1 8B, H100 80 GB, ZeRO 3, optimizer states in host memory, bf16, micro batch 1, FlashAttention 2;",
        "made by `python benchmarks/plan_alst.py`, which also says where the settings are from.",
        "",
        *table(maxima, results),
        "",
        "## What fills the device at the published length, in GiB",
        "",
        *components(maxima),
        "",
        "## Memory in use that the recipes report",
        "",
        "As nvidia-smi shows it: with what the allocator keeps in reserve, the CUDA context and NCCL.",
        "",
        *reported([results[r.key] for r in (*ROWS, *REPORTED) if r.key in results and r.reported_gb], results),
        "",
        *(notes.read_text().splitlines() if notes.is_file() else []),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {row.key: row for row in (*ROWS, *REPORTED, *WITH_LIGER)}
    parser.add_argument("--rows", nargs="*", choices=list(rows), default=list(rows), help="default: all")
    chosen = parser.parse_args().rows
    recorded = RESULTS / "plan_alst.json"
    results = json.loads(recorded.read_text()) if recorded.is_file() else {}
    with forks(Config()) as pool:
        for key in chosen:
            results[key] = predict(rows[key], pool)
            print(table([results[key]], {})[-1], f"({results[key]['planning_seconds']:.0f} s)", flush=True)
            recorded.write_text(json.dumps(results, indent=1))
            (RESULTS / "plan_alst.md").write_text(written(results))


if __name__ == "__main__":
    main()
