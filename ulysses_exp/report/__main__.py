"""`python -m ulysses_exp.report PATH [PATH ...]`: a report of runs and sweeps, finished or not."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console

from ulysses_exp.config import Config, TrackerConfig
from ulysses_exp.report import files, html, markdown, pictures, runs, table
from ulysses_exp.report.page import Page, page
from ulysses_exp.report.plain import line, plain
from ulysses_exp.report.plain_table import PlainTable
from ulysses_exp.tracking.run import Tracker

_ROWS_AT_ONCE, _ROWS = 60, 25  # a longer table is cut to so many rows on the terminal
_TROUBLES = 30
_NAME, _WORDS = 10, 12  # characters of a layout's column; a longer text than these may be broken


def write(paths: list[Path], out: Path, console: Console, tracker: TrackerConfig | None = None) -> int:
    """Reads every run below `paths`, prints their figures and writes report.html, report.md and PNG files to `out`.

    With `tracker`, the pictures and the table go to W&B, too, as a run of their own.

    Returns:
        The number of runs. With none, nothing is written.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: `out` cannot be written.
    """
    found = runs.find(paths)
    if not found:
        return 0
    title = line(", ".join(path.resolve().name for path in paths), 200)
    whole = page(title, found)
    out.mkdir(parents=True, exist_ok=True)
    for picture in whole.pictures:
        files.write(out / f"{picture.name}.png", pictures.png(picture))
    files.write(out / "report.html", html.document(whole))
    files.write(out / "report.md", markdown.document(whole))
    _show(table.table(whole.runs, narrow=console.width < 160), whole, console)
    console.print(f"{whole.about}: {plain(_shown(out / 'report.html'))}", markup=False, highlight=False, soft_wrap=True)
    if tracker is not None:
        drawn = {picture.name: out / f"{picture.name}.png" for picture in whole.pictures}
        cells = [cell for run in found for cell in run.figure("reload.cells") or []]
        _publish(out, title, drawn, whole.table, cells, tracker, console)
    return len(found)


def _publish(
    out: Path,
    title: str,
    files: dict[str, Path],
    figures: table.Table,
    cells: list[dict[str, Any]],
    tracker: TrackerConfig,
    console: Console,
) -> None:
    """A W&B run of its own for the report, in the group of the runs that it shows: pictures, the table of the runs,
    and the reload cells of all of them, source by target."""
    run = Tracker(
        Config(tracker=tracker), out, resolved={}, name=f"report-{title}", group=title, tags=["report"],
        on_warning=lambda text: console.print(text, style="yellow", highlight=False, soft_wrap=True),
    )  # fmt: skip
    run.log_media(files, figures.titles, [[text for _, text in row] for row in figures.rows])
    run.finish({"stages": {"reload": {"cells": cells}}}, failed=False)
    console.print(run.how_to_open, highlight=False, soft_wrap=True)


def _show(figures: table.Table, whole: Page, console: Console) -> None:
    shown = PlainTable(
        box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 0, 0, 1)
    )
    rows = figures.rows if len(figures.rows) <= _ROWS_AT_ONCE else figures.rows[:_ROWS]
    widths = [max(len(text) for text in (title, *(row[number][1] for row in rows)))
              for number, title in enumerate(figures.titles)]  # fmt: skip
    columns = len(widths)
    while columns > figures.settings + 2 and _NAME + sum(1 + min(n, _WORDS) for n in widths[1:columns]) > console.width:
        columns -= 1  # a figure that is cut in two would be read as another
    for number, name in enumerate(figures.titles[:columns]):
        words = number == 0 or widths[number] > _WORDS
        shown.add_column(name, justify="right" if number else "left", no_wrap=not words,
                         overflow="fold", min_width=_NAME if number == 0 else None)  # fmt: skip
    for row in rows:
        shown.add_row(*(text for _, text in row[:columns]))
    console.print()
    console.print(shown)
    missing = [f"{len(figures.rows) - len(rows):,} more"] if len(figures.rows) > len(rows) else []
    missing += [", ".join(figures.titles[columns:])] if columns < len(widths) else []
    if missing:
        console.print(f"in report.html: {'; '.join(missing)}", style="dim", markup=False, highlight=False)
    console.print()
    for text in whole.highlights:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if whole.highlights:
        console.print()
    for run, reason in whole.troubles[:_TROUBLES]:
        console.print(f"{run}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if len(whole.troubles) > _TROUBLES:
        console.print(f"{len(whole.troubles) - _TROUBLES:,} more in report.html", style="red", highlight=False)


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ulysses_exp.report", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run or sweep folders")
    parser.add_argument("--out", type=Path, help="where to write; default: into PATH, for several the current folder")
    parser.add_argument("--tracker", choices=("offline", "online"), help="log pictures and table to W&B as a run")
    parser.add_argument("--project", default="ulysses-exp", help="W&B project")
    parser.add_argument("--entity", help="W&B user or team")
    arguments = parser.parse_args()
    tracker = TrackerConfig(arguments.tracker, arguments.project, arguments.entity) if arguments.tracker else None
    out = arguments.out or (arguments.paths[0] if len(arguments.paths) == 1 else Path.cwd())
    for path in arguments.paths:
        if not path.is_dir():
            print(f"{plain(str(path))}: no such folder", file=sys.stderr)
            return 2
    try:
        if write(arguments.paths, out, Console(), tracker):
            return 0
    except OSError as error:
        print(f"the report cannot be written: {error.strerror}: {plain(str(error.filename))}", file=sys.stderr)
        return 1
    print("no run below " + plain(", ".join(map(str, arguments.paths))), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
