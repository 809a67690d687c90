"""A few questions to NVIDIA's management library: CUDA is not initialised in this process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))  # nvml.h


class NvmlError(RuntimeError):
    """NVML answers with an error; `str()` is its text."""


class Nvml:
    """The few questions asked of libnvidia-ml. Raises OSError where there is none, NvmlError."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._library.nvmlErrorString.restype = ctypes.c_char_p
        self._call("nvmlInit_v2")

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise NvmlError(f"{name}: {self._library.nvmlErrorString(code).decode()}")

    def driver(self) -> str:
        text = ctypes.create_string_buffer(80)
        self._call("nvmlSystemGetDriverVersion", text, 80)
        return text.value.decode()

    def cuda(self) -> tuple[int, int]:
        """The newest CUDA that the driver runs, e.g. (12, 4)."""
        number = ctypes.c_int()
        self._call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def devices(self) -> Iterator[tuple[str, int, int]]:
        """(name, bytes of memory, bytes in use) of each GPU."""
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        for number in range(count.value):
            handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory()
            self._call("nvmlDeviceGetHandleByIndex_v2", number, ctypes.byref(handle))
            self._call("nvmlDeviceGetName", handle, name, 96)
            self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
            yield name.value.decode(), memory.total, memory.used
