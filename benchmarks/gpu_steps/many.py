"""A rank on every GPU, over NCCL: the same numbers, each stage, the collectives' rates, and long sequences."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from gpu_steps import jobs, ranks
from gpu_steps.lengths import measured, shape
from gpu_steps.out_of_memory import TOO_MUCH, little_memory, told
from gpu_steps.step import Row, Setting

MOST = 8  # of tiny_llama's heads


def parts(setting: Setting) -> list[str]:
    real = ["parity", "end to end", "collectives", "speed", "out of memory"]
    return setting.pick(real, ["parity", "collectives", "speed", "out of memory"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    sp = setting.pick(1 << (min(setting.gpus, MOST).bit_length() - 1), 2)
    if part == "collectives":
        yield from collectives(setting, sp)
    elif part == "speed":
        lengths = setting.pick([131_072, 262_144, 524_288], [256, 512])
        overrides = shape(setting, 8, "memory=alst", f"sp.size={sp}", f"train.seq_len={lengths[0]}")
        for row in ranks.rows(setting, "speed", ranks.configured(setting, *overrides), measured, lengths, 60.0):
            yield {"part": part, "sp": sp, **row}
    elif part == "out of memory":
        tokens = setting.pick(32_768, 8_192) * sp
        with first_gpu_full(setting):
            job = jobs.run(
                setting, "out-of-memory", f"sp.size={sp}", f"train.seq_len={tokens}", "launch.timeout_s=60", *TOO_MUCH,
                f"model.architecture.max_position_embeddings={tokens}",
                before=little_memory if setting.pretend else None,
            )  # fmt: skip
        yield {"part": part, "sp": sp, **told(job)}
    else:
        more = ["stages=[parity]", "optim=sgd"] if part == "parity" else ["train.steps=5"]
        job = jobs.run(setting, part.replace(" ", "-"), f"sp.size={sp}", "zero.stage=3", *more)
        parity = job.stage("parity")
        yield {
            "part": part,
            "sp": sp,
            "became": job.results.get("status"),
            "relative difference of loss": parity.get("max_rel_loss_diff"),
            "of weights": parity.get("max_rel_weight_diff"),
            "all_s": job.seconds,
            "trouble": job.trouble,
        }


@contextlib.contextmanager
def first_gpu_full(setting: Setting) -> Iterator[None]:
    """Within, the first GPU has 4 GiB left: of a job's ranks one alone runs out of memory, the others wait for it."""
    if setting.pretend:
        yield
        return
    import torch

    free, _ = torch.cuda.mem_get_info(0)
    taken = torch.empty(free - 4 * 2**30, dtype=torch.uint8, device="cuda:0")
    yield
    del taken


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
