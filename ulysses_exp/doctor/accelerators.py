"""Accelerators, asked of NVIDIA's management library."""

from __future__ import annotations

from collections.abc import Iterator

from ulysses_exp.config import accelerators, device_of
from ulysses_exp.config.nvml import Nvml, NvmlError
from ulysses_exp.doctor.finding import Asked, Finding, ok, warning, wrong
from ulysses_exp.report.units import of_bytes

_BUSY = 0.1  # share of a GPU's memory that somebody else holds, from which on it is told


def check(asked: Asked) -> Iterator[Finding]:
    """The GPUs, their driver beside torch's CUDA, and what CUDA_VISIBLE_DEVICES leaves of them."""
    usable, visible = accelerators(), asked.environment.get("CUDA_VISIBLE_DEVICES")
    try:
        nvml = Nvml()
        driver, cuda, found = nvml.driver(), nvml.cuda(), list(nvml.devices())
    except (OSError, NvmlError) as error:
        if usable:
            mend = "install libnvidia-ml.so.1 of the driver's version; start a container with --gpus all"
            yield wrong("driver", f"{usable} NVIDIA device files, and no answer of the driver: {error}", mend)
        else:
            yield ok("GPUs", "none: jobs run on the CPU, over gloo", count=0)
        return
    yield ok("GPUs", ", ".join(f"{name}, {of_bytes(total)}" for name, total, _ in found) or "none", count=len(found))
    busy = [number for number, (_, total, used) in enumerate(found) if used > _BUSY * total]
    if busy:
        said = ", ".join(f"GPU {n}: {of_bytes(found[n][2])} of {of_bytes(found[n][1])}" for n in busy)
        yield warning("GPU memory", f"in use by others: {said}", "see nvidia-smi; CUDA_VISIBLE_DEVICES chooses")
    if visible is not None:
        yield from _visible(visible, len(found), usable)
    if found and device_of(asked.config) == "cuda":
        yield _built_for(driver, cuda)
        if asked.config.launch.name == "local" and asked.ranks > usable:
            yield wrong("ranks", f"{asked.ranks} ranks, {usable} GPUs", f"--ranks {usable}, or device=cpu")


def _visible(visible: str, present: int, usable: int) -> Iterator[Finding]:
    numbers = [int(d) for d in visible.split(",") if d.strip().isdigit()]
    said = f"CUDA_VISIBLE_DEVICES={visible}"
    if present and not usable:
        yield warning("visible", f"{said} hides all GPUs", "unset CUDA_VISIBLE_DEVICES to use them")
    elif missing := [n for n in numbers if n >= present]:
        yield wrong("visible", f"{said} names {missing}, there are {present} GPUs", f"name numbers below {present}")
    else:
        yield ok("visible", f"{said}: {usable} of {present} GPUs")


def _built_for(driver: str, cuda: tuple[int, int]) -> Finding:
    import torch.version

    said = f"driver {driver} runs CUDA up to {cuda[0]}.{cuda[1]}"
    built = torch.version.cuda
    index = f"pip install torch --index-url https://download.pytorch.org/whl/cu{cuda[0]}{cuda[1]}"
    if built is None:
        return wrong("driver", f"{said}, torch {torch.__version__} is built without CUDA", index)
    # within a major version an older driver runs newer code (CUDA's minor version compatibility)
    if int(built.split(".")[0]) > cuda[0]:
        return wrong("driver", f"{said}, torch is built for {built}", f"update the driver, or {index}")
    return ok("driver", f"{said}, torch is built for {built}")
