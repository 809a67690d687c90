"""How long a report of many runs takes, and how large it is.

    python benchmarks/report_scale.py [--runs 10 100 1000 3000] [--keep FOLDER]

Makes run folders as jobs leave them (results.json, metrics.jsonl, a composed configuration), with made-up figures: 4
layouts, 2 lengths, 5 learning rates and as many seeds as it takes; of a hundred runs one has a loss that is not finite,
three failed, one is still running and five were skipped. Then `python -m ulysses_exp.report` in a process of its own.
Seconds are processor time of that process, so that other work on the machine does not count; wall time stands beside.

Writes benchmarks/results/report_scale.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "report")]

LAYOUTS = ((1, 1, 0), (2, 1, 2), (4, 1, 3), (2, 2, 3))
LENGTHS, RATES, STEPS = (1024, 4096), (0.0003, 0.001, 0.003, 0.01, 0.03), 50
TARGET_SECONDS, TARGET_BYTES, TARGET_RUNS = 10.0, 2_000_000, 1000


def make(folder: Path, count: int) -> None:
    """`count` run folders below `folder`, always the same ones."""
    composed = _composed()
    combinations = list(itertools.product(RATES, LENGTHS, LAYOUTS))
    for number in range(count):
        seed, (rate, seq_len, layout) = number // len(combinations), combinations[number % len(combinations)]
        made = _made(number, seed, rate, seq_len, layout)
        sp, dp, zero = layout
        overrides = [f"sp.size={sp}", f"dp.size={dp}", f"zero.stage={zero}", f"train.seq_len={seq_len}",
                     f"optim.lr={rate}", f"seed={seed}"]  # fmt: skip
        run = folder / f"{number:04d}-{','.join(overrides)}"
        (run / ".hydra").mkdir(parents=True)
        config = composed
        for key, value in (
            ("seq_len: 512", f"seq_len: {seq_len}"), ("lr: 0.001", f"lr: {rate}"), ("\nseed: 0", f"\nseed: {seed}"),
        ):  # fmt: skip
            assert key in config, key
            config = config.replace(key, value)
        (run / ".hydra" / "config.yaml").write_text(config)
        (run / ".hydra" / "overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
        (run / "results.json").write_text(json.dumps(made, indent=1))
        train = made["stages"].get("train", {})
        with open(run / "metrics.jsonl", "w") as lines:
            for step, loss in enumerate(train.get("loss", []), 1):
                lines.write(json.dumps({"step": step, "train/loss": loss, "train/grad_norm": 1.0}) + "\n")


def _made(number: int, seed: int, rate: float, seq_len: int, layout: tuple[int, int, int]) -> dict[str, Any]:
    """results.json: layouts of one setting agree to rounding, rates and seeds differ, some jobs do not end well."""
    from made_up_results import results

    made = results(*layout, seq_len, STEPS)
    of_setting, of_run = random.Random(f"{seed} {rate} {seq_len}"), random.Random(number)
    ends = 2.2 + 0.5 * abs(math.log10(rate / 0.003)) + of_setting.gauss(0, 0.05)
    noise = [of_setting.gauss(0, 0.02) for _ in range(STEPS)]
    falls = 6 * rate**0.25
    train = made["stages"]["train"]
    train["loss"] = [
        (ends + (5.5 - ends) * math.exp(-falls * step / 10) + noise[step]) * (1 + of_run.gauss(0, 2e-8))
        for step in range(STEPS)
    ]
    slower = of_run.lognormvariate(0, 0.06)
    train["tokens_per_second"] /= slower
    train["step_time_s"] = {key: seconds * slower for key, seconds in train["step_time_s"].items()}
    kind = number % 100
    if kind == 50:
        train["loss"][of_run.randrange(5, STEPS) :] = [math.nan] * 5
    elif kind in (51, 52, 53):
        made.update(status="failed", error=f"stage train: rank 1: out of memory at step {number}")
        train.update(status="failed", reason=f"rank 1: out of memory at step {number}")
    elif kind == 54:
        made.update(status="running")
        made["stages"] = {}
    elif kind in (55, 56, 57, 58, 59):
        made.update(status="skipped", error=f"sp.size: {layout[0] * 3} does not divide the 8 query heads; set 1, 2, 4")
        made["stages"] = {}
    return made


def _composed() -> str:
    from omegaconf import OmegaConf

    import ulysses_exp.config  # noqa: F401  registers the schema
    from ulysses_exp.config.composing import composed

    return OmegaConf.to_yaml(composed([])[0])


def measure(count: int, folder: Path) -> tuple[float, float, int, int, int, int]:
    """Processor seconds, wall seconds, bytes of report.html and of report.md, pictures, lines of warnings."""
    shutil.rmtree(folder, ignore_errors=True)
    make(folder, count)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ulysses_exp.report", str(folder)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sizes = [(folder / f"report.{kind}").stat().st_size for kind in ("html", "md")]
    return seconds, wall, *sizes, len(list(folder.glob("*.png"))), len(done.stderr.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000, 3000])
    parser.add_argument("--keep", type=Path, help="leave the run folders and reports here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in arguments.runs:
            figures = measure(count, (arguments.keep or Path(temporary)) / f"runs{count}")
            rows.append((count, figures))
            print(count, figures, flush=True)
    if arguments.keep or arguments.runs != [10, 100, 1000, 3000]:
        return 0
    lines = [
        "# The report of many runs",
        "",
        "`python benchmarks/report_scale.py`: made-up runs, the report in a process of its own, its imports included. "
        f"Asked for: at most {TARGET_SECONDS:.0f} s and {TARGET_BYTES / 1e6:.0f} MB of report.html for "
        f"{TARGET_RUNS:,} runs.",
        "",
        "| runs | processor s | wall s | report.html | report.md | pictures | warnings |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count, (seconds, wall, page, document, pictures, warnings) in rows:
        lines.append(
            f"| {count:,} | {seconds:.1f} | {wall:.1f} | {page / 1e6:.2f} MB | {document / 1e3:.0f} kB | {pictures} | "
            f"{warnings} |"
        )
    (ROOT / "benchmarks" / "results" / "report_scale.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
