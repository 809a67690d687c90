"""What a job shows on the terminal: a live line while it runs, a table of its results at the end."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ulysses_exp.report import plan
from ulysses_exp.report.plain import plain, plain_deep
from ulysses_exp.report.plain_table import PlainTable, figures_table
from ulysses_exp.report.units import of_bytes, of_count, of_difference, of_loss, of_seconds

_STATUS_STYLE = {
    "ok": "green", "failed": "bold red", "interrupted": "yellow", "skipped": "yellow", "running": "cyan",
}  # fmt: skip


class Progress:
    """Where a job stands: bars that are redrawn on a terminal, a line every `interval_s` seconds anywhere else.

    Use as a context manager; each stage calls `start` once and `step` as it goes on.

    Args:
        console: where to write.
        headline: a line above the bars, e.g. how far a sweep has come.
        interval_s: seconds between lines where the output is no terminal; first and last step are always shown.
    """

    def __init__(self, console: Console, headline: str | None = None, interval_s: float = 5.0):
        self._console = console
        self._interval_s = interval_s
        self._headline = headline
        self._stage = ""
        self._total: int | None = None
        self._completed = 0
        self._last_line = 0.0
        self._bars: _HeadedBars | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bars = _HeadedBars(headline, console)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        elif self._headline:
            self.note(self._headline)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, stage: str, total: int | None) -> None:
        """A stage of `total` steps begins; None where that is not known."""
        self._complete()
        self._stage, self._total, self._completed, self._last_line = stage, total, 0, 0.0
        if self._bars is not None:
            count = "" if total is None else f"0/{total}"
            self._task = self._bars.add_task(stage, total=total, count=count, figures="")
        else:
            self.note(f"{stage} ...")

    def step(self, metrics: Mapping[str, float]) -> None:
        """A line of metrics.jsonl has come; its `step` says how far training is."""
        if self._total is not None:
            self._completed = min(int(metrics.get("step", self._completed + 1)), self._total)
        count = "" if self._total is None else f"{self._completed}/{self._total}"
        shown = _figures(metrics)
        evaluated = any(key.startswith("eval/") for key in metrics)
        if evaluated and self._stage != "eval":  # by the ranks that have just trained
            self.note(f"eval {shown}")
        elif self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._completed, count=count, figures=shown)
        elif self._bars is None and (count or shown):  # nothing of what it is about: no line
            now = time.monotonic()
            if self._last_line == 0.0 or self._completed == self._total or now - self._last_line >= self._interval_s:
                self._last_line = now
                self.note(" ".join(part for part in (self._stage, count, shown) if part))

    def note(self, text: str) -> None:
        """A line that stays, above the bars."""
        self._console.print(plain(text), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Ends the live display; what it last showed stays."""
        self._complete()
        if self._bars is not None:
            self._bars.stop()

    def _complete(self) -> None:
        if self._bars is not None and self._task is not None and self._total is None:
            self._bars.update(self._task, total=1, completed=1)  # ends the pulse
        self._task = None


class _HeadedBars(Bars):
    """rich's bars below a headline."""

    def __init__(self, headline: str | None, console: Console):
        self._headline = headline
        super().__init__(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            refresh_per_second=4,
        )

    def get_renderable(self) -> RenderableType:
        bars = super().get_renderable()
        return Group(Text(self._headline, overflow="ellipsis", no_wrap=True), bars) if self._headline else bars


def _figures(metrics: Mapping[str, float]) -> str:
    """The few metrics that fit beside a bar."""
    found = []
    for name, key in (("loss", "train/loss"), ("bypass loss", "eval/bypass/loss"), ("sp loss", "eval/sp/loss")):
        if metrics.get(key) is not None:
            found.append(f"{name} {of_loss(metrics[key])}")
    if metrics.get("perf/tokens_per_second") is not None:
        found.append(f"{of_count(metrics['perf/tokens_per_second'])} tokens/s")
    if metrics.get("memory/peak_bytes_max") is not None:
        found.append(of_bytes(metrics["memory/peak_bytes_max"]))
    return "  ".join(found)


def summary(results: dict[str, Any], folder: Path, console: Console, how_to_open: str | None) -> None:
    """Prints what came out of a job.

    Args:
        results: results.json, also of a job that failed half-way: what is missing is left out.
        folder: the run folder, shown as the place of everything else.
        console: where to print; plain text where it is no terminal.
        how_to_open: `Tracker.how_to_open`.
    """
    results = plain_deep(results)  # an error may carry a library's colours
    arrow = "→" if console.encoding.startswith("utf") else "->"
    layout, model, stages = results.get("layout", {}), results.get("model", {}), results.get("stages", {})
    status = str(results.get("status", "unfinished"))
    title = Text.assemble(
        (str(model.get("name", "?")), "bold"), "  ", (str(layout.get("name", "?")), "bold cyan"), "  ",
        (status, _STATUS_STYLE.get(status, "")),
    )  # fmt: skip
    console.print()
    console.print(Rule(title, align="left", style="dim", characters="─" if arrow == "→" else "-"))

    facts = PlainTable.grid(padding=(0, 2), pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    if model.get("parameters"):
        shape = (
            f"{of_count(model['parameters'])} parameters, {model.get('layers')} layers, {model.get('heads')} query and"
            f" {model.get('kv_heads')} KV heads, {model.get('attention')}"
        )
        facts.add_row("model", shape)
    if layout:
        ranks = "1 rank" if layout.get("world") == 1 else f"{layout.get('world')} ranks"
        device = results.get("device", "?")
        if set(stages) == {"plan"}:  # nothing has run here
            device = stages["plan"].get("hardware", "?")
        facts.add_row("layout", f"{ranks} on {device}: sequences over {layout.get('sp')},"
                                f" data over {layout.get('dp')}, ZeRO {layout.get('zero')}")  # fmt: skip
    _train(facts, stages.get("train"), arrow)
    _parity(facts, stages.get("parity"))
    _plan(facts, stages.get("plan"))
    for name in ("eval", "reload"):
        if (stage := stages.get(name)) and stage.get("status") != "ok" and not stage.get("cells"):
            _trouble(facts, name, stage)
    console.print(facts)
    planned = stages.get("plan") or {}
    shown: list[tuple[PlainTable | None, list[str]]] = []
    if planned.get("status") == "ok":
        shown = [(table, []) for table in plan.tables(planned)] + [(None, plan.remarks(planned))]
    for table, remarks in (*shown, _evaluation(stages.get("eval")), _reload(stages.get("reload"), arrow)):
        if table is not None or remarks:
            console.print()
        if table is not None:
            console.print(table)
        for remark in remarks:
            console.print(Text(remark, style="dim"))

    console.print()
    for label, text, style in (
        ("error", results.get("error"), "red"),
        ("results", _path(folder), ""),
        ("W&B", how_to_open, ""),
    ):
        if text:  # one line each, however long: a path that is cut cannot be copied
            console.print(Text.assemble((f"{label:<9}", "dim"), (str(text), style)), soft_wrap=True)


def _trouble(facts: Table, name: str, stage: Mapping[str, Any]) -> None:
    status = str(stage.get("status", "?"))
    facts.add_row(
        name, Text(f"{status}: {stage.get('reason', 'no reason given')}", style=_STATUS_STYLE.get(status, ""))
    )


def _train(facts: Table, stage: Mapping[str, Any] | None, arrow: str) -> None:
    if not stage:
        return
    if stage.get("status") != "ok":
        _trouble(facts, "train", stage)
    if stage.get("already_at_step") is not None:
        facts.add_row("train", f"already at step {stage['already_at_step']}")
    loss = stage.get("loss") or []
    if loss:
        text = f"{of_loss(loss[0])} {arrow} {of_loss(loss[-1])} in {len(loss)} steps"
        if stage.get("continued_from"):
            text += f", continued at step {stage['continued_from']}"
        facts.add_row("loss", text)
        first = (stage.get("first_step") or 0) + 1
        bad = [step for step, value in enumerate(loss, first) if value is None or not math.isfinite(value)]
        if bad := stage.get("nonfinite_steps") or bad:  # also of the gradient norm
            skipped = ", their updates skipped" if stage.get("skipped_steps") else ""
            text = f"not finite at {len(bad)} of them, first at step {bad[0]}{skipped}"
            facts.add_row("", Text(text, style="bold red"))
    if changed := stage.get("changed"):
        what = ", ".join(f"{key} {then} {arrow} {now}" for key, (then, now) in changed.items())
        facts.add_row("resumed", Text(f"from step {stage.get('first_step')}, with {what}"))
    if stage.get("tokens_per_second"):
        speed = f"{of_count(stage['tokens_per_second'])} tokens/s"
        if stage.get("mfu"):
            speed += f", MFU {stage['mfu']:.1%}"
        if stage.get("hfu"):
            speed += f", HFU {stage['hfu']:.1%}"
        facts.add_row("throughput", speed)
    step = stage.get("step_time_s", {})
    if step.get("median"):
        facts.add_row("step time", f"{of_seconds(step['median'])} median, {of_seconds(step.get('p90'))} p90")
    if split := stage.get("step_split_s"):
        whole = sum(split.values()) or 1.0
        parts = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in split.items())
        facts.add_row("of a step", f"{parts} (profiled)")
    if stage.get("max_seq_len"):
        limit = stage.get("memory_limit_bytes")
        where = f" in {of_bytes(limit)} a rank" if limit else ""
        facts.add_row(
            "longest", f"{stage['max_seq_len']:,} tokens train{where}, {stage['shortest_failed']:,} are out of memory"
        )
    memory = stage.get("peak_memory_bytes", {})
    if memory.get("max"):
        ranks = len(memory.get("per_rank") or [1])
        facts.add_row("peak memory", of_bytes(memory["max"]) + (f", worst of {ranks} ranks" if ranks > 1 else ""))
    exchange = stage.get("communication", {})
    if exchange.get("all_to_all_calls_per_step"):
        facts.add_row(
            "all-to-all",
            f"{of_count(exchange['all_to_all_calls_per_step'])} calls,"
            f" {of_bytes(exchange.get('all_to_all_bytes_per_step'))} a step",
        )
    if stage.get("weights_identical_across_ranks") is False:
        facts.add_row("weights", Text("differ between ranks", style="bold red"))


def _parity(facts: Table, stage: Mapping[str, Any] | None) -> None:
    if not stage:
        return
    if "max_rel_loss_diff" in stage:
        facts.add_row(
            "parity",
            f"against {stage.get('reference')}, relative: loss {of_difference(stage['max_rel_loss_diff'])},"
            f" gradient norm {of_difference(stage.get('max_rel_grad_norm_diff'))},"
            f" weights {of_difference(stage.get('max_rel_weight_diff'))}",
        )
    if stage.get("status") != "ok":
        _trouble(facts, "parity", stage)


def _plan(facts: Table, stage: Mapping[str, Any] | None) -> None:
    if not stage:
        return
    if stage.get("status") != "ok":
        _trouble(facts, "plan", stage)
        return
    for label, text in plan.facts(stage):
        facts.add_row(label, text)


def _evaluation(stage: Mapping[str, Any] | None) -> tuple[PlainTable | None, list[str]]:
    modes = [mode for mode in ("bypass", "sp") if stage and stage.get(mode)]
    if not stage or not modes:
        return None, []
    table = figures_table("eval", "loss", "perplexity", "all-to-all", "tokens/s")
    for mode in modes:
        row = stage[mode]
        table.add_row(
            mode,
            of_loss(row.get("loss")),
            of_count(row.get("perplexity")),
            of_count(row.get("all_to_all_calls")),
            of_count(row.get("tokens_per_second")),
        )
    if stage.get("max_abs_logit_diff") is None:
        return table, []
    return table, [f"largest difference of a logit: {of_difference(stage['max_abs_logit_diff'])}"]


def _reload(stage: Mapping[str, Any] | None, arrow: str) -> tuple[PlainTable | None, list[str]]:
    cells = (stage or {}).get("cells") or []
    if not cells:
        return None, []
    table = figures_table(f"reload {arrow}", "route", "weights", "optimizer", "continuation", "time")
    reasons = []
    for cell in cells:
        ok = cell.get("status") == "ok"
        if not ok:
            reasons.append(f"{cell.get('target')} by {cell.get('route')}: {cell.get('reason') or cell.get('status')}")
        table.add_row(
            str(cell.get("target")),
            str(cell.get("route")),
            _exact(cell.get("weights_bit_exact")) if ok else Text("failed", style="bold red"),
            _exact(cell.get("optimizer_bit_exact")) if ok else "",
            of_difference(cell.get("continuation_max_abs_loss_diff")) if ok else "",
            of_seconds(cell.get("seconds")),
        )
    sources = sorted({str(cell.get("source")) for cell in cells})
    return table, [f"saved at {', '.join(sources)}; continuation: loss difference to the run that went on", *reasons]


def _exact(value: bool | None) -> Text:
    if value is None:
        return Text("-")
    return Text("bit-exact", style="green") if value else Text("differs", style="bold red")


def _path(folder: Path) -> str:
    shown = os.path.relpath(folder)
    return str(folder) if shown.startswith("..") else shown
