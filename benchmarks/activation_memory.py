"""Activation memory per rank at a fixed sequence length: what sequence parallelism is for.

    python benchmarks/activation_memory.py [--length 16384] [--model tiny_llama]

Real ranks train on one sequence at sp 1, 2 and 4. The figure is the highest running sum of torch's allocation events
within the second optimizer step: weights, gradients of before and optimizer states are not in it, everything that a
step adds is. Worst rank. Writes benchmarks/results/activation_memory.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "checkpoints")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from checkpoint_ranks import run  # noqa: E402
from plan_calibration import peak_of, wait_for_gloo  # noqa: E402

from ulysses_exp.config import Config, resolve  # noqa: E402
from ulysses_exp.config.composing import composed  # noqa: E402
from ulysses_exp.launch import Task  # noqa: E402

SIZES = (1, 2, 4)


def configuration(sp: int, length: int, model: str, memory: str) -> Config:
    overrides = [f"sp.size={sp}", "zero.stage=0", f"model={model}", f"memory={memory}", f"train.seq_len={length}",
                 "train.global_batch_size=1", "stages=[train]", "device=cpu"]  # fmt: skip
    return resolve(composed(overrides)[0])


def second_step(config: Config, folder: Path) -> tuple[int, float]:
    """Bytes that the second optimizer step adds at its highest on the worst rank, and its loss. Collective."""
    from ulysses_exp.rank.session import open_session
    from ulysses_exp.rank.step import optimizer_step

    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    wait_for_gloo()
    with open_session(Task("activations", config, (), folder), dist.get_rank()) as session:
        session.engine.train()
        optimizer_step(session, 0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss = optimizer_step(session, 1).loss
    peak = peak_of(profile)
    worst = torch.tensor(peak)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return int(worst), loss


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--model", default="tiny_llama")
    parser.add_argument("--memory", default="none,checkpointing", help="memory groups, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for memory in arguments.memory.split(","):
            alone = 0
            for sp in SIZES:
                config = configuration(sp, arguments.length, arguments.model, memory)
                peak, loss = run(sp, second_step, config, Path(folder), timeout=600)[0]
                alone = alone or peak
                rows.append({"memory": memory, "sp": sp, "bytes": peak, "ratio": peak / alone, "loss": loss})
                print(f"{memory} sp {sp}: {peak / 2**20:,.0f} MiB, {peak / alone:.3f} of sp 1", flush=True)
    report = {"machine": f"{platform.machine()}, CPU, gloo", "length": arguments.length, "model": arguments.model,
              "versions": {n: version(n) for n in ("torch", "deepspeed", "transformers")}, "rows": rows}  # fmt: skip
    (arguments.out / "activation_memory.json").write_text(json.dumps(report, indent=1))
    (arguments.out / "activation_memory.md").write_text(markdown(report))


def markdown(report: dict) -> str:
    """A row a size and memory option."""
    lines = [
        f"# Activation memory at {report['length']:,} tokens",
        "",
        f"{report['model']}, fp32, ZeRO 0, one sequence, sdpa; {report['machine']}; {report['versions']}. What an "
        "optimizer step",
        "adds to weights and optimizer states, worst rank (`python benchmarks/activation_memory.py`).",
        "",
        "| memory | sp | MiB a rank | of sp 1 | limit | loss of the step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in report["rows"]:
        figures = f"{r['bytes'] / 2**20:,.0f} | {r['ratio']:.3f} | {1 / r['sp']:.3f} | {r['loss']:.6f}"
        lines.append(f"| {r['memory']} | {r['sp']} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
