"""The longest sequence that trains, by trying: growing until memory runs out, then bisecting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ulysses_exp.config import Config
from ulysses_exp.launch import RankFailure, Task
from ulysses_exp.plan.planner import longest_sequence

GRAIN = 16  # tokens of a rank: lengths are multiples of sp times this
NEAR = 1.1  # a length that was planned may be this far off


def at_length(config: Config, tokens: int) -> Config:
    """The same experiment with sequences of `tokens`."""
    return replace(config, train=replace(config.train, seq_len=tokens))


def find(
    config: Config, folder: Path, do: Callable[[Task], object], found: dict[str, Any], note: Callable[[str], None]
) -> int:
    """The longest sequence that trains in `longest.memory_gib`, tokens; 0 where none does.

    Each length is tried by ranks of its own: what a rank out of memory leaves behind ends with it.

    Args:
        do: has fresh ranks run a task; raises RankFailure.
        found: gets `max_seq_len`, `shortest_failed` and `planned_seq_len` (tokens), `memory_limit_bytes` of a rank and
            `tries`, a dict a length, as they come in.

    Raises:
        RankFailure: a try failed for another reason than memory.
    """
    limit = None if config.longest.memory_gib is None else int(config.longest.memory_gib * 2**30)
    options = {} if limit is None else {"memory_bytes": limit}
    planned = _planned(config, limit, note) if config.longest.plan and limit is not None else None
    found.update(memory_limit_bytes=limit, planned_seq_len=planned, tries=[])

    def trains(tokens: int) -> bool:
        entry: dict[str, Any] = {"seq_len": tokens, "trains": False, "reason": None}
        ok = False
        began = time.perf_counter()
        try:
            do(Task(f"longest-{tokens}", at_length(config, tokens), ("try_length",), folder, options))
            ok = entry["trains"] = True
        except RankFailure as failure:
            entry["reason"] = str(failure)
            if not failure.out_of_memory:
                raise
        finally:
            entry["seconds"] = time.perf_counter() - began
            found["tries"].append(entry)
        note(f"train {tokens:,} tokens: {'ok' if ok else 'out of memory'}")
        return ok

    step, within = config.layout.sp * GRAIN, config.longest.within
    if planned is None:
        longest, shortest = search(trains, config.train.seq_len, step, within)
    else:
        longest, shortest = search(trains, planned, step, within, factor=NEAR)
    found.update(max_seq_len=longest, shortest_failed=shortest)
    return longest


def _planned(config: Config, limit: int, note: Callable[[str], None]) -> int | None:
    planned = longest_sequence(config, config.layout, limit)
    note("plan: no guess" if planned is None else f"plan: about {planned:,} tokens")
    return planned


def search(trains: Callable[[int], bool], first: int, step: int, within: float, factor: float = 2.0) -> tuple[int, int]:
    """(longest length that trains, shortest tried length that does not), tokens.

    Lengths are multiples of `step`. Every call of `trains` costs a start of ranks.

    Args:
        trains: whether a sequence of this many tokens trains; true up to some length and false beyond.
        first: the first guess.
        within: the search ends where the two lengths are this close, relative to the longer one, or one `step` apart.
        factor: of the second length tried to the first; squared with each further one, at most 2. The better the first
            guess, the smaller.

    Returns:
        0 as the first of the two where not even `step` tokens train.
    """
    guess = max(step, first // step * step)
    if trains(guess):
        longest, shortest = guess, _times(guess, factor, step)
        while trains(shortest):
            factor = min(2.0, factor**2)
            longest, shortest = shortest, _times(shortest, factor, step)
    else:
        longest, shortest = _times(guess, 1 / factor, step), guess
        while longest and not trains(longest):
            factor = min(2.0, factor**2)
            longest, shortest = _times(longest, 1 / factor, step), longest
        if not longest:
            return 0, shortest
    while shortest - longest > max(step, within * shortest):
        middle = (longest + shortest) // 2 // step * step
        if trains(middle):
            longest = middle
        else:
            shortest = middle
    return longest, shortest


def _times(tokens: int, factor: float, step: int) -> int:
    """`tokens` x `factor` as a multiple of `step`, at least one step away; 0 below the first."""
    if factor > 1:
        return max(tokens + step, int(tokens * factor) // step * step)
    return 0 if tokens == step else max(step, min(tokens - step, int(tokens * factor) // step * step))
