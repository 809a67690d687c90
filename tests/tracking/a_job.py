"""A process that tracks a job as its parent does: `python a_job.py MODE FOLDER [steps] [seconds a step]`.

Prints one JSON object: what the tracker said, and how long `log` and `finish` held the job up.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ulysses_exp.config import Config
from ulysses_exp.tracking.run import Tracker

#: Every metric of the contract, section 4
METRICS = (
    "train/loss", "train/grad_norm", "train/learning_rate", "perf/tokens_per_second", "perf/tokens_per_second_per_rank",
    "perf/step_time_s", "perf/tflops_per_rank", "perf/mfu", "perf/hfu", "memory/peak_bytes_max",
    "memory/peak_bytes_mean", "comm/all_to_all_bytes",
)  # fmt: skip
LATER = ("eval/bypass/loss", "eval/sp/loss", "reload/seconds")

RESULTS = {
    "schema_version": 1,
    "status": "ok",
    "layout": {"name": "sp2-dp1-z3", "sp": 2},
    "stages": {
        "train": {"status": "ok", "loss": [3.0, 2.0], "tokens_per_second": 1234.5, "step_time_s": {"median": 0.25}},
        "reload": {
            "status": "ok",
            "cells": [
                {"source": "sp2-dp1-z3", "target": "sp1-dp1-z0", "route": "portable", "status": "ok", "seconds": 1.5,
                 "weights_bit_exact": True, "optimizer_bit_exact": True, "continuation_max_abs_loss_diff": 0.0},
            ],
        },
        "claims": {
            "status": "ok",
            "C6": {"claim": "save_checkpoint() writes the full weights.",
                   "upstream": {"verdict": "holds if", "figure": "0%", "cells": {
                       "sp2-dp1-z0": {"verdict": "holds", "figure": "100%"},
                       "sp2-dp1-z3": {"verdict": "does not hold", "figure": "0%", "why": "in parts", "finding": 23}}},
                   "here": {"verdict": "holds", "figure": "100%", "cells": {}}},
        },
    },
}  # fmt: skip


def config(mode: str) -> Config:
    made = Config()
    made.model.name = "tiny_llama"
    made.zero.stage = 3
    made.tracker.mode = mode
    return made


def tracker(mode: str, folder: Path, on_warning: Callable[[str], None] = print) -> Tracker:
    return Tracker(
        config(mode),
        folder,
        resolved={"sp": {"size": 2}, "hub": {"api_key": "hf_secret", "token": "hf_secret"}, "tokenizer": "bytes"},
        name="tiny_llama-sp2-dp1-z3",
        group="ladder",
        tags=["train", "reload"],
        on_warning=on_warning,
    )


def main(mode: str, folder: Path, steps: int = 3, pause: float = 0.05) -> None:
    warnings: list[str] = []
    began = time.perf_counter()
    run = tracker(mode, folder, warnings.append)
    for step in range(1, steps + 1):
        run.log({name: step + i / 10 for i, name in enumerate(METRICS)}, step)
        print(step, file=sys.stderr, flush=True)
        time.sleep(pause)
    run.log(dict.fromkeys(LATER, 0.5), steps)
    logging_s = time.perf_counter() - began - steps * pause
    began = time.perf_counter()
    run.finish(RESULTS, failed=False)
    finishing_s = time.perf_counter() - began
    told = {
        "warnings": warnings,
        "logging_s": logging_s,
        "finishing_s": finishing_s,
        "how_to_open": run.how_to_open,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:4]), *map(float, sys.argv[4:5]))
