"""Every layout's checkpoint opened in every layout: 24 x 24 cells, beside what DeepSpeed's load_checkpoint does.

    python benchmarks/reload_matrix.py [--layouts sp1-dp1-z0,sp2-dp1-z3,...] [--out benchmarks/results/reload_matrix]

A cell is good where fp32 weights and AdamW states are bit-exact, by digests of the live engines, and the next three
losses are those of the uninterrupted run at the source's layout to 1e-6 relative. Writes .json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
os.environ.pop("LOCAL_SIZE", None)

import reload_matrix_ranks as ranks  # noqa: E402

from ulysses_exp.config import Config, resolve  # noqa: E402
from ulysses_exp.config.composing import composed  # noqa: E402
from ulysses_exp.layout import Layout  # noqa: E402

TOLERANCE = 1e-6  # relative
OVERRIDES = [
    "device=cpu", "stages=[train]", "tracker.mode=disabled", "train.seq_len=32", "train.global_batch_size=4",
    "train.steps=10", "optim=adamw", "optim.schedule=linear", "optim.warmup_steps=2",
    "model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=192",
]  # fmt: skip


def configuration(layout: Layout) -> Config:
    """The experiment in one layout; a changing learning rate, so that a lost schedule shows."""
    where = [f"sp.size={layout.sp}", f"dp.size={layout.dp}", f"zero.stage={layout.zero}"]
    return resolve(composed(OVERRIDES + where)[0])


def run(
    world: int, folder: Path, work: str, chosen: list[Layout], cells: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Runs `work` on `world` ranks; returns what they wrote before they ended or one of them died."""
    configs = [configuration(layout) for layout in chosen if layout.world == world]
    if not configs:
        return []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ulysses_exp.rank.preload"])
    for stale in folder.glob(f"meeting-{work}-{world}-*"):
        stale.unlink()
    arguments = (world, folder, work, configs, cells)
    processes = [context.Process(target=ranks.on_rank, args=(rank, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    while any(p.is_alive() for p in processes):
        if any(p.exitcode for p in processes):  # one died: the others wait for it
            time.sleep(2)
            for process in processes:
                process.kill()
        time.sleep(0.05)
    out = folder / f"{work}-{world}.jsonl"
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def every_plain(world: int, folder: Path, chosen: list[Layout], cells: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """`plain` for all cells, going on after one that takes the ranks down."""
    mine = [(s, t) for s, t in cells if Layout.parse(t).world == world]
    while True:
        done = run(world, folder, "plain", chosen, mine)
        seen = {(r["source"], r["target"]) for r in done}
        rest = [cell for cell in mine if cell not in seen]
        if not rest:
            return done
        with (folder / f"plain-{world}.jsonl").open("a") as file:
            source, target = rest[0]
            file.write(json.dumps({"source": source, "target": target, "error": "the ranks hang or die"}) + "\n")
        mine = rest[1:]
        if not mine:
            return [json.loads(line) for line in (folder / f"plain-{world}.jsonl").read_text().splitlines()]


def judge(result: dict[str, Any], uninterrupted: dict[str, list[float]]) -> dict[str, Any]:
    """Adds the largest relative difference of the losses that follow, and whether the cell is good."""
    after = result.pop("after", None)
    if after is not None:
        reference = uninterrupted[result["source"]]
        result["continuation_max_rel_loss_diff"] = max(abs(a - b) / b for a, b in zip(after, reference, strict=True))
        result["good"] = bool(
            result["weights_bit_exact"]
            and result["optimizer_bit_exact"]
            and result["continuation_max_rel_loss_diff"] <= TOLERANCE
        )
    else:
        result["good"] = False
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", help="short names, with commas; default: all 24")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reload_matrix")
    parser.add_argument("--without-plain", action="store_true", help="leave out DeepSpeed's load_checkpoint")
    arguments = parser.parse_args()
    chosen = [Layout.parse(n) for n in arguments.layouts.split(",")] if arguments.layouts else ranks.layouts()
    names = [layout.name for layout in chosen]
    cells = [(source, target) for target in names for source in names]
    began = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        worlds = sorted({layout.world for layout in chosen})
        saved = {r["source"]: r for world in worlds for r in run(world, folder, "save", chosen, [])}
        missing = set(names) - saved.keys()
        if missing:
            raise SystemExit(f"could not save {sorted(missing)}")
        uninterrupted = {name: r["after"] for name, r in saved.items()}
        print(f"saved {len(saved)} layouts, {time.time() - began:.0f} s", flush=True)
        ours = [judge(r, uninterrupted) for world in worlds for r in run(world, folder, "load", chosen, cells)]
        print(f"loaded {len(ours)} cells, {time.time() - began:.0f} s", flush=True)
        plain = []
        if not arguments.without_plain:
            plain = [judge(r, uninterrupted) for w in worlds for r in every_plain(w, folder, chosen, cells)]
    report = {
        "cells": ours, "plain_load_checkpoint": plain, "sources": list(saved.values()), "layouts": names,
        "tolerance": TOLERANCE, "overrides": OVERRIDES, "seconds": time.time() - began,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    arguments.out.with_suffix(".md").write_text(table(report))
    draw(report, arguments.out.with_suffix(".png"))
    good = sum(cell["good"] for cell in ours)
    print(table(report))
    return 0 if good == len(cells) else 1


def outcome(cell: dict[str, Any]) -> str:
    """One word for what a load came to."""
    if cell["good"]:
        return "exact"
    if "error" in cell:
        return "hangs" if cell["error"] == "the ranks hang or die" else "refused"
    return "wrong"


def table(report: dict[str, Any]) -> str:
    """The matrix in figures."""
    ours, plain = report["cells"], report["plain_load_checkpoint"]
    count = len(report["layouts"]) ** 2
    exact = {key: sum(bool(c.get(key)) for c in ours) for key in ("weights_bit_exact", "optimizer_bit_exact", "good")}
    worst = max((c["continuation_max_rel_loss_diff"] for c in ours), default=float("nan"))
    times = sorted(c["seconds"] for c in ours)
    lines = [
        "# Reload: every layout's checkpoint in every layout", "",
        f"`python benchmarks/reload_matrix.py`: {len(report['layouts'])} layouts, {count} cells, "
        f"{report['seconds']:.0f} s on {report['machine']['cores']} cores; fp32, AdamW, linear schedule, "
        f"{max(s['bytes'] for s in report['sources']) / 2**20:.2f} MiB of state. "
        f"DeepSpeed {report['versions']['deepspeed']}.", "",
        "| | this project | DeepSpeed `load_checkpoint` |", "| --- | --- | --- |",
        f"| cells that go on as if uninterrupted | **{exact['good']} of {count}** | "
        f"{sum(c['good'] for c in plain)} of {len(plain)} |",
        f"| weights bit-exact | {exact['weights_bit_exact']} | "
        f"{sum(bool(c.get('weights_bit_exact')) for c in plain)} |",
        f"| AdamW states bit-exact | {exact['optimizer_bit_exact']} | "
        f"{sum(bool(c.get('optimizer_bit_exact')) for c in plain)} |",
        f"| largest relative difference of the next {ranks.AFTER} losses | {worst:.1e} | |",
        f"| seconds a load, median and largest | {times[len(times) // 2]:.3f}, {times[-1]:.3f} | |",
    ]  # fmt: skip
    for word, number in Counter(outcome(c) for c in plain).most_common():
        lines.append(f"| {word} | {sum(outcome(c) == word for c in ours)} | {number} |")
    kinds = Counter(re.sub(r"'/\S*/(\S+)", r"'.../\1", c["error"])[:110] for c in plain if "error" in c)
    lines += ["", "What `load_checkpoint` raises:", ""]
    lines += [f"- {number} x `{kind}`" for kind, number in kinds.most_common(12)]
    return "\n".join(lines) + "\n\n![heat map](reload_matrix.png)\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Two heat maps, source by target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    words = ["exact", "wrong", "refused", "hangs"]
    colours = ["#2a9d5c", "#c1121f", "#e9c46a", "#6c757d"]
    names = report["layouts"]
    figure, axes = plt.subplots(1, 2, figsize=(15, 8), constrained_layout=True)
    for axis, title, cells in (
        (axes[0], "ulysses_exp.rank.checkpoints.load", report["cells"]),
        (axes[1], "DeepSpeed load_checkpoint", report["plain_load_checkpoint"]),
    ):
        grid = np.full((len(names), len(names)), np.nan)
        for cell in cells:
            grid[names.index(cell["source"]), names.index(cell["target"])] = words.index(outcome(cell))
        axis.imshow(grid, cmap=ListedColormap(colours), vmin=-0.5, vmax=3.5)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xlabel("opened in")
        axis.set_ylabel("saved by")
        good = sum(c["good"] for c in cells)
        axis.set_title(f"{title}: {good} of {len(cells)} go on as if uninterrupted", fontsize=10)
    figure.legend(
        handles=[Patch(color=c, label=w) for c, w in zip(colours, words, strict=True)],
        loc="outside lower center",
        ncols=4,
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
