"""What a checkpoint costs beside writing the same bytes with safetensors alone, and beside DeepSpeed's own.

    flock /tmp/measure.lock python benchmarks/checkpoint_io.py [--hidden 640] [--repeats 5]

For each layout, in turns: `checkpoints.save` on its ranks; `checkpoints.begin`, for which training stands still;
`safetensors.torch.save_file` of the same tensors, portable and huggingface alike, by one process that has them all in
memory, synced to disk, after which the last ones are removed; DeepSpeed's `save_checkpoint`, which syncs nothing. Then
the loads. Writes benchmarks/results/checkpoint_io.{json,md}; times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "checkpoints")]
os.environ["PYTHONWARNINGS"] = "ignore"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from checkpoint_ranks import run  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_engine import Recipe, engine, steps  # noqa: E402

from ulysses_exp.layout import Layout  # noqa: E402
from ulysses_exp.rank import checkpoints  # noqa: E402

LAYOUTS = ["sp1-dp1-z0", "sp2-dp1-z0", "sp2-dp1-z1", "sp2-dp1-z2", "sp2-dp1-z3"]


def measure(folder: Path, layout: Layout, recipe: Recipe, repeats: int) -> dict[str, Any]:
    """Seconds of each way, in turns, and peak bytes; collective."""
    rank = dist.get_rank()
    times: dict[str, list[tuple[float, float]]] = {
        k: [] for k in ("save", "begin", "safetensors", "deepspeed_save", "load", "deepspeed_load")
    }
    with engine(layout, recipe) as made:
        steps(made, layout, 0, 1)
        target = folder / "checkpoints" / "step1"
        checkpoints.save(made, target, layout=layout, step=1, state={})  # warms the page cache's allocator
        tensors = {p: load_file(p) for p in sorted(target.rglob("*.safetensors"))} if rank == 0 else {}
        begin = partial(checkpoints.begin, made, target, layout=layout, step=1, state={})
        for _ in range(repeats):
            times["save"].append(_timed(lambda: begin().wait()))
            begun: list[checkpoints.Saving] = []
            times["begin"].append(_timed(lambda into=begun: into.append(begin())))
            begun[0].wait()
            times["safetensors"].append(_timed(lambda: _write_alone(tensors, folder)))
            times["deepspeed_save"].append(_timed(lambda: made.save_checkpoint(str(folder / "deepspeed"), tag="step")))
        tensors.clear()
        for _ in range(repeats):
            times["load"].append(_timed(lambda: checkpoints.load(made, target, layout=layout)))
            times["deepspeed_load"].append(_timed(lambda: made.load_checkpoint(str(folder / "deepspeed"), tag="step")))
    size = sum(p.stat().st_size for p in target.rglob("*.safetensors"))
    return {"layout": layout.name, "bytes": size, "seconds": times}


def _write_alone(tensors: dict[Path, dict[str, Any]], folder: Path) -> None:
    """All or nothing, as a checkpoint: the set of files before goes when the new one is on disk."""
    if not tensors:  # another rank
        return
    new, old = folder / "alone.new", folder / "alone"
    new.mkdir()
    for number, content in enumerate(tensors.values()):
        path = new / f"{number}.safetensors"
        save_file(content, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)
    new.rename(old)


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of processor time of all ranks, which other programs on the machine disturb less.

    What was written before is on disk by then: DeepSpeed's save leaves its pages for whoever syncs next.
    """
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()
    began, busy = time.perf_counter(), time.process_time()
    work()
    mine = torch.tensor(time.process_time() - busy, dtype=torch.float64)
    dist.all_reduce(mine)
    return time.perf_counter() - began, float(mine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint_io")
    arguments = parser.parse_args()
    recipe = Recipe(hidden=arguments.hidden, layers=3, vocabulary=4096)
    rows = []
    for name in arguments.layouts.split(","):
        layout = Layout.parse(name)
        (ROOT / "outputs").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "outputs") as folder:  # /tmp may be memory
            rows.append(run(layout.world, measure, Path(folder), layout, recipe, arguments.repeats, timeout=900)[0])
        print(_line(rows[-1]), flush=True)
    report = {
        "rows": rows, "cores": os.cpu_count(), "hidden": arguments.hidden, "repeats": arguments.repeats,
        "versions": {n: version(n) for n in ("torch", "deepspeed", "safetensors")},
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    head = [
        "# What a checkpoint costs", "",
        f"`python benchmarks/checkpoint_io.py`: medians of {arguments.repeats}, in turns, {os.cpu_count()} cores, "
        "fp32, AdamW; ratio: median of the pairs', and of the fastest of each. `save` writes portable and huggingface, "
        "computes all digests and syncs to disk; training stands still for the time under `still`, the rest goes on in "
        "the background; `safetensors` is one process that writes the same bytes from its "
        "memory, syncs them and removes those before; DeepSpeed's files are not synced.", "",
        "| layout | MB | save, s | still, s | safetensors, s | ratio | of the fastest | processor time, s | "
        "DeepSpeed save, s | load, s | "
        "DeepSpeed load, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    arguments.out.with_suffix(".md").write_text("\n".join([*head, *map(_line, rows)]) + "\n")
    return 0


def _line(row: dict[str, Any]) -> str:
    clock = {name: [wall for wall, _ in values] for name, values in row["seconds"].items()}
    busy = {name: statistics.median(cpu for _, cpu in values) for name, values in row["seconds"].items()}
    t = {name: statistics.median(values) for name, values in clock.items()}
    ratio = statistics.median(a / b for a, b in zip(clock["save"], clock["safetensors"], strict=True))
    fastest = min(clock["save"]) / min(clock["safetensors"])
    return (
        f"| {row['layout']} | {row['bytes'] / 1e6:.0f} | {t['save']:.2f} | {t['begin']:.2f} | {t['safetensors']:.2f} | "
        f"{ratio:.2f} | {fastest:.2f} | {busy['save']:.2f} : {busy['safetensors']:.2f} | {t['deepspeed_save']:.2f} | "
        f"{t['load']:.2f} | {t['deepspeed_load']:.2f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
