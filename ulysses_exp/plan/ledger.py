"""Live bytes by device and kind, and collectives, as the operators of a traced program run."""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

#: What memory is for. The innermost frame whose file is of one of these says which, so a gather that DeepSpeed starts
#: from within the model's forward counts as DeepSpeed's and the model's own tensors as the model's.
KINDS = ("parameters", "gradients", "optimizer", "activations", "gathered_parameters", "buffers")

_BY_FILE = (
    ("/deepspeed/sequence/", "activations"),
    ("/deepspeed/runtime/sequence_parallel/", "activations"),
    ("/deepspeed/runtime/zero/linear", "activations"),
    ("/deepspeed/runtime/zero/partition_parameters", "gathered_parameters"),
    ("/deepspeed/runtime/zero/partitioned_param_coordinator", "gathered_parameters"),
    ("/deepspeed/", "buffers"),
    ("/torch/optim/", "optimizer"),
    ("/torch/autograd/", "activations"),
    ("/torch/utils/checkpoint", "activations"),
    ("/transformers/", "activations"),
    ("/ulysses_exp/model/build", "parameters"),
    ("/ulysses_exp/rank/engine", "activations"),
    ("/ulysses_exp/rank/mixed_precision", "parameters"),
    ("/ulysses_exp/rank/step", "activations"),
    ("/ulysses_exp/model/memory/tile_gradients", "gradients"),
)

#: The allocator of torch on CUDA hands out multiples of this (c10/cuda/CUDACachingAllocator.h, kMinBlockSize).
CUDA_BLOCK = 512

#: Operators whose kernels hold as much again as their input while they run (aten/src/ATen/native/ReduceOps.cpp).
_WITH_SCRATCH = (torch.ops.aten.logsumexp.default,)

_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Ledger(TorchDispatchMode):
    """Counts, while it is active, every storage that an operator makes until it is freed.

    Attributes:
        peaks: by phase and device type, the largest number of live bytes and what it consisted of by kind.
        collectives: by phase, (operator, ranks in the group) -> [calls, bytes of the larger of input and output].
        host_copies: bytes copied `to_host` and `to_device`.
        phase: the name under which what happens now is counted; set it freely.
    """

    def __init__(self, block: dict[str, int]):
        """Args: block: by device type, the granularity of its allocator in bytes; 1 where absent."""
        super().__init__()
        self.phase = "start"
        self.live: dict[str, Counter[str]] = defaultdict(Counter)
        self.peaks: dict[str, dict[str, Counter[str]]] = defaultdict(dict)
        self.collectives: dict[str, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        self.host_copies: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._highest: dict[tuple[str, str], int] = {}
        self._storages: dict[int, tuple[str, str, int]] = {}
        self._block = block
        self._kind_of_code: dict[CodeType, str | None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked for more often than all else together
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._value(args[0].dtype)
        if func in (torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default):
            return True
        if func.namespace == "c10d":
            self._count(func, args)
        scratch = torch.empty_like(args[0]) if func in _WITH_SCRATCH else None
        if scratch is not None:
            self._note(scratch)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self._note(out)
            if func in _COPIES:
                self._copied(out, args)
        else:
            for tensor in tree_iter(out):
                if isinstance(tensor, torch.Tensor):
                    self._note(tensor)
        return out

    def _value(self, dtype: torch.dtype) -> bool | int | float:
        """What `item()` gives where there are no numbers. To DeepSpeed, that nothing overflows; to transformers, that
        all positions belong to one document; to the optimizer, that this is not the step before the first."""
        asks = next((f.f_code.co_filename for f in _frames(2) if _is_of_interest(f.f_code.co_filename)), "")
        if "/torch/optim/" in asks:
            return 1.0
        if dtype is torch.bool:
            return "/deepspeed/" not in asks
        return 0.0 if dtype.is_floating_point else 0

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        device = tensor.device.type
        size = storage.nbytes()
        block = self._block.get(device, 1)
        size = -(-size // block) * block
        kind = self._kind()
        self._storages[key] = (device, kind, size)
        weakref.finalize(storage, self._free, key)
        self.live[device][kind] += size
        self._totals[device] += size
        if self._totals[device] > self._highest.get((self.phase, device), -1):
            self._highest[self.phase, device] = self._totals[device]
            self.peaks[self.phase][device] = self.live[device].copy()

    def _free(self, key: int) -> None:
        device, kind, size = self._storages.pop(key)
        self.live[device][kind] -= size
        self._totals[device] -= size

    def is_of(self, tensor: torch.Tensor, kind: str) -> None:
        """Says what `tensor`'s memory is for, where the frame that made it could not."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            device, before, size = self._storages[key]
            self._storages[key] = (device, kind, size)
            self.live[device][before] -= size
            self.live[device][kind] += size

    def begin(self, phase: str) -> None:
        """Counts under `phase` from now on; what is live already belongs to its peak."""
        self.phase = phase
        for device in self._totals:
            if self._totals[device] > self._highest.get((phase, device), -1):
                self._highest[phase, device] = self._totals[device]
                self.peaks[phase][device] = self.live[device].copy()

    def _kind(self) -> str:
        for frame in _frames(3):
            code = frame.f_code
            if code not in self._kind_of_code:
                name = code.co_filename
                self._kind_of_code[code] = next((kind for part, kind in _BY_FILE if part in name), None)
            if (kind := self._kind_of_code[code]) is not None:
                return "parameters" if kind == "activations" and self.phase == "start" else kind
        return "buffers"

    def _copied(self, out: torch.Tensor, args: tuple[Any, ...]) -> None:
        source = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[0]
        if source.device != out.device:
            way = "to_host" if out.device.type == "cpu" else "to_device"
            self.host_copies[way] += out.numel() * out.element_size()

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        ranks = 1 if group is None else torch.distributed.ProcessGroup.unbox(group).size()
        tensors: list[int] = []
        for argument in args[:2]:
            size = sum(t.numel() * t.element_size() for t in tree_iter(argument) if isinstance(t, torch.Tensor))
            tensors.append(size)
        entry = self.collectives[self.phase][func._schema.name.removeprefix("c10d::"), ranks]
        entry[0] += 1
        entry[1] += max(tensors)


def _is_of_interest(filename: str) -> bool:
    return any(part in filename for part in ("/torch/optim/", "/deepspeed/", "/transformers/"))


def _frames(depth: int) -> Any:
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        yield frame
        frame = frame.f_back
