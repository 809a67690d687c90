"""`python -m ulysses_exp.doctor [overrides]`: is this machine ready for such a job, and what have dead runs left?

Exit codes: 0 nothing is wrong, 1 something is, 2 the command line is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulysses_exp.doctor.finding import STATES, Asked, Finding, wrong

#: What is looked at, in this order; each is a module of this package with a `check`. Imported one by one, so that a
#: package that is missing spoils its own lines only.
SUBJECTS = ("versions", "accelerators", "machine", "storage", "network", "tracking", "collectives", "remains")
_STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def examine(asked: Asked, subjects: Iterable[str] = SUBJECTS) -> Iterator[tuple[str, list[Finding]]]:
    """(subject, its findings), as they come. A check that breaks is a finding, too."""
    for subject in subjects:
        yield subject, list(_guarded(subject, asked))


def _guarded(subject: str, asked: Asked) -> Iterator[Finding]:
    try:
        check: Callable[[Asked], Iterator[Finding]] = import_module(f"ulysses_exp.doctor.{subject}").check
        yield from check(asked)
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        yield wrong(subject, f"could not be looked at: {type(error).__name__}: {said}", "mend what is wrong above")


def asked_for(overrides: list[str], ranks: int | None, outputs: Path) -> Asked:
    """The job that `overrides` compose, checked; without a layout among them, one of two ranks where there is room.

    Raises:
        ConfigError: such a job cannot run anywhere.
    """
    from ulysses_exp import config
    from ulysses_exp.config.composing import composed
    from ulysses_exp.config.received import sources

    keys = {override.partition("=")[0].lstrip("+~") for override in overrides}
    attached = int(os.environ.get("WORLD_SIZE", "1")) if "launch=attached" in overrides else None
    if not keys & {"sp.size", "dp.size", "experiment", "checkpoint.source"}:
        ranks = ranks or attached or min(2, config.accelerators() or os.cpu_count() or 1)
        overrides = ["sp.size=1", *overrides]
    cfg, _ = composed(overrides)
    resolved = config.resolve(sources.inherit(cfg, overrides))
    return Asked(resolved, ranks or attached or resolved.layout.world, outputs)


def show(subject: str, findings: list[Finding], console: Console) -> None:
    """A heading and a line a finding, with what mends it below; plain lines where the output is no terminal."""
    unicode = console.encoding.startswith("utf")
    arrow = "→" if unicode else "->"
    console.print()
    console.print(Text(subject, style="bold cyan"))
    width = max(len(finding.name) for finding in findings)
    marks = dict(zip(STATES, "✓!✗", strict=True)) if console.is_terminal and unicode else {s: s for s in STATES}
    column = max(len(mark) for mark in marks.values())
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for finding in findings:
        style = _STYLES[finding.state]
        said = Text(finding.said, style="" if finding.state == "ok" else style)
        lines = [said, *([Text(f"{arrow} {finding.mend}", style="dim")] if finding.mend else [])]
        for number, line in enumerate(lines):
            mark, name = (marks[finding.state], finding.name) if number == 0 else ("", "")
            if console.is_terminal:
                table.add_row(Text(mark, style=style), name, line)
            else:
                text = f"{mark:<{column}}  {name:<{width}}  {line.plain}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(table)


def _clean(outputs: Path, console: Console) -> int:
    """Lists what dead runs have left and removes what is this project's own."""
    from ulysses_exp.doctor import remains

    found = remains.find(outputs)
    show("remains", list(remains.findings(found)), console)
    own = found.own()
    console.print()
    for thing in own:
        console.print(f"removing {thing}", markup=False, highlight=False, soft_wrap=True)
    troubles = remains.clean(found)
    for trouble in troubles:
        console.print(f"not removed: {trouble}", style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(own) - len(troubles)} of {len(own)} removed", highlight=False)
    return 1 if troubles else 0


def _report(asked: Asked, console: Console | None) -> int:
    """Looks at everything and shows it: on `console` as it comes, without one as JSON at the end."""
    began = time.perf_counter()
    all_of_them: list[tuple[str, Finding]] = []
    for subject, findings in examine(asked):
        all_of_them += [(subject, finding) for finding in findings]
        if console is not None:
            show(subject, findings, console)
    worst = max((f.state for _, f in all_of_them), key=STATES.index)
    if console is None:
        findings_ = [{"subject": subject, **asdict(finding)} for subject, finding in all_of_them]
        print(json.dumps({"status": worst, "ranks": asked.ranks, "findings": findings_}, indent=1))
    else:
        counts = [(state, sum(f.state == state for _, f in all_of_them)) for state in reversed(STATES)]
        told = ", ".join(f"{count} {state}" for state, count in counts if count)
        console.print()
        console.print(Text(f"{told}, in {time.perf_counter() - began:.0f} s", style=_STYLES[worst]))
    return 1 if worst == "wrong" else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ulysses_exp.doctor", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of the jobs that are to run, as run.py takes them: sp.size=4 ...")
    parser.add_argument("--ranks", type=int, help="ranks that try the collectives; default: as many as the jobs have")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder that runs are written to")
    parser.add_argument("--clean", action="store_true",
                        help="instead, list what dead runs left and remove what is this project's own")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if arguments.ranks is not None and not 1 <= arguments.ranks <= 64:
        parser.error("--ranks: choose from 1 to 64")
    if arguments.clean:
        return _clean(arguments.outputs, Console())
    if "launch=attached" in arguments.overrides:
        from ulysses_exp.cli.command import leave_to_rank_0

        leave_to_rank_0(arguments.overrides)
    try:
        asked = asked_for(arguments.overrides, arguments.ranks, arguments.outputs)
    except Exception as error:
        from ulysses_exp.cli.user_errors import user_message
        from ulysses_exp.config.paths import CONF

        message = user_message(error, CONF, arguments.overrides)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 2
    if asked.config.launch.name == "local":
        from ulysses_exp.config import device_of
        from ulysses_exp.launch.local import warm_up

        warm_up(device_of(asked.config))  # the ranks' imports run beside the other checks
    return _report(asked, None if arguments.json else Console())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
