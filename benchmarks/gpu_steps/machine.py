"""The machine and the versions that a table is of. Starts no CUDA."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ulysses_exp.doctor.accelerators import Nvml, NvmlError
from ulysses_exp.doctor.versions import declared
from ulysses_exp.report.units import of_bytes

SHOWN = ("torch", "deepspeed", "transformers", "triton", "flash-attn", "flash-attn-3", "nvidia-nccl-cu13", "kernels")


def describe(pretend: bool) -> dict[str, Any]:
    """Device, driver, versions. Raises OSError or NvmlError where there is no GPU and nothing is pretended."""
    found: dict[str, Any] = {"device": "pretended", "devices": [], "driver": "none"}
    if not pretend:
        nvml = Nvml()
        devices = list(nvml.devices())
        cuda = ".".join(map(str, nvml.cuda()))
        found = {
            "device": devices[0][0],
            "devices": [f"{name}, {of_bytes(total)}" for name, total, _ in devices],
            "driver": f"{nvml.driver()}, CUDA up to {cuda}",
        }
    return found | {
        "system": f"{platform.platform()}, Python {platform.python_version()}, {_processor()}",
        "versions": {name: there for name in SHOWN if (there := _version(name))},
        "commit": _commit(),
    }


def unmet() -> tuple[list[str], list[str]]:
    """(what is not installed, what is installed in a version that pyproject.toml does not allow), each in words."""
    missing, others = [], []
    for requirement in (r for r in declared()[1] if r.marker is None):
        here = _version(requirement.name)
        if here is None:
            missing.append(f"{requirement.name}{requirement.specifier}")
        elif not requirement.specifier.contains(here, prereleases=True):
            others.append(f"{requirement.name} {here} ({requirement.specifier} is needed)")
    return missing, others


def slug(device: str) -> str:
    """The device's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


__all__ = ["NvmlError", "describe", "slug", "unmet"]
