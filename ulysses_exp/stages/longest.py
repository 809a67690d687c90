"""The longest sequence that trains, by trying: doubling until memory runs out, then bisecting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_exp.config import Config
from ulysses_exp.launch import RankFailure, Task

if TYPE_CHECKING:
    from ulysses_exp.session import Session


GRAIN = 16  # tokens of a rank: lengths are multiples of sp times this


def at_length(config: Config, tokens: int) -> Config:
    """The same experiment with sequences of `tokens`."""
    return replace(config, train=replace(config.train, seq_len=tokens))


def find(
    config: Config,
    folder: Path,
    do: Callable[[Task], None],
    found: dict[str, Any],
    *,
    first: int | None,
    note: Callable[[str], None],
) -> int:
    """The longest sequence that trains in `longest.memory_gib`, tokens; 0 where none does.

    Each length is tried by ranks of its own: what a rank out of memory leaves behind ends with it.

    Args:
        do: has fresh ranks run a task; raises RankFailure.
        found: gets `max_seq_len` (tokens), `shortest_failed` (tokens), `memory_limit_bytes` of a rank and `tries`, a
            dict a length, as they come in.
        first: the first guess; None takes `train.seq_len`.

    Raises:
        RankFailure: a try failed for another reason than memory.
    """
    limit = config.longest.memory_gib
    options = {} if limit is None else {"memory_bytes": int(limit * 2**30)}
    found.update(memory_limit_bytes=options.get("memory_bytes"), tries=[])

    def trains(tokens: int) -> bool:
        entry: dict[str, Any] = {"seq_len": tokens, "trains": False, "reason": None}
        began = time.perf_counter()
        try:
            do(Task(f"longest-{tokens}", at_length(config, tokens), ("try_length",), folder, options))
            entry["trains"] = True
        except RankFailure as failure:
            entry["reason"] = str(failure)
            if not failure.out_of_memory:
                raise
        finally:
            entry["seconds"] = time.perf_counter() - began
            found["tries"].append(entry)
        note(f"train {tokens:,} tokens: {'ok' if entry['trains'] else 'out of memory'}")
        return entry["trains"]

    guess = first or config.train.seq_len
    longest, shortest = search(trains, guess, config.layout.sp * GRAIN, config.longest.within)
    found.update(max_seq_len=longest, shortest_failed=shortest)
    return longest


def search(trains: Callable[[int], bool], first: int, step: int, within: float) -> tuple[int, int]:
    """(longest length that trains, shortest tried length that does not), tokens.

    Lengths are multiples of `step`. Every call of `trains` costs a start of ranks, so the first guess should be near.

    Args:
        trains: whether a sequence of this many tokens trains; true up to some length and false beyond.
        first: the first guess, at least one `step`.
        within: the search ends where the two lengths are this close, relative to the longer one, or one `step` apart.

    Returns:
        0 as the first of the two where not even `step` tokens train.
    """
    guess = max(step, first // step * step)
    if trains(guess):
        longest, shortest = guess, 2 * guess
        while trains(shortest):
            longest, shortest = shortest, 2 * shortest
    else:
        longest, shortest = max(step, guess // 2 // step * step), guess
        while longest < shortest and not trains(longest):
            longest, shortest = max(step, longest // 2 // step * step), longest
        if longest == shortest:  # the smallest has just failed
            return 0, shortest
    while shortest - longest > max(step, within * shortest):
        middle = (longest + shortest) // 2 // step * step
        if trains(middle):
            longest = middle
        else:
            shortest = middle
    return longest, shortest


def try_length(session: Session) -> dict[str, Any]:
    """The part of a rank: `longest.steps` optimizer steps at `train.seq_len`."""
    from ulysses_exp.training import optimizer_step

    session.engine.train()
    losses = [optimizer_step(session, number).loss for number in range(session.config.longest.steps)]
    return {"loss": losses}
