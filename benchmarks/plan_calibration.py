"""Plans beside real runs on this machine: bytes of the all-to-alls, and the peak of tensor memory.

    python benchmarks/plan_calibration.py [--resume]

Each cell trains a tiny model for two optimizer steps in real processes over gloo, under torch's profiler from before
the model is built; the running sum of its memory events is what torch has allocated (scratch inside kernels included,
which a plan does not know). The plan of the same configuration is made for `plan.hardware=cpu`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # for the processes that run and trace

from ulysses_exp.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimConfig  # noqa: E402
from ulysses_exp.launch.task import Task  # noqa: E402
from ulysses_exp.plan.forks import forks  # noqa: E402
from ulysses_exp.plan.planner import Planner  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHOWN = ROOT / "ulysses_exp" / "plan" / "calibration.json"  # with every plan
STEPS = 2
#: To a tiny model what DeepSpeed's defaults are to one of billions of parameters: a bucket holds one and a half of its
#: layers, gathered weights come and go, and nothing stays gathered for its smallness. Sizes in elements.
AS_A_LARGE_MODEL = {
    "reduce_bucket_size": 300_000,
    "stage3_prefetch_bucket_size": 30_000,
    "stage3_max_live_parameters": 400_000,
    "stage3_max_reuse_distance": 400_000,
    "stage3_param_persistence_threshold": 0,
}


@dataclass(frozen=True)
class Cell:
    model: str
    sp: int
    zero: int
    memory: str = "none"
    precision: str = "fp32"
    seq_len: int = 2048
    exchange: str = "fused"
    accumulation: int = 2
    small_buckets: bool = False  # AS_A_LARGE_MODEL

    @property
    def name(self) -> str:
        return (
            f"{self.model} sp{self.sp}-z{self.zero} {self.memory} {self.precision} {self.exchange} {self.seq_len} "
            f"tokens, {self.accumulation} micro steps" + (", small buckets" if self.small_buckets else "")
        )

    @property
    def deepspeed(self) -> dict[str, Any]:
        """Entries of DeepSpeed's configuration that differ from what this project sets."""
        if not self.small_buckets:
            return {}
        return {"zero_optimization": {k: v for k, v in AS_A_LARGE_MODEL.items() if self.zero == 3 or "stage3" not in k}}


def cells() -> list[Cell]:
    """Every layout of heads at sp 2 and 4, all stages; then options one at a time."""
    heads = ("tiny_llama_mha", "tiny_llama", "tiny_llama_mqa")
    return [
        *(Cell(model, sp, zero) for model in heads for sp in (2, 4) for zero in (0, 3)),
        *(Cell("tiny_llama", sp, zero) for sp in (2, 4) for zero in (1, 2)),
        *(Cell("tiny_llama", 1, zero) for zero in (0, 2)),
        *(Cell("tiny_llama", 2, zero, "alst") for zero in (0, 1, 2, 3)),
        *(Cell("tiny_llama", 2, zero, precision="bf16") for zero in (0, 1, 2, 3)),
        Cell("tiny_llama", 2, 2, "checkpointing"),
        Cell("tiny_llama_mqa", 2, 3, exchange="deepspeed"),
        Cell("tiny_mistral_window", 2, 2),
        Cell("tiny_llama", 2, 3, accumulation=4),
        *(Cell("tiny_llama", 2, zero, small_buckets=True) for zero in (1, 2, 3)),
        *(Cell("tiny_llama", 2, 3, memory, "bf16", small_buckets=True) for memory in ("none", "alst")),
    ]


def configuration(cell: Cell) -> Config:
    def read(group: str, name: str) -> dict[str, Any]:
        return yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())

    config = Config()
    config.model = ModelConfig(**read("model", cell.model))
    config.memory = MemoryConfig(**read("memory", cell.memory))
    config.data = DataConfig(name="text")
    config.optim = OptimConfig(name="adamw", lr=1e-3)
    config.sp = replace(config.sp, size=cell.sp, exchange=cell.exchange)
    config.zero = replace(config.zero, stage=cell.zero)
    config.train = replace(
        config.train,
        seq_len=cell.seq_len,
        steps=STEPS,
        precision=cell.precision,
        global_batch_size=cell.accumulation,
    )
    config.launch = replace(config.launch, name="local", timeout_s=60)
    config.device = "cpu"
    return config


def rank(number: int, config: Config, folder: str, deepspeed_entries: dict[str, Any]) -> None:
    """Trains; rank 0 leaves the largest number of bytes that its tensors took at once, and its all-to-alls."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(config.layout.world))
    os.environ.pop("LOCAL_SIZE", None)
    import deepspeed
    import torch
    import torch.distributed as dist

    from ulysses_exp.plan.trace import with_entries
    from ulysses_exp.rank import engine
    from ulysses_exp.rank.session import open_session
    from ulysses_exp.rank.step import optimizer_step
    from ulysses_exp.rank.upstream import without_operators_of_its_own

    settings = engine.deepspeed_config
    engine.deepspeed_config = lambda *about: with_entries(settings(*about), deepspeed_entries)

    torch.set_num_threads(1)
    without_operators_of_its_own()
    wait_for_gloo()
    store = dist.FileStore(f"{folder}/store", config.layout.world)
    dist.init_process_group("gloo", store=store, rank=number, world_size=config.layout.world)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    task = Task("calibration", config, (), Path(folder))
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profiler, open_session(task, number) as session:
        session.engine.train()
        steps = [optimizer_step(session, step) for step in range(STEPS)]
    dist.destroy_process_group()
    if number == 0:
        measured = {
            "peak_bytes": peak_of(profiler),
            "all_to_all_calls": steps[-1].all_to_all_calls,
            "all_to_all_bytes": steps[-1].all_to_all_bytes,
        }
        Path(folder, "measured.json").write_text(json.dumps(measured))


class Released:
    """A collective that is over when gloo's threads have let go of its tensors.

    It is over when its numbers are there; the thread that did the work drops its references a moment later, and the
    profiler does not see what that thread frees. On a GPU there are no such threads.
    """

    def __init__(self, collective: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.tensors = [a for a in (*args, *kwargs.values()) if hasattr(a, "_use_count")]
        self.before = [t._use_count() for t in self.tensors]
        self.work = collective(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)

    def wait(self, *args: Any) -> Any:
        done = None if self.work is None else self.work.wait(*args)
        until = time.monotonic() + 0.1  # it takes microseconds
        while time.monotonic() < until:
            if all(t._use_count() <= n for t, n in zip(self.tensors, self.before, strict=True)):
                break
            time.sleep(1e-5)
        self.tensors = []
        return done


def wait_for_gloo() -> None:
    """Makes the collectives of this process `Released`."""
    import torch.distributed as dist

    def released(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            handle = Released(collective, args, kwargs)
            return handle if handle.work is not None else handle.wait()

        return call

    for name in ("all_to_all_single", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        setattr(dist, name, released(getattr(dist, name)))


def peak_of(profiler: Any) -> int:
    """The largest number of bytes that torch's allocator had handed out at once.

    An address that is handed out again has been given back: gloo's threads free what they have sent, and the profiler
    does not see what they do.
    """
    from torch._C._profiler import _EventType

    events, waiting = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    live: dict[int, int] = {}
    total = peak = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
            peak = max(peak, total)
    return peak


def measure(config: Config, deepspeed_entries: dict[str, Any]) -> dict[str, int]:
    """Runs `config` on real ranks. Raises RuntimeError where one of them fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ulysses_exp.rank.preload", "ulysses_exp.rank.session"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=rank, args=(n, config, folder, deepspeed_entries))
            for n in range(config.layout.world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(180)
            if process.is_alive():
                process.kill()
        if any(process.exitcode != 0 for process in ranks):
            raise RuntimeError(f"ranks ended with {[process.exitcode for process in ranks]}")
        return json.loads(Path(folder, "measured.json").read_text())


def compared(chosen: list[Cell]) -> Iterator[dict[str, Any]]:
    with forks(Config()) as pool:
        for cell in chosen:
            config = configuration(cell)
            # what gloo's threads hold on to can only add; ZeRO 3 gives them work while it goes on, and where there is
            # other work on the machine they may be late elsewhere, too
            runs = [measure(config, cell.deepspeed) for _ in range(4 if cell.zero == 3 else 2)]
            measured = min(runs, key=lambda run: run["peak_bytes"])
            trace = Planner(config, gpu=False, pool=pool, deepspeed=cell.deepspeed).at(cell.seq_len)
            micro = config.accumulation / min(config.accumulation, 2)
            yield {
                "cell": cell.name,
                "zero": cell.zero,
                "predicted_peak_bytes": trace.peak(),
                "measured_peak_bytes": measured["peak_bytes"],
                "relative": trace.peak() / measured["peak_bytes"] - 1,
                "predicted_all_to_all_bytes": round(trace.all_to_all_bytes * micro),
                "measured_all_to_all_bytes": measured["all_to_all_bytes"],
                "predicted_all_to_all_calls": round(trace.all_to_all_calls * micro),
                "measured_all_to_all_calls": measured["all_to_all_calls"],
            }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What every plan shows of its own reliability."""
    return {
        "measured_on": f"CPU and gloo, {date.today()}, torch {version('torch')}, deepspeed {version('deepspeed')}, "
        f"transformers {version('transformers')}",
        "cells": len(rows),
        "max_abs_relative_memory_error": max(abs(r["relative"]) for r in rows),
        "all_to_all_bytes_exact": all(
            r["predicted_all_to_all_bytes"] == r["measured_all_to_all_bytes"]
            and r["predicted_all_to_all_calls"] == r["measured_all_to_all_calls"]
            for r in rows
        ),
        "gpu": "not measured",
    }


def markdown(rows: list[dict[str, Any]], total: dict[str, Any]) -> str:
    lines = [
        "# Plans beside real runs",
        "",
        f"{total['measured_on']}; made by `python benchmarks/plan_calibration.py`, which says how. On a GPU: "
        f"{total['gpu']}.",
        "",
        f"- All-to-all calls and bytes equal in every cell: {'yes' if total['all_to_all_bytes_exact'] else 'NO'}",
        f"- Largest error of the memory peak: {total['max_abs_relative_memory_error']:.2%}",
        "",
        "| cell | peak, MB: predicted | measured | error | all-to-all bytes: predicted | measured |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| {r['cell']} | {r['predicted_peak_bytes'] / 1e6:.2f} | {r['measured_peak_bytes'] / 1e6:.2f} | "
            f"{r['relative']:+.2%} | {r['predicted_all_to_all_bytes']:,} | {r['measured_all_to_all_bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep the cells that are recorded already")
    recorded = RESULTS / "plan_calibration.json"
    rows = json.loads(recorded.read_text())["cells"] if parser.parse_args().resume and recorded.is_file() else []
    done = {row["cell"] for row in rows}
    order = [cell.name for cell in cells()]
    for row in compared([cell for cell in cells() if cell.name not in done]):
        rows.append(row)
        rows.sort(key=lambda r: order.index(r["cell"]))
        total = summary(rows)
        page = markdown(rows, total)
        print(page.splitlines()[-1], flush=True)
        recorded.write_text(json.dumps({"summary": total, "cells": rows}, indent=1))
        recorded.with_suffix(".md").write_text(page)
        SHOWN.write_text(json.dumps(total, indent=1) + "\n")


if __name__ == "__main__":
    main()
