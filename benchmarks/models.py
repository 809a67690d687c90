"""Which types of causal LM of the installed transformers give the right numbers under `ulysses()`.

    python benchmarks/models.py [--types llama,gpt_oss] [--go-on] [--jobs 1] [--within 60]

Every type is built tiny (`ulysses_exp.model.tiny`) and run over 2 and 4 gloo ranks: plain, packed, padded on the right
and on the left, and without position_ids. Logits and the gradient of all parameters are compared with one process of
the unpatched model that reads each document alone; fp32, relative by norm, tolerance 1e-5. What a type does:

- right: within the tolerance in every trial; a gradient also within what fp32 alone rounds the reference's by (its
  distance from fp64, at most 1e-4), which is then said;
- refused: this project says why it cannot be, in at least one trial, and no trial is worse;
- wrong: another number, and nobody says so;
- crashed: any other error, or ranks that stand still;
- not buildable: no tiny copy, by its defaults, that one process can run, or that would show anything.

Writes benchmarks/results/models.json as types end, then docs/models.md, and the types that are right into the package
(`ulysses_exp.config.tried`): those are not tried before a job's first step. `--types` tries these again and keeps the
rest; `--go-on` tries what is not there yet, or was tried with other versions. Five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore",
               "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip
os.environ.pop("LOCAL_SIZE", None)

import models_trial  # noqa: E402
from models_table import markdown  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

import ulysses_exp.rank.preload  # noqa: E402, F401 (what ranks import, once for all)
from ulysses_exp.config import tried  # noqa: E402
from ulysses_exp.rank.upstream import without_operators_of_its_own  # noqa: E402

VERSIONS = {name: version(name) for name in ("torch", "transformers", "deepspeed")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="names, with commas; the default is every type")
    parser.add_argument("--go-on", action="store_true", help="leave out what has a result of these versions")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time, four ranks each")
    parser.add_argument("--within", type=float, default=60.0, help="seconds that a trial may take")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "models.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "models.md")
    parser.add_argument("--known", type=Path, default=tried.FILE)
    arguments = parser.parse_args()
    every = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    wanted = arguments.types.split(",") if arguments.types else every
    if unknown := sorted(set(wanted) - set(every)):
        parser.error(f"no causal LM of transformers {VERSIONS['transformers']}: {', '.join(unknown)}")
    results: dict[str, Any] = {}
    if arguments.go_on or arguments.types:
        results = before(arguments.out)
    if arguments.go_on:
        wanted = [kind for kind in wanted if kind not in results]
    without_operators_of_its_own()
    began = time.monotonic()
    for kind, result in ended(wanted, arguments.jobs, arguments.within):
        results[kind] = result | {"date": date.today().isoformat()}
        print(f"{time.monotonic() - began:5.0f} s  {kind}: {result['result']}  {result['reason']}", flush=True)
        report = {"versions": VERSIONS, "types": {name: results[name] for name in every if name in results}}
        temporary = arguments.out.with_suffix(".tmp")
        temporary.write_text(lines(report))
        temporary.replace(arguments.out)
    report = json.loads(arguments.out.read_text())
    arguments.docs.write_text(markdown(report, len(every)))
    good = [name for name, one in report["types"].items() if one["result"] == "right"]
    known = {"transformers": VERSIONS["transformers"], "right": good}
    arguments.known.write_text(json.dumps(known, indent=1) + "\n")


def lines(report: dict[str, Any]) -> str:
    """JSON, a type a line."""
    types = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in report["types"].items())
    return f'{{"versions": {json.dumps(report["versions"])},\n"types": {{\n{types}\n}}}}\n'


def before(file: Path) -> dict[str, Any]:
    """Results of an earlier run with the same versions."""
    if not file.exists():
        return {}
    report = json.loads(file.read_text())
    return report["types"] if report["versions"] == VERSIONS else {}


def ended(kinds: list[str], jobs: int, within_s: float) -> Any:
    """(type, result) of each as it ends; at most `jobs` at a time, each in a process group of its own."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(kinds)), {}
    trials = len(models_trial.SIZES) * (len(models_trial.BATCHES) + 1)
    while waiting or running:
        while waiting and len(running) < jobs:
            here, there = context.Pipe()
            kind = waiting.pop()
            process = context.Process(target=alone, args=(kind, within_s, there))
            process.start()
            there.close()
            running[here] = (kind, process, time.monotonic() + (trials + 2) * within_s)
        ready = wait(list(running), timeout=1)
        late = [pipe for pipe, (_, _, until) in running.items() if time.monotonic() > until]
        for pipe in {*ready, *late}:
            kind, process, _ = running.pop(pipe)  # type: ignore[index]
            try:
                result = pipe.recv() if pipe in ready else None  # type: ignore[union-attr]
            except EOFError:
                result = None
            end(process)
            yield kind, result or {"result": "crashed", "reason": "its process died or did not end", "trials": {}}


def alone(kind: str, within_s: float, answer: Connection) -> None:
    """In a process of its own; what libraries print goes nowhere."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    answer.send(models_trial.tried(kind, within_s))


def end(process: Any) -> None:
    """With the ranks that it may have left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


if __name__ == "__main__":
    main()
