"""A torch that says it has eight GPUs, and writes down every call that would start CUDA or spoil forks for it.

`python pretend.py MODULE` imports MODULE under it and prints the calls as JSON. What CUDA does to a fork: once
`cudaGetDeviceCount` was called, or CUDA was initialised, no fork of the process can use a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

import torch

calls: list[str] = []


def _spoils(what: str, returns: object):
    def called(*args: object, **kwargs: object) -> object:
        frames = [f for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename]
        calls.append(f"{what} from {frames[-1].filename}:{frames[-1].lineno}")
        return returns

    return called


def install() -> None:
    """Makes torch.cuda what it is with eight GPUs, as far as asking for them goes."""
    asks = _spoils("cudaGetDeviceCount", True)
    nvml = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") == "1"  # as torch/cuda/__init__.py decides
    torch.cuda.is_available = (lambda: True) if nvml else asks
    torch.cuda.device_count = lambda: 8  # of NVML, which spoils nothing
    torch.cuda._lazy_init = _spoils("initialisation", None)
    for name in ("get_device_properties", "get_device_capability", "get_device_name", "mem_get_info"):
        setattr(torch.cuda, name, _spoils(name, (9, 0)))


if __name__ == "__main__":
    install()
    importlib.import_module(sys.argv[1])
    print(json.dumps(calls))
