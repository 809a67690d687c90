"""The collectives that a job makes: are they right here, and how fast?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ulysses_exp.rank.session import Session

#: Bytes of the whole tensor on one rank: what it hands in, of an all-gather what it gets
SIZES = {"cpu": (64 * 2**10, 2**20, 16 * 2**20), "cuda": (2**20, 16 * 2**20, 256 * 2**20)}
WARM_UP, REPEATS = 2, 5  # calls before the clock runs; calls whose median is told


def collectives(session: Session) -> dict[str, Any]:
    """Makes each collective over all ranks at a few sizes, compares every number that arrives, and times it.

    Returns:
        `collectives`: of each its name, whether it was `right` on all ranks, and by size the median of `seconds`
        (of the slowest rank) and `bytes_per_second`; `error` instead where the backend has none. `calls` that are
        timed and those to `warm_up` before them, at each size; `barrier_seconds`.
    """
    device, world = session.device, dist.get_world_size()
    found = []
    for name, make in _COLLECTIVES.items():
        one: dict[str, Any] = {"name": name, "right": True, "sizes": []}
        for size in SIZES[device.type]:
            chunk = max(1, size // 4 // world)
            try:
                right, seconds = _measure(make, chunk, device)
            except RuntimeError as error:  # on all ranks alike, or the next one fails for good
                one["error"] = str(error).splitlines()[0]
                break
            one["right"] &= right
            sent = chunk * world * 4
            one["sizes"].append({"bytes": sent, "seconds": seconds, "bytes_per_second": sent / seconds})
        found.append(one)
    waits = [_timed(dist.barrier, device) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    return {
        "device": device.type,
        "backend": dist.get_backend(),
        "collectives": found,
        "warm_up": WARM_UP,
        "calls": REPEATS,
        "barrier_seconds": statistics.median(_slowest(waits, device)),
    }


#: The call, its result, and what the result has to be: equal numbers in each chunk, a chunk a rank
Made = tuple[Callable[[], Any], torch.Tensor, torch.Tensor]


def _numbers(values: list[int], chunk: int, device: torch.device) -> torch.Tensor:
    """[len(values) * chunk] of fp32, in which sums of small integers are exact."""
    return torch.tensor(values, dtype=torch.float32, device=device).repeat_interleave(chunk)


def _all_to_all(rank: int, world: int, chunk: int, device: torch.device) -> Made:
    given = _numbers([rank * world + other for other in range(world)], chunk, device)
    got = torch.empty_like(given)
    expected = _numbers([other * world + rank for other in range(world)], chunk, device)
    return lambda: dist.all_to_all_single(got, given), got, expected


def _all_reduce(rank: int, world: int, chunk: int, device: torch.device) -> Made:
    tensor = _numbers([rank + 1] * world, chunk, device)
    return lambda: dist.all_reduce(tensor), tensor, _numbers([world * (world + 1) // 2] * world, chunk, device)


def _all_gather(rank: int, world: int, chunk: int, device: torch.device) -> Made:
    given, got = _numbers([rank], chunk, device), _numbers([-1] * world, chunk, device)
    return lambda: dist.all_gather_into_tensor(got, given), got, _numbers(list(range(world)), chunk, device)


def _reduce_scatter(rank: int, world: int, chunk: int, device: torch.device) -> Made:
    given, got = _numbers([rank + other for other in range(world)], chunk, device), _numbers([-1], chunk, device)
    expected = _numbers([world * (world - 1) // 2 + world * rank], chunk, device)
    return lambda: dist.reduce_scatter_tensor(got, given), got, expected


def _broadcast(rank: int, world: int, chunk: int, device: torch.device) -> Made:
    tensor = _numbers([rank] * world, chunk, device)
    return lambda: dist.broadcast(tensor, world - 1), tensor, _numbers([world - 1] * world, chunk, device)


_COLLECTIVES: dict[str, Callable[[int, int, int, torch.device], Made]] = {
    "all_to_all_single": _all_to_all,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
}


def _measure(make: Callable[..., Made], chunk: int, device: torch.device) -> tuple[bool, float]:
    """(whether the first call gave each rank what it has to, the median of the seconds of later ones)."""
    call, result, expected = make(dist.get_rank(), dist.get_world_size(), chunk, device)
    call()
    right = torch.tensor(int(torch.equal(result, expected)), device=device)
    dist.all_reduce(right, dist.ReduceOp.MIN)
    times = [_timed(call, device) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    return bool(right), statistics.median(_slowest(times, device))


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _slowest(times: list[float], device: torch.device) -> list[float]:
    """Of each call the time of the rank that took longest."""
    shared = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()
