"""A plan on the terminal: does it fit, what takes the memory, what is sent, where the time goes, how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ulysses_exp.report.plain_table import PlainTable, figures_table
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


def facts(stage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of the lines above the tables."""
    memory = stage["peak_memory_bytes_per_rank"]
    budget = stage["budget_bytes_per_rank"]
    verdict = "fits" if stage["fits"] else "does not fit"
    needs = f"{of_bytes(memory['total'])} of {of_bytes(budget)} a rank"
    if not stage["fits_host"]:
        needs += (
            f"; host memory does not hold {of_bytes(stage['host_memory_bytes_at_start'])} while the model is built and "
            f"{of_bytes(stage['host_memory_bytes_per_rank'])} a rank later"
        )
    found = [
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


def tables(stage: Mapping[str, Any]) -> list[PlainTable]:
    """Memory of a rank by kind, and what it sends in a step."""
    phase = stage["peak_is_in"]
    memory = figures_table("memory a rank", "at its fullest", "between steps")
    peak, rest = stage["phases"][phase], stage["at_rest"]
    for kind, name in KINDS.items():
        if peak.get(kind) or rest.get(kind):
            memory.add_row(name, of_bytes(peak.get(kind, 0)), of_bytes(rest.get(kind, 0)))
    memory.add_row("all", of_bytes(sum(peak.values())), of_bytes(sum(rest.values())), style="bold")
    if stage["host_memory_bytes_per_rank"]:
        memory.add_row("host memory", of_bytes(stage["host_memory_bytes_per_rank"]), "")
    if not stage["collectives"]:
        return [memory]
    sent = figures_table("sent in a step", "ranks", "calls", "bytes a rank", "time")
    for c in stage["collectives"]:
        name = c["name"].replace("_", "-")
        seconds = c["seconds"]
        time = "< 1 ms" if seconds is not None and seconds < 1e-3 else of_seconds(seconds)
        sent.add_row(name, str(c["ranks"]), of_count(c["calls"]), of_bytes(c["bytes_sent"]), time)
    return [memory, sent]


def remarks(stage: Mapping[str, Any]) -> list[str]:
    """What the figures rest on, and how far plans have been from measurements."""
    lines = [f"fullest {_PHASES[stage['peak_is_in']]}", *(f"assumed: {text}" for text in stage["assumptions"])]
    known = stage["calibration"]
    error = known["max_abs_relative_memory_error"]
    return [
        *lines,
        f"accuracy: memory within {error:.1%} and all-to-alls "
        f"{'exact' if known['all_to_all_bytes_exact'] else 'NOT exact'} in {known['cells']} runs of tiny models "
        f"({known['measured_on']}); on a GPU {known['gpu']}",
    ]
