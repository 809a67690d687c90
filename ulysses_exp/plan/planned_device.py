"""A GPU that is not there: the device `planned`, whose tensors have shapes and sizes and no memory.

torch takes it for an accelerator (a Python backend under the PrivateUse1 key) and DeepSpeed for its accelerator, so
that both take the paths they take on a GPU: states in host memory and states on the device stay apart. Registering it
cannot be undone, hence it is done in a process of its own (`trace`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "planned"


class PlannedAccelerator(CPU_Accelerator):
    """DeepSpeed's view of the device. It works on one stream, so what overlaps on a GPU is sequential here."""

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{NAME}:0"

    def device(self, device_index: int | None = None) -> Any:
        return contextlib.nullcontext()

    def device_count(self) -> int:
        return 1

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_cached = max_memory_cached = memory_allocated


class _Module:
    """`torch.planned`: what torch and DeepSpeed ask of an accelerator's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class _NoValues(FakeTensorMode):
    """`torch.tensor(..., device="planned")` makes the number on the host, as fake tensors do where CUDA is absent."""

    @property
    def avoid_device_init(self) -> bool:
        return True


def register() -> None:
    """Adds the device to torch and makes it DeepSpeed's accelerator. For the rest of this process."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, _Module())
    set_accelerator(PlannedAccelerator())


_make_subclass: Any = torch.Tensor._make_subclass
_data: Any = torch._C.TensorBase.data


def _as_on_host(*args: Any, device_for_backend_keys: torch.device | None = None, **kwargs: Any) -> torch.Tensor:
    """Gives tensors of the device the dispatch keys of host tensors: torch lets `tensor.data = other` move a tensor
    between host and GPU, as DeepSpeed does with weights, but not between the host and a backend in Python."""
    if device_for_backend_keys is not None and device_for_backend_keys.type == NAME:
        device_for_backend_keys = torch.device("cpu")
    return _make_subclass(*args, device_for_backend_keys=device_for_backend_keys, **kwargs)


def _set_data(tensor: FakeTensor, other: torch.Tensor) -> None:
    """`tensor.data = other`; a fake tensor notes its device on its own."""
    _data.__set__(tensor, other)
    tensor.fake_device = other.device


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """Within, every new tensor, on host or device, has no memory behind it; autograd works on this thread."""
    with (
        patch.object(torch.Tensor, "_make_subclass", staticmethod(_as_on_host)),
        patch.object(FakeTensor, "data", property(_data.__get__, _set_data), create=True),
        _NoValues(allow_non_fake_inputs=True),
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield
