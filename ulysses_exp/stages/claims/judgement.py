"""What counted figures come to. Every verdict is made here, by `judged`, of what ranks have counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ulysses_exp.stages.claims.cell import DOES_NOT, HOLDS, HOLDS_IF, NOT_TRIED, Cell

#: Of the largest logit. fp32 adds the same numbers in another order; bf16 keeps 8 bits.
LOGITS = {"fp32": 1e-4, "bf16": 5e-2}

#: Of a gradient, relative to the true one
GRADIENT = {"fp32": 1e-3, "bf16": 1e-1}

Ranks = list[dict[str, Any]]  # what each rank has counted
Judged = tuple[str, str, str, int | None]  # verdict, figure, why, finding


def judged(claim: str, side: str, layout: str, counted: Any, precision: str = "fp32") -> Cell:
    """The cell of `claim`.

    Args:
        counted: a list of what the ranks have counted; or `error` (what stopped them) or `not_tried` (why).
    """
    if isinstance(counted, dict):
        if "not_tried" in counted:
            return Cell(claim, side, layout, NOT_TRIED, "-", counted["not_tried"])
        why = f"it stops: {counted['error']}"
        return Cell(claim, side, layout, DOES_NOT, "-", why, _of_error(claim, side, counted["error"]))
    verdict, figure, why, finding = _JUDGES[claim](counted, precision)
    return Cell(claim, side, layout, verdict, figure, why, finding if side == "upstream" and why else None)


def _total(ranks: Ranks, key: str) -> int:
    return sum(rank[key] for rank in ranks)


def _most(values: list[float | None]) -> float:
    """The largest; what is not finite was written as null."""
    return max((float("inf") if value is None else value for value in values), default=0.0)


def _relative(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _c1(ranks: Ranks, precision: str) -> Judged:
    all_to_alls, calls, moved = (_total(ranks, key) for key in ("all_to_alls", "calls", "moved"))
    others = _total(ranks, "others_in_attention")
    batches = len(ranks[0]["batches"])
    figure = f"{all_to_alls} all-to-alls in {calls} calls, {batches} kinds of batch"
    problems = []
    if all_to_alls:
        problems.append(f"{all_to_alls} all-to-alls are made")
    if others:
        problems.append(f"{others} other collectives are made in attention")
    if moved or any(rank["arrived"] != rank["calls"] for rank in ranks):
        problems.append(f"in {moved} of {calls} calls the original attention does not get the model's own tensors")
    for name, message in {k: v for rank in ranks for k, v in rank["refused"].items()}.items():
        problems.append(f"a batch ({name}) is refused: {message}")
    if problems:
        return DOES_NOT, figure, "; ".join(problems), None
    gathers: dict[str, int] = {}
    for rank in ranks:
        for name, count in rank["others"].items():
            gathers[name] = gathers.get(name, 0) + count
    if gathers:
        listed = ", ".join(f"{count // len(ranks)} {name}" for name, count in sorted(gathers.items()))
        return HOLDS_IF, figure, f"ZeRO 3's gathering of weights is not counted: a rank makes {listed}", 23
    return HOLDS, figure, "", None


def _c2(ranks: Ranks, precision: str) -> Judged:
    made = _total(ranks, "all_to_alls") + _total(ranks, "others")
    problems = []
    if made:
        problems.append(f"{made} collectives are made")
    if any(rank["arrived"] != 1 for rank in ranks) or _total(ranks, "moved"):
        problems.append("the original attention does not get the caller's own tensors")
    if not all(rank["equal"] for rank in ranks):
        problems.append("the result is not the original attention's")
    equal = "equal" if all(rank["equal"] for rank in ranks) else "not equal"
    figure = f"{made} collectives, result {equal}"
    return (DOES_NOT if problems else HOLDS), figure, "; ".join(problems), None


def _c3(ranks: Ranks, precision: str) -> Judged:
    modes = ranks[0]["modes"]
    sharded = any(not mode["bypassed"] for mode in modes)
    problems, worst = [], 0.0
    for index, mode in enumerate(modes):
        off = _most([rank["modes"][index]["off"] for rank in ranks])
        worst = max(worst, off)
        bypassed = [rank["modes"][index]["bypassed"] for rank in ranks]
        if any(one != mode["expected_bypass"] for one in bypassed):
            problems.append(f"{mode['mode']}: attention is {'bypassed' if all(bypassed) else 'sharded'}")
        if not off <= LOGITS[precision]:
            problems.append(f"{mode['mode']}: logits are off by {_relative(off)} of the largest")
    ways = "sharded, bypassed, sharded" if sharded else "nothing to shard"
    return (DOES_NOT if problems else HOLDS), f"{ways}; logits off by {_relative(worst)}", "; ".join(problems), 4


def _c4(ranks: Ranks, precision: str) -> Judged:
    off: dict[str, float] = {}
    for rank in ranks:
        for source, found in (("", rank["off"]), ("Trainer, ", rank["trainer"])):
            for name, value in found.items():
                off[f"{source}{name}"] = max(off.get(f"{source}{name}", 0.0), _most([value]))
    wrong = {name: value for name, value in off.items() if not value <= LOGITS[precision]}
    worst = max(off.values())
    figure = f"logits off by {_relative(worst)} of the largest"
    problems = [f"{name}: off by {_relative(value)}" for name, value in wrong.items()]
    if any(rank["seen"] != rank["samples"] for rank in ranks):
        problems.append(f"{ranks[0]['seen']} of {ranks[0]['samples']} sequences came back")
    whole = "plain" in wrong or "Trainer, plain" in wrong  # not a matter of padding
    packed = set(wrong) <= {"packed"}
    return (DOES_NOT if problems else HOLDS), figure, "; ".join(problems), 4 if whole else 3 if packed else 5


def _c10(ranks: Ranks, precision: str) -> Judged:
    factor, off = ranks[0]["factor"], _most([rank["off"] for rank in ranks])
    factors = [rank["factor"] for rank in ranks]
    shown = "no number" if factor is None else f"{factor:.4f}"
    equal = all(rank["equal"] for rank in ranks)
    reducing = [name for name in ranks[0]["collectives"] if "reduce" in name]
    figure = f"{shown} x the true gradient, weights {'equal' if equal else 'not equal'} on {len(ranks)} ranks"
    problems = []
    if not equal:
        problems.append("after a step the ranks hold different weights")
    if _most([None if f is None else abs(f - 1) for f in factors]) > GRADIENT[precision]:
        problems.append(f"the gradient is {shown} times the true one")
    if not off <= GRADIENT[precision]:
        problems.append(f"it points elsewhere, by {_relative(off)}")
    if problems and reducing:
        problems.append(f"reduced by {', '.join(reducing)}")
    return (DOES_NOT if problems else HOLDS), figure, "; ".join(problems), 1


_JUDGES: dict[str, Callable[[Ranks, str], Judged]] = {
    "C1": _c1, "C2": _c2, "C3": _c3, "C4": _c4, "C10": _c10,
}  # fmt: skip


def _of_error(claim: str, side: str, error: str) -> int | None:
    """The finding that an error of upstream belongs to."""
    if side != "upstream":
        return None
    return 2 if claim == "C10" and "is not part of group" in error else None
