"""torch's linear_cross_entropy beside this project's losses: time and peak memory of forward and backward, on CPU.

    python benchmarks/linear_cross_entropy.py [--rounds 3]

Each figure is made by a process of its own. Writes benchmarks/results/linear_cross_entropy.{json,md}; on a GPU the step
`loss` of benchmarks/gpu.py does the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])

from losses import WAYS, measure  # noqa: E402

from ulysses_exp.report.units import of_bytes, of_seconds  # noqa: E402

SIZES = ((2048, 1024, 32_768),)  # tokens, hidden size, vocabulary


def _measured(sending: Connection, way: str, arguments: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    sending.send(measure(way, **arguments))


def alone(way: str, **arguments: Any) -> dict[str, Any]:
    """`measure` in a process of its own. Raises EOFError where that fails."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sending, way, arguments))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    report = {"torch": version("torch"), "transformers": version("transformers"), "rows": rows}
    for tokens, hidden, vocabulary in SIZES:
        for dtype in ("float32", "bfloat16"):
            for way in WAYS:
                size = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "dtype": dtype}
                found = alone(way, **size, device="cpu", rounds=options.rounds)
                rows.append(size | {"way": way} | found)
                print(json.dumps(rows[-1]), flush=True)
                (options.out / "linear_cross_entropy.json").write_text(json.dumps(report, indent=1) + "\n")
                (options.out / "linear_cross_entropy.md").write_text(document(report, options.rounds))


def document(report: dict[str, Any], rounds: int) -> str:
    lines = [
        "# torch's linear_cross_entropy beside this project's losses",
        "",
        "`python benchmarks/linear_cross_entropy.py`: from hidden states to the loss and back, CPU, one thread, torch "
        f"{report['torch']}, transformers {report['transformers']}; the least of {rounds} rounds, "
        "on a machine that others used too. Memory is what comes on top of weights, inputs and their gradients. Errors "
        "are relative to fp32 by transformers, of the loss, the hidden states' gradient and the head's.",
    ]
    groups = dict.fromkeys((r["tokens"], r["hidden"], r["vocabulary"], r["dtype"]) for r in report["rows"])
    for tokens, hidden, vocabulary, dtype in groups:
        logits = tokens * vocabulary * (4 if dtype == "float32" else 2)
        lines += [
            "",
            f"## {tokens:,} tokens, hidden size {hidden:,}, vocabulary {vocabulary:,}, {dtype} "
            f"(logits: {of_bytes(logits)})",
            "",
            "| way | time | memory | error of the loss | of the gradient | of the head's gradient |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for r in report["rows"]:
            if (r["tokens"], r["hidden"], r["vocabulary"], r["dtype"]) == (tokens, hidden, vocabulary, dtype):
                errors = " | ".join(f"{r[name]:.1e}" if name in r else "" for name in ("loss", "gradient", "weight"))
                lines.append(f"| {r['way']} | {of_seconds(r['seconds'])} | {of_bytes(r['more_bytes'])} | {errors} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
