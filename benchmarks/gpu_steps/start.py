"""A small job as a user starts it, its ranks forked from the warm server and spawned."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_steps import jobs
from gpu_steps.step import Row, Setting


def run(setting: Setting, part: str) -> Iterator[Row]:
    for start in ("fork", "spawn"):
        job = jobs.run(setting, start, f"launch.start={start}", "sp.size=1", "stages=[train]", "train.steps=3")
        train = job.stage("train")
        first = train.get("first_step_finished")
        yield {
            "launch.start": start,
            "device": job.results.get("device"),
            "loss": train.get("loss", [None])[-1],
            "first_step_after_s": first - job.began if first else None,
            "all_s": job.seconds,
            "trouble": job.trouble,
        }
