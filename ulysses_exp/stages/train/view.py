"""How the result of stage `train` is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from ulysses_exp.report.column import LOSS, SPEED, Column
from ulysses_exp.report.facts import Fact, trouble
from ulysses_exp.report.runs import Run
from ulysses_exp.report.shape import fields, named, number, series, whole
from ulysses_exp.report.units import of_bytes, of_count, of_loss, of_seconds

SHAPE = {
    "loss": series,
    "first_step": whole,
    "tokens_per_second": number,
    "step_time_s": fields(median=number, p90=number),
    "step_split_s": named(number, 12),
    "mfu": number,
    "hfu": number,
    "peak_memory_bytes": fields(max=number),
    "allocator": fields(
        peak_reserved_bytes=fields(max=number),
        beside_allocator_bytes=fields(max=number),
        alloc_retries=fields(max=number),
        ooms=fields(max=number),
    ),
    "communication": fields(all_to_all_bytes_per_step=number),
    "max_seq_len": whole,
}


def _last_loss(run: Run) -> float | None:
    return math.nan if run.diverged and run.last_loss is None else run.last_loss


COLUMNS = (
    Column("steps", lambda r: len(r.losses) or None, str, narrow=False),
    Column(LOSS, _last_loss, lambda loss: "not finite" if math.isnan(loss) else of_loss(loss)),
    Column(SPEED, lambda r: r.figure("train.tokens_per_second"), of_count),
    Column("step", lambda r: r.figure("train.step_time_s.median"), of_seconds),
    Column("p90", lambda r: r.figure("train.step_time_s.p90"), of_seconds, narrow=False),
    Column("MFU", lambda r: r.figure("train.mfu"), lambda share: f"{share:.1%}", narrow=False),
    Column("HFU", lambda r: r.figure("train.hfu"), lambda share: f"{share:.1%}", narrow=False),
    Column("memory", lambda r: r.figure("train.peak_memory_bytes.max"), of_bytes),
    Column("all-to-all / step", lambda r: r.figure("train.communication.all_to_all_bytes_per_step"), of_bytes, False),
    Column("longest sequence", lambda r: r.figure("train.max_seq_len"), lambda tokens: f"{tokens:,}"),
)


def facts(stage: Mapping[str, Any], arrow: str) -> list[Fact]:
    """What training came to: loss, speed, memory, traffic."""
    found = trouble("train", stage)
    if stage.get("already_at_step") is not None:
        found.append(("train", f"already at step {stage['already_at_step']}"))
    loss = stage.get("loss") or []
    if loss:
        text = f"{of_loss(loss[0])} {arrow} {of_loss(loss[-1])} in {len(loss)} steps"
        if stage.get("continued_from"):
            text += f", continued at step {stage['continued_from']}"
        found.append(("loss", text))
        first = (stage.get("first_step") or 0) + 1
        bad = [step for step, value in enumerate(loss, first) if value is None or not math.isfinite(value)]
        if bad := stage.get("nonfinite_steps") or bad:  # also of the gradient norm
            skipped = ", their updates skipped" if stage.get("skipped_steps") else ""
            text = f"not finite at {len(bad)} of them, first at step {bad[0]}{skipped}"
            found.append(("", Text(text, style="bold red")))
    if changed := stage.get("changed"):
        what = ", ".join(f"{key} {then} {arrow} {now}" for key, (then, now) in changed.items())
        found.append(("resumed", Text(f"from step {stage.get('first_step')}, with {what}")))
    if stage.get("tokens_per_second"):
        speed = f"{of_count(stage['tokens_per_second'])} tokens/s"
        if stage.get("mfu"):
            speed += f", MFU {stage['mfu']:.1%}"
        if stage.get("hfu"):
            speed += f", HFU {stage['hfu']:.1%}"
        found.append(("throughput", speed))
    step = stage.get("step_time_s", {})
    if step.get("median"):
        found.append(("step time", f"{of_seconds(step['median'])} median, {of_seconds(step.get('p90'))} p90"))
    if split := stage.get("step_split_s"):
        whole = sum(split.values()) or 1.0
        parts = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in split.items())
        found.append(("of a step", f"{parts} (profiled)"))
    if stage.get("max_seq_len"):
        limit = stage.get("memory_limit_bytes")
        where = f" in {of_bytes(limit)} a rank" if limit else ""
        found.append(
            ("longest", f"{stage['max_seq_len']:,} tokens train{where}, {stage['shortest_failed']:,} are out of memory")
        )
    memory = stage.get("peak_memory_bytes", {})
    if memory.get("max"):
        ranks = len(memory.get("per_rank") or [1])
        found.append(("peak memory", of_bytes(memory["max"]) + (f", worst of {ranks} ranks" if ranks > 1 else "")))
    if reserved := (held := stage.get("allocator", {})).get("peak_reserved_bytes"):
        found.append(("", _reserved(held, reserved)))
    exchange = stage.get("communication", {})
    if exchange.get("all_to_all_calls_per_step"):
        found.append(
            (
                "all-to-all",
                f"{of_count(exchange['all_to_all_calls_per_step'])} calls,"
                f" {of_bytes(exchange.get('all_to_all_bytes_per_step'))} a step",
            )
        )
    if stage.get("weights_identical_across_ranks") is False:
        found.append(("weights", Text("differ between ranks", style="bold red")))
    return found


def _reserved(held: Mapping[str, Any], reserved: Mapping[str, Any]) -> str:
    """What the allocator of the worst rank has taken of its device, and what there is beside it."""
    ranks = reserved.get("per_rank") or [reserved["max"]]
    text = f"{of_bytes(reserved['max'])} reserved" + (f", rank {ranks.index(max(ranks))}" if len(ranks) > 1 else "")
    if beside := held.get("beside_allocator_bytes", {}).get("max"):
        text += f"; up to {of_bytes(beside)} beside it"
    if retries := held.get("alloc_retries", {}).get("max"):
        text += f"; {retries} retries for want of memory"
    return text
