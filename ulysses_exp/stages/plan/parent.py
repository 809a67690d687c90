"""Stage `plan`: what a layout needs and takes on a machine that is not here. Starts no ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ulysses_exp.plan
from ulysses_exp.config import Config, ConfigError
from ulysses_exp.config.hardware import Hardware, load
from ulysses_exp.config.tiles import tiles_of
from ulysses_exp.experiment.job import Job, StageFailure
from ulysses_exp.plan.forks import TraceError, forks
from ulysses_exp.plan.planner import Planner
from ulysses_exp.plan.step_time import ASSUMPTIONS, Work, collectives, step_time, work
from ulysses_exp.plan.trace import Trace

_MEMORY_ASSUMPTIONS = (
    "tensors as DeepSpeed, transformers and this project allocate them on rank 0, found by running their code on "
    "tensors without memory; torch's allocator keeps no fragments (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)",
    "every sequence is one document without padding",
    "attention allocates what FlashAttention 2 does; sp.attention is not asked",
    "hardware.reserved_gib of the device are taken by the CUDA context and NCCL",
)


def run(job: Job, note: Callable[[str], None]) -> None:
    """The plan of the job's layout."""
    try:
        result = plan(job.config)
    except (TraceError, ConfigError) as error:
        raise StageFailure(str(error)) from error
    job.take("plan", result)
    job.results["model"]["parameters"] = job.results["model"]["parameters"] or result["parameters"]


def plan(config: Config) -> dict[str, Any]:
    """The `plan` entry of results.json. Takes seconds to a minute; needs neither a GPU nor the model's weights.

    Raises:
        ConfigError: plan.hardware names no file in conf/hardware.
        TraceError: the model, layout or memory options do not run.
    """
    hardware = load(config.plan.hardware)
    with forks(config) as pool:
        planner = Planner(config, gpu=hardware.is_gpu, pool=pool)
        planner.begin(config.train.seq_len)
        (operations,) = pool.map(work, [config])
        longest = None
        if config.plan.search:
            longest = planner.longest(_step(config), hardware.budget, hardware.host_budget(config.layout.world))
        trace = planner.at(config.train.seq_len)
    return entry(config, hardware, trace, operations, longest)


def _step(config: Config) -> int:
    """Lengths that the search considers: whole tiles of a matrix product on every rank."""
    return config.layout.sp * (256 if config.train.seq_len >= 256 * config.layout.sp * 16 else 1)


def entry(config: Config, hardware: Hardware, trace: Trace, operations: Work, longest: int | None) -> dict[str, Any]:
    """What results.json says of a plan."""
    scaled = _scaled(trace, config.accumulation)
    time = step_time(config, hardware, scaled, operations)
    phase = max(trace.device, key=trace.peak)
    kinds = {kind: size for kind, size in trace.device[phase].items() if size}
    memory = {kind: kinds.get(kind, 0) for kind in ("parameters", "gradients", "optimizer", "activations")}
    memory |= {kind: size for kind, size in kinds.items() if kind not in memory}
    host = {phase: sum(kinds.values()) for phase, kinds in trace.host.items()}
    host_start = host.pop("start", 0)  # of rank 0, which alone has the whole model there
    host_peak = max(host.values(), default=0)
    host_fits = host_peak <= hardware.host_budget(config.layout.world) and host_start <= hardware.host_memory
    result: dict[str, Any] = {
        "status": "ok",
        "hardware": hardware.name,
        "seq_len": config.train.seq_len,
        "settings": _settings(config),
        "peak_memory_bytes_per_rank": {"total": sum(memory.values()), **memory},
        "peak_is_in": phase,
        "phases": trace.device,
        "at_rest": trace.rest,
        "budget_bytes_per_rank": hardware.budget,
        "host_memory_bytes_per_rank": host_peak,
        "host_memory_bytes_at_start": host_start,
        "fits": sum(memory.values()) <= hardware.budget and host_fits,
        "fits_host": host_fits,
        "parameters": trace.parameters,
        "all_to_all_calls_per_step": scaled.all_to_all_calls,
        "all_to_all_bytes_per_step": scaled.all_to_all_bytes,
        "collectives": [asdict(c) for c in collectives(scaled, hardware)],
        "host_copies_bytes_per_step": scaled.host_copies,
        "model_flops_per_step": operations.model,
        "hardware_flops_per_step": operations.hardware,
        "step_time_s": None if time is None else asdict(time),
        "mfu_bound": None if time is None else time.mfu_bound,
        "communication_share": None if time is None else time.communication_share,
        "traced_layers": [trace.layers],
        "assumptions": [*_MEMORY_ASSUMPTIONS, *(ASSUMPTIONS if time is not None else ())],
        "calibration": calibration(),
    }
    if longest is not None:
        result["max_seq_len"] = longest
    return result


def _settings(config: Config) -> str:
    """In words, what besides the layout decides about memory and time."""
    zero, memory, train = config.zero, config.memory, config.train
    parts = [train.precision, config.optim.name]
    if offloaded := [name for name in ("optimizer", "parameters") if getattr(zero, f"offload_{name}")]:
        parts.append(f"{' and '.join(offloaded)} in host memory")
    if memory.checkpointing != "none":
        parts.append("recomputation" + (" from host memory" if memory.offload_activations else ""))
    local = train.seq_len // config.sp.size
    parts += [
        f"{name} in {tiles_of(tiles, local)} tiles"
        for name, tiles in (("MLP", memory.tiled_mlp), ("loss", memory.tiled_loss))
        if tiles
    ]
    parts.append(f"{train.micro_batch_size * config.dp.size} of {train.global_batch_size} sequences at a time")
    return ", ".join(parts)


def _scaled(trace: Trace, micro_steps: int) -> Trace:
    """A trace of at most two micro steps, as an optimizer step of `micro_steps`."""
    factor = micro_steps / min(micro_steps, 2)
    return replace(
        trace,
        collectives=[(n, r, round(calls * factor), round(size * factor)) for n, r, calls, size in trace.collectives],
        all_to_all_calls=round(trace.all_to_all_calls * factor),
        all_to_all_bytes=round(trace.all_to_all_bytes * factor),
        host_copies={way: round(size * factor) for way, size in trace.host_copies.items()},
    )


def calibration() -> dict[str, Any]:
    """How far plans were from measured runs, as benchmarks/plan_calibration.py recorded it."""
    found: dict[str, Any] = json.loads((Path(ulysses_exp.plan.__file__).parent / "calibration.json").read_text())
    return found
