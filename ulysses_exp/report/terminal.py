"""What a job shows on the terminal: a live line while it runs, a table of its results at the end."""

from __future__ import annotations

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
from rich.text import Text

from ulysses_exp.config.head_shares import HeadShares
from ulysses_exp.report import views
from ulysses_exp.report.facts import STATUS_STYLE
from ulysses_exp.report.plain import plain, plain_deep
from ulysses_exp.report.plain_table import PlainTable
from ulysses_exp.report.units import of_bytes, of_count, of_loss


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
        (status, STATUS_STYLE.get(status, "")),
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
        if shares := _shares(layout.get("sp"), model.get("heads")):
            facts.add_row("", shares)
    for name, stage in stages.items():
        for label, fact in views.facts(name, stage, arrow):
            facts.add_row(label, fact)
    console.print(facts)
    for table, remarks in (shown for name, stage in stages.items() for shown in views.tables(name, stage, arrow)):
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


def _path(folder: Path) -> str:
    shown = os.path.relpath(folder)
    return str(folder) if shown.startswith("..") else shown


def _shares(sp: Any, heads: Any) -> str | None:
    """What there is to say of heads that are not shared out evenly."""
    if not (isinstance(sp, int) and isinstance(heads, int) and sp > 0 and heads > 0):
        return None
    return HeadShares(sp, heads).words
