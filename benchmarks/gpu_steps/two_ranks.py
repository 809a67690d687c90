"""sp 2 on one GPU, end to end: NCCL refuses two ranks on a device, gloo takes them by way of host memory."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_steps import jobs
from gpu_steps.step import Row, Setting


def parts(setting: Setting) -> list[str]:
    return setting.pick(["2", "3", "0"], ["3"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: the ZeRO stage."""
    job = jobs.run(
        setting, f"z{part}", "sp.size=2", f"zero.stage={part}", "launch.backend=gloo", "train.steps=5", one_gpu=True
    )
    train, evaluated, reload = (job.stage(name) for name in ("train", "eval", "reload"))
    losses = train.get("loss") or [None]
    yield {
        "layout": f"sp2-dp1-z{part}",
        "loss, first": losses[0],
        "loss, last": losses[-1],
        "step_s": train.get("step_time_s", {}).get("median"),
        "eval": evaluated.get("status"),
        "largest difference of a logit": evaluated.get("max_abs_logit_diff"),
        "reload": reload.get("status"),
        "all_s": job.seconds,
        "trouble": job.trouble,
    }
