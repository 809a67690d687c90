"""What a run says whose ranks run out of memory, and how long after the first of them did."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator

from gpu_steps import jobs
from gpu_steps.step import Row, Setting

PRETENDED_MEMORY = 4 * 2**30  # bytes of data that a process may have
#: Logits of hundreds of GB after a forward that is done in a second: a small model with a large vocabulary.
TOO_MUCH = ("model.architecture.vocab_size=131072", "data=synthetic", "train.global_batch_size=1", "stages=[train]")


def little_memory() -> None:
    """Pretended: for `before` of a job."""
    resource.setrlimit(resource.RLIMIT_DATA, (PRETENDED_MEMORY, PRETENDED_MEMORY))


def parts(setting: Setting) -> list[str]:
    return setting.pick(["1", "2"], ["1"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: how many ranks, which share a GPU."""
    tokens = setting.pick(524_288, 16_384)
    job = jobs.run(
        setting, f"{part}-ranks", f"sp.size={part}", f"train.seq_len={tokens}", "launch.backend=gloo", *TOO_MUCH,
        f"model.architecture.max_position_embeddings={tokens}", one_gpu=True,
        before=little_memory if setting.pretend else None,
    )  # fmt: skip
    yield {"ranks": int(part), **told(job)}


def told(job: jobs.Job) -> Row:
    """What became of a job that was to run out of memory."""
    said = str(job.results.get("error"))
    records = job.folder.glob("ranks/*/error-rank*.json")
    first = min((json.loads(path.read_text())["time"] for path in records), default=None)
    return {
        "exit code": job.code,
        "ended after_s": job.seconds,
        "after the first error_s": job.ended - first if first else None,
        "error": said,
        "trouble": None if job.code == 1 and "out of memory" in said else f"not told as out of memory: {job.trouble}",
    }
