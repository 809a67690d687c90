"""When a cell is ok: weights and states bit for bit, and losses that go on as if nothing had happened."""

from __future__ import annotations

import math
from typing import Any

#: A continuation agrees with the uninterrupted run when its losses differ by at most this much, relative.
CONTINUATION_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}


def judged(cell: dict[str, Any], uninterrupted: list[float] | None, tolerance: float) -> dict[str, Any]:
    """`cell` with its status: bit-exact weights and states, and losses that go on as if nothing had happened."""
    losses = cell.pop("loss")
    cell["continuation_max_abs_loss_diff"] = None
    problems = []
    if cell["weights_bit_exact"] is not True:
        problems.append("weights are not bit-exact")
    if cell["optimizer_bit_exact"] is False:
        problems.append("optimizer states are not bit-exact")
    expected = uninterrupted or []
    if losses and not expected:
        problems.append("the uninterrupted run has left no losses to compare with")
    elif losses and not all(map(_is_finite, [*losses, *expected])):
        problems.append("the next losses are not finite")
    elif losses:
        differences = [abs(a - b) for a, b in zip(losses, expected, strict=False)]
        cell["continuation_max_abs_loss_diff"] = max(differences)
        if max(d / max(abs(b), 1e-30) for d, b in zip(differences, expected, strict=False)) > tolerance:
            problems.append(f"the next losses differ by {max(differences):.2e} from the uninterrupted run's")
    cell["status"] = "failed" if problems else "ok"
    if problems:
        cell["reason"] = "; ".join(problems)
    return cell


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
