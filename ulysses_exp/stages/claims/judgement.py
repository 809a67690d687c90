"""What counted figures come to. Every verdict is made here, by `judged`, of what ranks have counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ulysses_exp.report.units import of_bytes
from ulysses_exp.stages.claims.cell import DOES_NOT, HOLDS, HOLDS_IF, NOT_TRIED, Cell
from ulysses_exp.stages.claims.layouts import SAME

#: Of the largest logit. fp32 adds the same numbers in another order; bf16 keeps 8 bits.
LOGITS = {"fp32": 1e-4, "bf16": 5e-2}

#: Of a gradient, relative to the true one
GRADIENT = {"fp32": 1e-3, "bf16": 1e-1}

#: Claims about training itself: that it stops is an answer to them
_OF_TRAINING = ("C10",)

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
        error = re.sub(r" <.*", "", counted["error"])  # an object's address tells nothing
        finding = _of_error(side, error)
        if finding is not None and claim not in _OF_TRAINING:
            return Cell(claim, side, layout, NOT_TRIED, "-", f"training stops before: {error}", finding)
        return Cell(claim, side, layout, DOES_NOT, "-", f"it stops: {error}", finding)
    verdict, figure, why, finding = _JUDGES[claim](counted, precision)
    known = finding if side == "upstream" and why else None
    return Cell(claim, side, layout, verdict, figure, why, known, _details(claim, counted))


def _details(claim: str, ranks: Ranks) -> dict[str, Any]:
    if claim == "C5":  # of the rank that holds most
        return {"bytes": {kind: max(rank["bytes"][kind] for rank in ranks) for kind in ranks[0]["bytes"]}}
    if claim == "C7":
        tries = [(one["kind"], one["target"], _exact(one)) for one in ranks[0]["opened"]]
        kinds = {kind: [exact for of, _, exact in tries if of == kind] for kind, _, _ in tries if kind != SAME}
        return {
            "opened": {target: exact for _, target, exact in tries},
            "kinds": {kind: [sum(found), len(found)] for kind, found in kinds.items()},
        }
    return {}


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
    figure = f"{all_to_alls} all-to-alls in {calls} calls of attention"
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
        return HOLDS_IF, figure, f"ZeRO's own collectives are not counted: a rank makes {listed}", None
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
    finding = None if not wrong else 4 if whole else 3 if set(wrong) == {"packed"} else 5
    return (DOES_NOT if problems else HOLDS), figure, "; ".join(problems), finding


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
    other_direction = not off <= GRADIENT[precision] and factor is not None and abs(factor - 1) < 0.5
    # where the scale is about right, attention has seen other tokens than the model's masks let it see
    return (DOES_NOT if problems else HOLDS), figure, "; ".join(problems), 4 if other_direction else 1


def _c5(ranks: Ranks, precision: str) -> Judged:
    whole, held = ranks[0]["whole"], max(rank["bytes"]["weights"] for rank in ranks)
    most = {kind: max(rank["bytes"][kind] for rank in ranks) for kind in ranks[0]["bytes"]}
    figure = ", ".join(f"{kind} {of_bytes(count)}" for kind, count in most.items()) + " a rank"
    problems = [
        f"{when} training the ranks hold {len(found)} different sets of weights"
        for when in ("before", "after")
        if len(found := {rank[when] for rank in ranks}) > 1
    ]
    if problems:
        return DOES_NOT, figure, "; ".join(problems), None
    least = min(rank["bytes"]["weights"] for rank in ranks)
    if least < whole:
        share = f"between uses a rank holds {of_bytes(held)} of {of_bytes(whole)}"
        return HOLDS_IF, figure, f"a weight is looked at while ZeRO 3 has gathered it; {share}", None
    return HOLDS, figure, "", None


def _c6(ranks: Ranks, precision: str) -> Judged:
    found = ranks[0]
    share = found["whole"] / max(1, found["elements"])
    first, *others = found["with_weights"] or ["any"]
    where = first + (f" and {len(others)} more" if others else "")
    figure = f"{100 * share:.4g}% of the weights whole in {where} of {len(found['files'])} files"
    if found["whole"] == found["elements"] and found["elements"]:
        return HOLDS, figure, "", None
    missing = ", ".join(found["missing"]) if found["whole"] else "any of the weights"
    return DOES_NOT, figure, f"not there whole: {missing}; {len(found['files'])} files hold parts", 24


def _c7(ranks: Ranks, precision: str) -> Judged:
    """`ranks` has one entry, whose `opened` lists the layouts that the checkpoint was opened in."""
    tries = ranks[0]["opened"]
    good = [one for one in tries if _exact(one)]
    others = [one for one in tries if one["kind"] != SAME]
    figure = f"{sum(one in good for one in others)} of {len(others)} other layouts open it bit for bit"
    bad: dict[str, list[str]] = {}
    for one in tries:
        if one not in good:
            what = one.get("error") or ("optimizer states differ" if one["weights"] else "weights differ")
            bad.setdefault(f"{one['kind']}: {what}", []).append(one["target"])
    if not bad:
        return HOLDS, figure, "", None
    refused = "; ".join(f"{', '.join(targets)} ({why})" for why, targets in bad.items())
    opens = [f"{one['kind']}, {one['target']}" for one in others if one in good]
    if opens and not any(one["kind"] == SAME and one not in good for one in tries):
        return HOLDS_IF, figure, f"it is opened in {' or '.join(opens)}; not in {refused}", 25
    return DOES_NOT, figure, f"not in {refused}", 25


def _exact(one: dict[str, Any]) -> bool:
    """Whether a checkpoint was opened with all of its weights and states."""
    return bool(one.get("weights") and one.get("states"))


def _c8(ranks: Ranks, precision: str) -> Judged:
    ways = ranks[0]["ways"]
    (first, itself), *rest = ways.items()
    figure = f"{first}: {'bit for bit' if itself == 'exact' else 'not opened'}"
    if itself == "exact":
        return HOLDS, figure, "", None
    opens = [way for way, found in rest if found == "exact"]
    said = "; ".join(f"{way}: {found}" for way, found in ways.items() if found != "exact")
    if opens:
        figure += f"; {opens[0]}: bit for bit"
        return HOLDS_IF, figure, f"{' or '.join(opens)} is used instead, with config.json beside it; {said}", 26
    return DOES_NOT, figure, said, 26


def _c9(ranks: Ranks, precision: str) -> Judged:
    found = ranks[0]
    states, whole = found["states"], found["whole"]
    figure = f"{whole} of {states} states whole"
    if states and whole == states:
        return HOLDS, figure, "", None
    if "converted" in found and states:
        figure += f", {found['converted']} after {found['converter']}"
        if found["converted"] == states:
            return HOLDS_IF, figure, f"{found['converter']} consolidates them first", None
    error = f"; {found['converter']}: {found['converter_error']}" if "converter_error" in found else ""
    return DOES_NOT, figure, f"{states - whole} states are there in parts{error}", 16 if error else None


_JUDGES: dict[str, Callable[[Ranks, str], Judged]] = {
    "C1": _c1, "C2": _c2, "C3": _c3, "C4": _c4, "C5": _c5, "C6": _c6, "C7": _c7, "C8": _c8, "C9": _c9, "C10": _c10,
}  # fmt: skip


def _of_error(side: str, error: str) -> int | None:
    """The finding that an error of upstream's training belongs to."""
    if side != "upstream":
        return None
    return 2 if "is not part of group" in error else None
