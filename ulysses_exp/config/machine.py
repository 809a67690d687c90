"""What of this machine decides how a job can run, found without importing torch."""

from __future__ import annotations

import glob
import os
import re
from functools import cache
from pathlib import Path

from ulysses_exp.config.nvml import Nvml, NvmlError
from ulysses_exp.config.schema import Config


def accelerators() -> int:
    """GPUs that a job may use, without importing torch: device files, narrowed by CUDA_VISIBLE_DEVICES."""
    present = len([p for p in glob.glob("/dev/nvidia[0-9]*") if p.removeprefix("/dev/nvidia").isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    chosen = [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    return min(present, len(chosen))


def attached_ranks() -> int | None:
    """How many ranks torchrun or srun says that it has started; None where it says nothing."""
    names = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
    said = next((os.environ.get(world, "") for rank, world in names if rank in os.environ), "")
    return int(said) if said.isdecimal() else None


def device_of(config: Config) -> str:
    """What `device=auto` means on this machine: `cuda` or `cpu`."""
    if config.device != "auto":
        return config.device
    return "cuda" if accelerators() else "cpu"


@cache
def gpu_memory() -> int | None:
    """Bytes of the smallest GPU that a job may use, without importing torch; None where the driver does not say."""
    try:
        sizes = [total for _, total, _ in Nvml().devices()]
    except (OSError, NvmlError):
        return None
    chosen = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip().isdigit()]
    return min((sizes[int(d)] for d in chosen if int(d) < len(sizes)), default=min(sizes, default=None))


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cores() -> float:
    """Cores that this process may use: those it is bound to, or the share that its control groups (v2) give it."""
    shares = [float(len(os.sched_getaffinity(0)))]
    for folder in control_groups():
        quota, _, period = contents(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            shares.append(int(quota) / int(period))
    return min(shares)


def control_groups() -> list[Path]:
    """The folders of this process's control group (v2) and of those above it."""
    root = Path("/sys/fs/cgroup")
    own = re.findall(r"^0::/(.*)$", contents(Path("/proc/self/cgroup")), re.MULTILINE)
    folder = root / own[0] if own else root
    return [f for f in (folder, *folder.parents) if f == root or root in f.parents]


def contents(path: Path) -> str:
    """Of a file of the kernel's; nothing where it is not on this kernel, or not in this container."""
    try:
        return path.read_text()
    except OSError:
        return ""
