"""A plan on the terminal: does it fit, what takes the memory, what is sent, where the time goes, how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ulysses_exp.report.column import PLANNED, Column
from ulysses_exp.report.facts import Fact, trouble
from ulysses_exp.report.plain_table import PlainTable, Shown, figures_table
from ulysses_exp.report.shape import flag, name, named, number, whole
from ulysses_exp.report.units import of_bytes, of_count, of_seconds

#: What the parts of memory are called, in the order in which they are shown.
KINDS = {
    "parameters": "weights",
    "gathered_parameters": "gathered weights",
    "gradients": "gradients",
    "optimizer": "optimizer, masters",
    "activations": "activations",
    "buffers": "DeepSpeed's buffers",
}
_PHASES = {
    "start": "when it starts",
    "forward_backward": "in forward and backward",
    "optimizer_step": "in the optimizer",
}


SHAPE = {
    "peak_memory_bytes_per_rank": named(number, 12),
    "fits": flag,
    "max_seq_len": whole,
    "hardware": name,
}

COLUMNS = (
    Column("planned memory", lambda r: r.figure("plan.peak_memory_bytes_per_rank.total"), of_bytes, narrow=False),
    Column(PLANNED, lambda r: r.figure("plan.max_seq_len"), lambda tokens: f"{tokens:,}", narrow=False),
)


def facts(stage: Mapping[str, Any], arrow: str) -> list[Fact]:
    """Does it fit, how long may a sequence be, where does the time go."""
    if wrong := trouble("plan", stage):
        return wrong
    memory = stage["peak_memory_bytes_per_rank"]
    budget = stage["budget_bytes_per_rank"]
    verdict = "fits" if stage["fits"] else "does not fit"
    needs = f"{of_bytes(memory['total'])} of {of_bytes(budget)} a rank"
    if not stage["fits_host"]:
        needs += (
            f"; host memory does not hold {of_bytes(stage['host_memory_bytes_at_start'])} while the model is built and "
            f"{of_bytes(stage['host_memory_bytes_per_rank'])} a rank later"
        )
    found: list[Fact] = [
        ("plan", f"{stage['seq_len']:,} tokens: {verdict}, {needs}"),
        ("settings", stage["settings"]),
    ]
    if "max_seq_len" in stage:
        longest = stage["max_seq_len"]
        found.insert(1, ("longest", f"{longest:,} tokens" if longest else "no sequence fits, however short"))
    if time := stage.get("step_time_s"):
        parts = [
            f"{name} {of_seconds(time[key])}"
            for name, key in (("compute", "compute"), ("all-to-all", "all_to_all"), ("ZeRO", "zero"), ("host", "host"))
            if time[key]
        ]
        found.append(("step time", f"{of_seconds(time['total'])}: {', '.join(parts)}"))
        found.append(
            ("MFU", f"{time['mfu_bound']:.1%} at most; communication {time['communication_share']:.1%} of the step")
        )
    return found


def tables(stage: Mapping[str, Any], arrow: str) -> list[Shown]:
    """Memory of a rank by kind, what it sends in a step, and what the figures rest on."""
    if stage.get("status") != "ok":
        return []
    return [*((table, []) for table in _tables(stage)), (None, _remarks(stage))]


def _tables(stage: Mapping[str, Any]) -> list[PlainTable]:
    phase = stage["peak_is_in"]
    memory = figures_table("memory a rank", "at its fullest", "between steps")
    peak, rest = stage["phases"][phase], stage["at_rest"]
    for kind, title in KINDS.items():
        if peak.get(kind) or rest.get(kind):
            memory.add_row(title, of_bytes(peak.get(kind, 0)), of_bytes(rest.get(kind, 0)))
    memory.add_row("all", of_bytes(sum(peak.values())), of_bytes(sum(rest.values())), style="bold")
    if stage["host_memory_bytes_per_rank"]:
        memory.add_row("host memory", of_bytes(stage["host_memory_bytes_per_rank"]), "")
    if not stage["collectives"]:
        return [memory]
    sent = figures_table("sent in a step", "ranks", "calls", "bytes a rank", "time")
    for c in stage["collectives"]:
        title = c["name"].replace("_", "-")
        seconds = c["seconds"]
        time = "< 1 ms" if seconds is not None and seconds < 1e-3 else of_seconds(seconds)
        sent.add_row(title, str(c["ranks"]), of_count(c["calls"]), of_bytes(c["bytes_sent"]), time)
    return [memory, sent]


def _remarks(stage: Mapping[str, Any]) -> list[str]:
    lines = [f"fullest {_PHASES[stage['peak_is_in']]}", *(f"assumed: {text}" for text in stage["assumptions"])]
    known = stage["calibration"]
    error = known["max_abs_relative_memory_error"]
    return [
        *lines,
        f"accuracy: memory within {error:.1%} and all-to-alls "
        f"{'exact' if known['all_to_all_bytes_exact'] else 'NOT exact'} in {known['cells']} runs of tiny models "
        f"({known['measured_on']}); on a GPU {known['gpu']}",
    ]
