"""The table of the soak."""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter
from typing import Any

WHO = {
    "rank": "a rank, SIGKILL", "server": "the server that forks ranks, SIGKILL", "command": "the command, SIGKILL",
    "all": "all processes, SIGKILL", "stopped": "a rank, SIGSTOP", "asked": "the command, SIGTERM",
}  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """What was shown, kills by kind and by moment, and each kill."""
    kills = report["kills"]
    lines = [
        "# A sweep under random kills", "",
        f"{platform.machine()}, {os.cpu_count()} cores, CPU, gloo; seed {report['seed']}. {len(kills)} kills over a "
        f"sweep of {report['jobs']} jobs, which was called {report['calls']} times until all were ok; "
        f"{report['rough_seconds'] / 60:.0f} minutes, undisturbed {report['calm_seconds'] / 60:.0f}.", "",
        f"- results, metrics and checkpoints that differ from the undisturbed sweep's: {_told(report['differences'])}",
        f"- checkpoints lost: {_told(report['lost_checkpoints'])}",
        f"- processes and files in /dev/shm left: "
        f"{_told(report['left'] + [thing for kill in kills for thing in kill['left']])}",
        f"- exit code of the last call: {report['exit_code']}", "",
        "| killed | times | moments | seconds until all had ended: median | longest |",
        "| --- | ---: | --- | ---: | ---: |",
    ]  # fmt: skip
    for kind, who in WHO.items():
        of_kind = [kill for kill in kills if kill["kind"] == kind]
        if not of_kind:
            continue
        moments = ", ".join(f"{m} {n}" for m, n in Counter(kill["moment"] for kill in of_kind).most_common())
        seconds = [kill["seconds"] for kill in of_kind if kill["seconds"] is not None]
        missed = f" ({len(of_kind) - len(seconds)} never)" if len(seconds) < len(of_kind) else ""
        median, longest = (f"{f(seconds):.1f}" if seconds else "-" for f in (statistics.median, max))
        lines.append(f"| {who} | {len(of_kind)} | {moments} | {median} | {longest}{missed} |")
    lines += ["", "| # | killed | while | said | after (s) | left |", "| ---: | --- | --- | --- | ---: | --- |"]
    for kill in kills:
        seconds = "never" if kill["seconds"] is None else f"{kill['seconds']:.1f}"
        said = kill["said"].replace("|", "\\|").replace("\n", " ")[:160]
        left = ", ".join(kill["left"]).replace("|", "\\|")
        lines.append(f"| {kill['number']} | {kill['kind']} | {kill['moment']} | {said} | {seconds} | {left} |")
    return "\n".join(lines) + "\n"


def _told(things: list[str]) -> str:
    if not things:
        return "none"
    return f"{len(things)}: {'; '.join(things[:5])}{' ...' if len(things) > 5 else ''}"
