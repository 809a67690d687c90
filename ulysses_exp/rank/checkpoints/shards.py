"""Which file each tensor of a checkpoint goes to, which rank writes it, and which ranks hold its parts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from ulysses_exp.rank.checkpoints.homes import Fragment

#: Files below this size are not divided over ranks; larger ones are not written (5 GB is what hubs recommend).
SMALL_SHARD_BYTES, LARGE_SHARD_BYTES = 64 << 20, 5_000_000_000

#: Names of element types in safetensors files.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Elements [start, start + numel) of a flattened tensor, held by `rank`."""

    rank: int
    start: int
    numel: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint and the parts that make it up, without overlap, in order."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A safetensors file, written by one rank."""

    file: str
    writer: int
    tensors: tuple[Tensor, ...]

    def header(self) -> bytes:
        """Length and JSON in front of the data; padded to 8 bytes, as safetensors wants it."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            begin, end = end, end + tensor.nbytes
            entries[tensor.name] = {
                "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]
            }  # fmt: skip
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def described(self) -> dict[str, Any]:
        """Its entry in `Manifest.files`."""
        header = self.header()
        return {
            "bytes": len(header) + sum(tensor.nbytes for tensor in self.tensors),
            "header_sha256": hashlib.sha256(header).hexdigest(),
        }


def plan(mine: Iterable[Fragment], order: Iterable[str], prefix: str = "") -> list[Shard]:
    """Divides the tensors whose fragments the ranks hold over files and writers. Collective over the world.

    Args:
        mine: this rank's fragments; tensors that all ranks hold in full are written by one of them.
        order: all names, in the order in which they shall lie in the files; that of the model lets most ranks write
            what they hold, since ZeRO partitions in that order.
        prefix: put before each file's name, in place of the kind of its tensors.
    """
    world = dist.get_world_size()
    table = [(f.kind, f.name, f.shape, f.data.dtype, f.start, f.data.numel()) for f in mine]
    tables: list[list[tuple]] = [table] * world
    if world > 1:
        tables = [[] for _ in range(world)]
        dist.all_gather_object(tables, table)
    holders: dict[tuple[str, str], list[Part]] = {}
    about: dict[tuple[str, str], tuple] = {}
    for rank, rows in enumerate(tables):
        for kind, name, shape, dtype, start, numel in rows:
            holders.setdefault((kind, name), []).append(Part(rank, start, numel))
            about[kind, name] = (shape, dtype)
    position = {name: i for i, name in enumerate(order)}
    kinds = list(dict.fromkeys(kind for kind, _ in sorted(holders)))
    shards = []
    for turn, kind in enumerate(kinds):
        names = sorted((name for k, name in holders if k == kind), key=position.__getitem__)
        sizes = [math.prod(about[kind, n][0]) * about[kind, n][1].itemsize for n in names]
        total = sum(sizes)
        count = max(min(world, -(-total // SMALL_SHARD_BYTES)), -(-total // LARGE_SHARD_BYTES), 1)
        first = turn if count < world else 0  # few files: the kinds go to different ranks
        divided: list[list[str]] = [[] for _ in range(count)]
        end = 0
        for name, size in zip(names, sizes, strict=True):
            divided[min(count - 1, (end + size // 2) * count // max(total, 1))].append(name)
            end += size
        divided = [part for part in divided if part]
        for i, part in enumerate(divided):
            writer = (first + i) % world
            tensors = []
            for name in part:
                shape, dtype = about[kind, name]
                tensors.append(Tensor(kind, name, shape, dtype, _cover(holders[kind, name], writer, shape)))
            shards.append(
                Shard(f"{prefix or kind}-{i + 1:05}-of-{len(divided):05}.safetensors", writer, tuple(tensors))
            )
    return shards


def _cover(parts: list[Part], writer: int, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The parts that make up the whole tensor, the writer's own copy alone where it has one."""
    numel = math.prod(shape)
    if whole := [part for part in parts if part.numel == numel]:
        return (next((part for part in whole if part.rank == writer), whole[0]),)
    ordered = sorted(parts, key=lambda part: part.start)
    assert ordered[0].start == 0 and ordered[-1].start + ordered[-1].numel == numel, "a part of a tensor is missing"
    assert all(a.start + a.numel == b.start for a, b in pairwise(ordered)), "parts of a tensor overlap"
    return tuple(ordered)
