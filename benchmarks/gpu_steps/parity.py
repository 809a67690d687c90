"""Stage parity on the GPU: sp 2 (sharing one) beside one process with transformers' own attention and loss."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_steps import jobs
from gpu_steps.step import Row, Setting

FP32 = ("optim=sgd",)
JOBS: dict[str, tuple[str, ...]] = {
    "fp32, z3": ("zero.stage=3", "zero.param_persistence_threshold=0", *FP32),
    "bf16, z2": ("zero.stage=2", "train.precision=bf16", *FP32),
    "fp32, packed": ("zero.stage=2", "data=packed", *FP32),
    "fp32, windows": ("zero.stage=2", "model=tiny_mistral_window", *FP32),
    "fp32, all savers": ("zero.stage=3", "memory=alst", *FP32),
}


def parts(setting: Setting) -> list[str]:
    return setting.pick(list(JOBS), ["fp32, packed"])


def run(setting: Setting, part: str) -> Iterator[Row]:
    """Args: part: a name in JOBS."""
    name = part.replace(", ", "-").replace(" ", "-")
    job = jobs.run(setting, name, "stages=[parity]", "sp.size=2", "launch.backend=gloo", *JOBS[part], one_gpu=True)
    parity = job.stage("parity")
    yield {
        "job": part,
        "parity": parity.get("status"),
        "relative difference of loss": parity.get("max_rel_loss_diff"),
        "of gradient norm": parity.get("max_rel_grad_norm_diff"),
        "of weights": parity.get("max_rel_weight_diff"),
        "all_s": job.seconds,
        "trouble": job.trouble,
    }
