"""A rank on every GPU, over NCCL: the same numbers, each stage, the collectives' rates, and long sequences."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from gpu_steps import jobs, ranks
from gpu_steps.lengths import measured, shape
from gpu_steps.step import Row, Setting

MOST = 8  # of tiny_llama's heads


def parts(setting: Setting) -> list[str]:
    real = ["parity", "end to end", "collectives", "speed", "out of memory"]
    return setting.pick(real, ["parity", "collectives", "speed"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    sp = setting.pick(1 << (min(setting.gpus, MOST).bit_length() - 1), 2)
    if part == "collectives":
        yield from collectives(setting, sp)
    elif part == "speed":
        lengths = setting.pick([131_072, 262_144, 524_288], [256, 512])
        overrides = shape(setting, 8, "memory=alst", f"sp.size={sp}", f"train.seq_len={lengths[0]}")
        for row in ranks.rows(setting, "speed", ranks.configured(setting, *overrides), measured, lengths, 60.0):
            yield {"part": part, "sp": sp, **row}
    else:
        more = {
            "parity": ["stages=[parity]", "zero.stage=3", "optim=sgd"],
            "end to end": ["zero.stage=3", "train.steps=5"],
            "out of memory": [
                "stages=[train]", "train.seq_len=4194304", "model.architecture.vocab_size=131072", "data=synthetic",
                "model.architecture.max_position_embeddings=4194304", "train.global_batch_size=1",
            ],
        }[part]  # fmt: skip
        job = jobs.run(setting, part.replace(" ", "-"), f"sp.size={sp}", *more)
        said = str(job.results.get("error"))
        told = part == "out of memory" and job.code == 1 and "out of memory" in said
        parity = job.stage("parity")
        yield {
            "part": part,
            "sp": sp,
            "became": said if told else job.results.get("status"),
            "relative difference of loss": parity.get("max_rel_loss_diff"),
            "of weights": parity.get("max_rel_weight_diff"),
            "all_s": job.seconds,
            "trouble": None if told else job.trouble,
        }


def collectives(setting: Setting, ranks: int) -> Iterator[Row]:
    """Rates of the doctor's collectives, a row each."""
    command = [sys.executable, "-m", "ulysses_exp.doctor", "--json", "--ranks", str(ranks), f"device={setting.device}"]
    done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        yield {"part": "collectives", "sp": ranks, "trouble": (done.stderr or done.stdout).strip()[-300:]}
        return
    for finding in found["findings"]:
        if finding["subject"] in ("accelerators", "collectives"):
            yield {
                "part": "collectives",
                "sp": ranks,
                "became": f"{finding['name']}: {finding['said']}",
                "trouble": finding["said"] if finding["state"] == "wrong" else None,
            }
