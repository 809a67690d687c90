"""The environment that ranks inherit, whoever starts them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

#: Set where OMP_NUM_THREADS is this project's and not the user's
THREADS_FOR_US_TO_SAY = "ULYSSES_EXP_THREADS"


def prepare(device: str) -> None:
    """Sets, in this process, what its ranks are to inherit; the user's own settings stay.

    Args:
        device: `cpu`, `cuda`, or `auto` where the ranks run on other machines.
    """
    # DeepSpeed's shared-memory all-reduce leaves 69 MB a rank in /dev/shm where LOCAL_SIZE is set (docs/findings.md)
    os.environ.pop("LOCAL_SIZE", None)
    if "OMP_NUM_THREADS" not in os.environ:  # ranks share the cores; on accelerators they take their share
        os.environ |= {"OMP_NUM_THREADS": "1", THREADS_FOR_US_TO_SAY: "1"}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # torch's other way to look for GPUs leaves a process whose forks cannot use them
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if device != "auto":  # DeepSpeed would look itself, in every process that imports it
        os.environ.setdefault("DS_ACCELERATOR", device)
    make_importable()


#: Files of NCCL's flight recorder in a task's folder, by rank: the last collectives of a rank when one took too long
COLLECTIVES = "collectives-rank"


def record_collectives(folder: Path) -> None:
    """In a rank, before NCCL is up: when a collective times out, its flight recorder writes into `folder`.

    All of this is torch 2.13's default but for the place, which is ~/.cache/torch (ProcessGroupNCCL.hpp,
    FlightRecorder.hpp; `torchfrtrace` reads the files). The user's own settings stay.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for new, old, value in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / COLLECTIVES)),
    ):
        if old not in os.environ:  # torch takes the new name first
            os.environ.setdefault(new, value)


def make_importable() -> None:
    """Processes started from here on find this package, also where it is a checkout that is not installed.

    They do not look for modules in the current folder, which may be somebody else's.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    here = str(Path(__file__).resolve().parents[2])
    if here not in (paths := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, paths)])


def remove_empty_cache() -> None:
    """Removes what importing transformers leaves in the temporary folder.

    It imports torch._dynamo, which makes a folder for a cache of compiled code (torch 2.13, _dynamo/package.py). Here
    nothing is compiled, so it stays empty.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with contextlib.suppress(OSError):  # not empty: somebody else compiles
        os.rmdir(cache_dir())
