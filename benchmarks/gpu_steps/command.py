"""The command: steps one after another, each part in a process of its own, and the table after every row."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_steps
from gpu_steps import machine, table
from gpu_steps.step import Row, Setting, Step

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
_LOOK_SECONDS = 0.5  # between two looks at the rows of a part
_TAIL = 2000  # characters of a part's stderr that are looked at


def main() -> int:
    """Runs the steps. Exit code 0: all went well, 1: not all, 2: they cannot be run here."""
    options = _parser().parse_args()
    if options.part is not None:
        return _be_part(options)
    if options.list:
        for step in gpu_steps.STEPS:
            print(f"{step.name:14} {step.question}" + (f" ({step.gpus} GPUs)" if step.gpus > 1 else ""))
        return 0
    known = [step.name for step in gpu_steps.STEPS]
    chosen = options.only.split(",") if options.only else known
    if unknown := [name for name in chosen if name not in known]:
        return _refuse(f"no step is called {', '.join(unknown)}; --list shows them")
    missing, others = machine.unmet()
    if missing:
        return _refuse(f"not installed: {', '.join(missing)}; docs/gpu.md says how without a network")
    try:
        described = machine.describe(options.pretend)
    except (OSError, machine.NvmlError) as error:
        return _refuse(f"no GPU answers ({error}); --pretend tries the script without one")
    notes = [f"not the versions that are asked for: {', '.join(others)}"] if others else []
    out = options.out or ROOT / ("outputs/gpu_pretended" if options.pretend else "benchmarks/results")
    report = Report(out / f"gpu_{machine.slug(described['device'])}.json", described, notes)
    gpus = 1 if options.pretend else len(described["devices"])
    until = time.monotonic() + options.minutes * 60
    (ROOT / "outputs").mkdir(exist_ok=True)
    steps = [step for step in gpu_steps.STEPS if step.name in chosen]
    try:
        with tempfile.TemporaryDirectory(dir=ROOT / "outputs", prefix="gpu-") as folder:  # /tmp may be memory
            for step in steps:
                _step(step, Setting(options.pretend, gpus, Path(folder) / step.name), report, until)
    except KeyboardInterrupt:
        return 130
    finally:
        report.write()
        print(report.markdown)
    return 0 if all(report.steps[step.name]["state"] in ("ok", _left_out(step)) for step in steps) else 1


class Report:
    """What is known so far, in a file and beside it as a table."""

    def __init__(self, path: Path, described: dict[str, Any], notes: list[str]):
        self.path, self.markdown = path, path.with_suffix(".md")
        self.described, self.notes = described, notes
        self.steps: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            before = json.loads(path.read_text())
            if before["machine"] | {"commit": None} == described | {"commit": None}:
                self.steps = before["steps"]

    def write(self) -> None:
        order = [step.name for step in gpu_steps.STEPS if step.name in self.steps]
        report = {
            "machine": self.described,
            "notes": self.notes,
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "steps": {name: self.steps[name] for name in order},
        }
        for path, text in ((self.path, json.dumps(report, indent=1)), (self.markdown, table.document(report))):
            temporary = path.with_suffix(path.suffix + ".tmp")
            temporary.write_text(text)
            temporary.replace(path)


def _left_out(step: Step) -> str:
    return f"left out: needs {step.gpus} GPUs"


def _step(step: Step, setting: Setting, report: Report, until: float) -> None:
    began = time.monotonic()
    until = min(until, began + step.limit_s * setting.pick(1, 4))  # pretended where others compute, too
    entry = report.steps[step.name] = {"question": step.question, "state": "running", "seconds": 0.0, "rows": []}
    if setting.gpus < step.gpus and not setting.pretend:
        entry["state"] = _left_out(step)
        return report.write()
    print(f"{step.name}: {step.question}", flush=True)
    setting.folder.mkdir()
    troubles = []
    for part in step.parts(setting):
        before: list[Row] = list(entry["rows"])

        def take(rows: list[Row], before: list[Row] = before) -> None:
            entry["rows"] = before + rows
            entry["seconds"] = round(time.monotonic() - began, 1)
            report.write()

        trouble = _process(step, part, setting, until, take)
        if trouble:
            troubles.append(f"{part}: {trouble}" if part else trouble)
            entry["state"] = "; ".join(troubles)
        if until - time.monotonic() <= 0:
            break
    wrong = sum(bool(row.get("trouble")) for row in entry["rows"])
    if wrong:
        troubles.append(f"{wrong} of {len(entry['rows'])} rows with trouble")
    entry["state"] = "; ".join(troubles) or ("ok" if entry["rows"] else "said nothing")
    report.write()
    print(f"  {entry['state']}, {entry['seconds']:.0f} s", flush=True)


def _process(step: Step, part: str, setting: Setting, until: float, take: Callable[[list[Row]], None]) -> str:
    """Runs one part; `take` gets its rows as they come. Returns what went wrong, in words."""
    left = until - time.monotonic()
    if left <= 0:
        return "no time was left"
    mark = part.replace(",", "-")[:40] or "all"
    rows, errors = setting.folder / f"{mark}.jsonl", setting.folder / f"{mark}.err"
    command = [sys.executable, str(SCRIPT), "--only", step.name, "--part", part, "--folder", str(setting.folder)]
    command += ["--rows", str(rows), "--gpus", str(setting.gpus), *(["--pretend"] if setting.pretend else [])]
    with errors.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        seen = -1
        while True:
            code = _waited(process, min(_LOOK_SECONDS, max(0.01, until - time.monotonic())))
            lines = rows.read_text().splitlines() if rows.is_file() else []
            if len(lines) != seen:
                seen = len(lines)
                take([json.loads(line) for line in lines])
            if code is not None:
                break
            if time.monotonic() >= until:
                return f"ended after {left:.0f} s, its limit"
    finally:
        _end(process)
    if code == 0:
        return ""
    tail = errors.read_text(errors="replace")[-_TAIL:].strip().splitlines()
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}: {tail[-1] if tail else 'no message'}"


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it has started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _be_part(options: argparse.Namespace) -> int:
    """The process of one part: writes its rows as they come."""
    (step,) = (step for step in gpu_steps.STEPS if step.name == options.only)
    setting = Setting(options.pretend, options.gpus, options.folder)
    try:
        with options.rows.open("a") as file:
            for row in step.run(setting, options.part):
                file.write(json.dumps(row) + "\n")
                file.flush()
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", file=sys.stderr)
        return 1
    return 0


def _refuse(problem: str) -> int:
    print(f"gpu.py: {problem}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", metavar="STEP,STEP", help="these steps alone")
    parser.add_argument("--list", action="store_true", help="shows the steps")
    parser.add_argument("--pretend", action="store_true", help="tiny shapes on the CPU: tries the script")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the table goes")
    parser.add_argument("--minutes", type=float, default=25, help="for all steps together (25)")
    for name, kind in (("part", str), ("folder", Path), ("rows", Path), ("gpus", int)):  # of a part's process
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser
