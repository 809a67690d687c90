"""What each memory saver costs and what it makes room for, at one layout.

    python benchmarks/memory_ladder.py [--tokens 4096] [--memory-gib 0.125] [key=value ...]

Three sweeps over `memory`: `experiment=memory_ladder` trains at one length and runs each rung's parity stage, and again
its parity alone in bf16; `experiment=max_seq_len` searches the longest sequence that trains in `--memory-gib` a rank.
What else is given overrides all. Writes benchmarks/results/memory_ladder.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

from ulysses_exp.report.style import COLOURS, HATCHES, RC, figure  # noqa: E402
from ulysses_exp.report.units import of_bytes, of_seconds  # noqa: E402

RUNGS = ("none", "checkpointing", "tiled_loss", "tiled_mlp", "alst")
ADDED = {
    "none": "every activation kept",
    "checkpointing": "+ layers recomputed",
    "tiled_loss": "+ logits and loss in tiles",
    "tiled_mlp": "+ MLP in tiles",
    "alst": "+ layers' inputs in host memory",
}
LAYOUT = ["sp.size=2", "zero.stage=3", "data=synthetic", "device=cpu", "tracker.mode=disabled"]


def sweep(folder: Path, name: str, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """Results of a sweep over the rungs, by rung."""
    command = [sys.executable, str(ROOT / "run.py"), "-m", f"sweep.name={name}", f"memory={','.join(RUNGS)}"]
    subprocess.run([*command, *LAYOUT, *overrides], cwd=folder, check=True)
    runs = folder / "outputs" / "sweeps" / name
    return {rung: json.loads((runs / f"memory={rung}" / "results.json").read_text()) for rung in RUNGS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--memory-gib", type=float, default=0.125)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory_ladder")
    parser.add_argument("overrides", nargs="*", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fixed = sweep(
            folder, "ladder",
            ["experiment=memory_ladder", f"train.seq_len={arguments.tokens}", "train.steps=5", "optim=sgd",
             *arguments.overrides],
        )  # fmt: skip
        in_bf16 = sweep(
            folder, "bf16",
            ["experiment=memory_ladder", "stages=[parity]", f"train.seq_len={arguments.tokens}", "optim=sgd",
             "train.precision=bf16", *arguments.overrides],
        )  # fmt: skip
        searched = sweep(
            folder, "longest",
            ["experiment=max_seq_len", f"longest.memory_gib={arguments.memory_gib}", *arguments.overrides],
        )  # fmt: skip
    rows = [
        row(rung, fixed[rung]["stages"], in_bf16[rung]["stages"]["parity"], searched[rung]["stages"]["train"])
        for rung in RUNGS
    ]
    report = {
        "rows": rows, "tokens": arguments.tokens, "memory_gib": arguments.memory_gib, "overrides": arguments.overrides,
        "layout": fixed["none"]["layout"]["name"], "model": fixed["none"]["model"], "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }  # fmt: skip
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    picture(rows, arguments.out.with_suffix(".png"), arguments.tokens)
    arguments.out.with_suffix(".md").write_text(document(report, arguments.out.name))
    print(document(report, arguments.out.name))


def row(rung: str, fixed: dict[str, Any], bf16: dict[str, Any], searched: dict[str, Any]) -> dict[str, Any]:
    parity = fixed["parity"]
    names = ("max_rel_loss_diff", "max_rel_grad_norm_diff", "max_rel_weight_diff")
    return {
        "memory": rung,
        "step_time_s": fixed["train"]["step_time_s"]["median"],
        "peak_memory_bytes": fixed["train"]["peak_memory_bytes"]["max"],
        "loss": fixed["train"]["loss"][-1],
        "parity": parity["status"],
        "parity_max_rel": max(parity[name] for name in names),
        "parity_bf16": bf16["status"],
        "parity_bf16_max_rel": {name: bf16[name] for name in names},
        "max_seq_len": searched["max_seq_len"],
        "shortest_failed": searched["shortest_failed"],
    }


def document(report: dict[str, Any], name: str) -> str:
    rows, least = report["rows"], report["rows"][0]
    lines = [
        "# The memory ladder", "",
        f"`python benchmarks/memory_ladder.py`: {report['model']['name']}, {report['layout']}, fp32, one sequence a "
        f"step, {report['cores']} cores. Step time, memory (the process's high-water mark, libraries included) and "
        f"parity with SGD, also of runs in bf16, at {report['tokens']:,} tokens; the longest sequence that trains "
        f"where model, engine and activations of a rank have {of_bytes(report['memory_gib'] * 2**30)}. Each rung adds "
        "to the one above it.", "",
        "| memory | | longest sequence | of none | step | of none | worst rank's memory | parity, largest relative "
        "| parity in bf16: loss, gradient norm, weights |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| `{r['memory']}` | {ADDED[r['memory']]} | {r['max_seq_len']:,} | "
            f"{r['max_seq_len'] / least['max_seq_len']:.2f} | {of_seconds(r['step_time_s'])} | "
            f"{r['step_time_s'] / least['step_time_s']:.2f} | {of_bytes(r['peak_memory_bytes'])} | "
            f"{r['parity']}, {r['parity_max_rel']:.1e} | "
            f"{r['parity_bf16']}, " + ", ".join(f"{value:.1e}" for value in r["parity_bf16_max_rel"].values()) + " |"
            for r in rows
        ),
        "", "On CPU host and device memory are one, so `alst`'s last rung moves inputs from one part of it to another.",
        "", f"![the ladder]({name}.png)", "",
        "Versions: " + ", ".join(f"{n} {v}" for n, v in report["versions"].items()) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path, tokens: int) -> None:
    with matplotlib.rc_context(RC):
        canvas = figure(9.5, 1.1 + 0.34 * len(rows))
        panels = canvas.subplots(1, 2, sharey=True)
        what = (
            ("max_seq_len", "longest sequence that trains (tokens)", lambda value: f"{value:,}"),
            ("step_time_s", f"seconds per optimizer step at {tokens:,} tokens, median", of_seconds),
        )
        for index, (axes, (key, label, text)) in enumerate(zip(panels, what, strict=True)):
            sizes = [r[key] for r in rows]
            axes.barh(
                range(len(rows)), sizes, height=0.7, color=COLOURS[index], hatch=HATCHES[index], edgecolor="white"
            )
            for place, size in enumerate(sizes):
                axes.annotate(" " + text(size), (size, place), va="center", fontsize=8)
            axes.set_xlim(0, max(sizes) * 1.2)
            axes.set_xlabel(label)
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(list(range(len(rows))), [f"{r['memory']}: {ADDED[r['memory']]}" for r in rows])
        panels[0].invert_yaxis()
        canvas.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
