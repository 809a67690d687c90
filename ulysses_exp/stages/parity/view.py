"""How the result of stage `parity` is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ulysses_exp.report.column import Column
from ulysses_exp.report.facts import Fact, trouble
from ulysses_exp.report.runs import Run
from ulysses_exp.report.shape import name, number, short
from ulysses_exp.report.units import of_difference

SHAPE = {
    "reference": short,
    "reference_mixers": name,
    "max_rel_loss_diff": number,
    "max_rel_grad_norm_diff": number,
    "max_rel_weight_diff": number,
    "tolerance": number,
    "weight_tolerance": number,
}


def _largest(run: Run) -> float | None:
    differences = [run.figure(f"parity.max_rel_{kind}_diff") for kind in ("loss", "grad_norm", "weight")]
    return max((d for d in differences if d is not None), default=None)


COLUMNS = (Column("parity", _largest, of_difference, narrow=False),)


def facts(stage: Mapping[str, Any], arrow: str) -> list[Fact]:
    """The largest differences."""
    found: list[Fact] = []
    if "max_rel_loss_diff" in stage:
        found.append(
            (
                "parity",
                f"against {stage.get('reference')}, relative: loss {of_difference(stage['max_rel_loss_diff'])},"
                f" gradient norm {of_difference(stage.get('max_rel_grad_norm_diff'))},"
                f" weights {of_difference(stage.get('max_rel_weight_diff'))}",
            )
        )
    if "reference_mixers" in stage:
        found.append(("", f"in the reference {stage['reference_mixers']}, as transformers does not"))
    return found + trouble("parity", stage)
