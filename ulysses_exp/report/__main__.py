"""`python -m ulysses_exp.report PATH [PATH ...]`: a report of runs and sweeps, finished or not."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import rich.box
import rich.markup
import rich.table
from rich.console import Console

from ulysses_exp.config import Config, TrackerConfig
from ulysses_exp.report import html, markdown, pictures, runs, table
from ulysses_exp.tracking import Tracker

PNG_DPI = 130


def write(paths: list[Path], out: Path, console: Console, tracker: TrackerConfig | None = None) -> int:
    """Reads every run below `paths`, prints their figures and writes report.html, report.md and PNG files to `out`.

    With `tracker`, the pictures and the table go to W&B, too, as a run of their own.

    Returns:
        The number of runs. With none, nothing is written.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    found = runs.find(paths)
    if not found:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    title = ", ".join(path.resolve().name for path in paths)
    counts = ", ".join(f"{n} {status}" for status, n in Counter(run.status for run in found).items())
    models = ", ".join(sorted({run.model for run in found} - {"?"})) or "unknown model"
    about = f"{len(found)} {'run' if len(found) == 1 else 'runs'} ({counts}) of {models}"
    troubles = table.troubles(found)
    drawn = pictures.draw(found)
    for picture in drawn:
        picture.figure.savefig(out / f"{picture.name}.png", dpi=PNG_DPI, metadata={"Software": None})
    full = table.table(found)
    (out / "report.html").write_text(html.page(title, about, full, troubles, drawn), encoding="utf-8")
    (out / "report.md").write_text(markdown.document(title, about, full, troubles, drawn), encoding="utf-8")
    _show(table.table(found, narrow=console.width < 160), troubles, console)
    console.print(f"{about}: {_shown(out / 'report.html')}", highlight=False, soft_wrap=True)
    if tracker is not None:
        files = {picture.name: out / f"{picture.name}.png" for picture in drawn}
        cells = [cell for run in found for cell in run.figure("reload.cells") or []]
        _publish(out, title, files, full, cells, tracker, console)
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


def _show(figures: table.Table, troubles: list[tuple[str, str]], console: Console) -> None:
    shown = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 0, 0, 1)
    )
    for number, name in enumerate(figures.titles):
        words = number == 0 or any(len(row[number][1]) > 12 for row in figures.rows)
        shown.add_column(name, justify="right" if number else "left", no_wrap=not words, overflow="fold",
                         min_width=10 if number == 0 else None)  # fmt: skip
    for row in figures.rows:
        shown.add_row(*(rich.markup.escape(text) for _, text in row))
    console.print()
    console.print(shown)
    console.print()
    for run, reason in troubles:
        console.print(f"{run}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)


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
    try:
        if write(arguments.paths, out, Console(), tracker):
            return 0
    except FileNotFoundError as error:
        print(f"{error}: no such folder", file=sys.stderr)
        return 2
    print("no run below " + ", ".join(map(str, arguments.paths)), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
