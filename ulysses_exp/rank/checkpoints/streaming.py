"""Writes tensors whose parts lie on several ranks into safetensors files, a piece at a time.

A rank on the machine of a file's writer puts its parts into the file itself, at their place; only what lies on other
machines is sent, for two machines that write one file can lose each other's pages on NFS. All ranks go through the
same rounds. In a round each writer receives what it needs of the next piece of its file, so memory is bounded by a
piece, a byte travels at most once, and all ranks write at the same time.
Bytes are sent, not numbers added, so every bit arrives, also of -0.0 and NaN.
What lies on an accelerator is hashed there, and copied to pinned host memory in a stream of its own while the round
before is still being written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ulysses_exp.rank.checkpoints.digest import digest, to_hex, to_int64
from ulysses_exp.rank.checkpoints.homes import Fragment
from ulysses_exp.rank.checkpoints.shards import Shard, Tensor

#: Bytes moved in a round. Two of them can be in memory: one being received, one being written.
PIECE_BYTES = 8 << 20

#: Bytes of one pwrite. Measured on ext4, Linux 6.18: 8 MiB at a place that is no multiple of a page take four times as
#: long as in calls of 1 MiB.
_CALL_BYTES = 1 << 20


@dataclass(frozen=True)
class _Piece:
    """Elements [start, start + numel) of `tensor`, which lie at byte `position` of a shard."""

    shard: Shard
    tensor: Tensor
    start: int
    numel: int
    position: int


def write(shards: list[Shard], fragments: list[Fragment], files: Files) -> dict[tuple[str, str], str]:
    """Hands the shards to the kernel; `files.sync` brings them to disk. Collective over the world.

    Returns:
        For each (kind, name) the digest of the tensor, computed where its parts lie, before they were sent or written.

    What cannot be written is raised by `files.sync`, for the other ranks wait for what this one has to send.
    """
    rank, device = dist.get_rank(), communication_device()
    mine = {(f.kind, f.name): f for f in fragments}
    index = {(t.kind, t.name): i for i, t in enumerate(t for shard in shards for t in shard.tensors)}
    digests = [0] * len(index)
    beside = _on_this_machine()
    copies = torch.cuda.Stream() if any(f.data.is_cuda for f in fragments) or device.type == "cuda" else None
    buffers: list[torch.Tensor] = []
    writing: list[Future[None]] = []
    with ThreadPoolExecutor(1) as disk:
        for shard in shards:
            if shard.writer == rank:
                writing.append(disk.submit(files.write, shard, np.frombuffer(shard.header(), np.uint8), 0))
        # the other ranks' pieces in an order that all agree on, so that sends and receives meet
        rounds = zip_longest(*(_pieces(shards, writer) for writer in range(dist.get_world_size())))
        for number, round_ in enumerate(rounds):
            ready: list[tuple[Shard, torch.Tensor, int]] = []  # (file, bytes, their place in it)
            messages: list[dist.P2POp] = []
            for writer, piece in enumerate(round_):
                if piece is None:
                    continue
                key = (piece.tensor.kind, piece.tensor.name)
                itemsize = piece.tensor.dtype.itemsize
                for part in piece.tensor.parts:
                    begin = max(part.start, piece.start)
                    end = min(part.start + part.numel, piece.start + piece.numel)
                    if begin >= end:
                        continue
                    place = (begin - piece.start) * itemsize
                    if part.rank == rank:
                        held = mine[key]
                        own = held.data[begin - held.start : end - held.start]
                        view = own.view(torch.uint8)
                        digests[index[key]] += digest(own, begin)
                        if beside[writer]:
                            ready.append((piece.shard, view, piece.position + place))
                        else:
                            messages.append(dist.P2POp(dist.isend, view.to(device), writer))
                    elif writer == rank and not beside[part.rank]:
                        incoming = _buffer(buffers, number, piece, device)[place:][: (end - begin) * itemsize]
                        messages.append(dist.P2POp(dist.irecv, incoming, part.rank))
                        ready.append((piece.shard, incoming, piece.position + place))
            for message in dist.batch_isend_irecv(messages) if messages else ():
                message.wait()
            hosts, wait = to_host([data for _, data, _ in ready], copies)
            for write_ in writing:  # of the round before: at most two rounds are in memory
                write_.result()
            writing = [
                disk.submit(_put, files, shard, host, at, wait)
                for (shard, _, at), host in zip(ready, hosts, strict=True)
            ]
        for write_ in writing:
            write_.result()
        whole = all_reduce_digests(digests)
    return dict(zip(index, whole, strict=True))


def to_host(data: list[torch.Tensor], stream: torch.cuda.Stream | None) -> tuple[list[torch.Tensor], Callable[[], Any]]:
    """Where `data` is in host memory, and what returns once it is there: what lies on a device is copied in `stream`.

    torch takes pinned memory for such a copy, from an allocator that keeps it for the next round.
    """
    if stream is None:
        return data, lambda: None
    stream.wait_stream(torch.cuda.current_stream())  # what is copied may still be computed, or be on its way
    with torch.cuda.stream(stream):
        return [tensor.to("cpu", non_blocking=True) for tensor in data], stream.record_event().synchronize


def _put(files: Files, shard: Shard, host: torch.Tensor, position: int, wait: Callable[[], Any]) -> None:
    wait()
    files.write(shard, host.numpy(), position)


def communication_device() -> torch.device:
    """Where tensors have to lie to be sent: the accelerator under NCCL, host memory under gloo."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def _on_this_machine() -> list[bool]:
    """For each rank, whether it runs where this one does. Collective over the world."""
    here = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/mnt").st_ino)
    machines: list[tuple[str, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(machines, here)
    return [machine == here for machine in machines]


def all_reduce_digests(mine: list[int]) -> list[str]:
    """The digests of whole tensors from the ranks' shares. Collective over the world."""
    shares = torch.tensor([to_int64(d & (1 << 64) - 1) for d in mine], dtype=torch.int64, device=communication_device())
    if dist.get_world_size() > 1:
        dist.all_reduce(shares)  # int64 wraps modulo 2^64
    return [to_hex(d) for d in shares.tolist()]


def _buffer(buffers: list[torch.Tensor], number: int, piece: _Piece, device: torch.device) -> torch.Tensor:
    """Where round `number` receives its piece: two take turns, since the one before is still being written."""
    if not buffers:
        buffers += torch.empty(2, PIECE_BYTES, dtype=torch.uint8, device=device).unbind()
    return buffers[number % 2][: piece.numel * piece.tensor.dtype.itemsize]


def _pieces(shards: list[Shard], writer: int) -> Iterator[_Piece]:
    """What `writer` writes, in order."""
    for shard in shards:
        if shard.writer != writer:
            continue
        position = len(shard.header())
        for tensor in shard.tensors:
            step = PIECE_BYTES // tensor.dtype.itemsize
            for start in range(0, tensor.numel, step):
                yield _Piece(
                    shard, tensor, start, min(step, tensor.numel - start), position + start * tensor.dtype.itemsize
                )
            position += tensor.nbytes


class Files:
    """The safetensors files of `folder` that this rank writes to."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, int] = {}
        self._error: OSError | None = None

    def write(self, shard: Shard, data: np.ndarray, position: int) -> None:
        """Does nothing after an error."""
        if self._error is not None:
            return
        try:
            if shard.file not in self._open:
                path = self._folder / shard.file
                self._open[shard.file] = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            rest = data.data
            while rest:
                written = os.pwrite(self._open[shard.file], rest[:_CALL_BYTES], position)
                rest, position = rest[written:], position + written
        except OSError as error:
            self._error = error

    def sync(self) -> None:
        """Waits until all is on disk and closes the files. Raises the first OSError that there has been."""
        for descriptor in self._open.values():
            try:
                if self._error is None:
                    os.fsync(descriptor)
            except OSError as error:
                self._error = error
            finally:
                os.close(descriptor)
        self._open.clear()
        if self._error is not None:
            raise self._error
