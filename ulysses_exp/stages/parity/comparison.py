"""Two runs of the same optimizer steps, in the configured layout and in a single process, held against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ulysses_exp.config import Config

#: Relative. In fp32 two layouts add the same numbers in another order: measured at most 1e-7 (benchmarks/parity).
#: bf16 keeps 8 bits: weights and gradients are rounded by up to 2^-9 = 2e-3 at every operation, and sums over ranks are
#: rounded again; a wrong gradient scale (sp x, at least 2 x) or a lost mask is still two orders of magnitude larger.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}

#: With AdamW. Its update is g / sqrt(v): where a gradient is nearly zero the quotient is rounding noise of size one, so
#: a weight may be off by a part of lr although every gradient agrees to 1e-7. Wrong gradients still show in the
#: gradient norm and lost masks in the loss; `optim=sgd` is the sharp test of weights.
ADAMW_TOLERANCE, ADAMW_WEIGHT_TOLERANCE = 1e-5, 5e-2


#: transformers (5.23) lets packed documents see each other in layers that mix tokens without attention
#: (docs/findings.md), so there the reference runs each document alone through transformers' functions (`model.mixers`)
BY_DOCUMENT = "model.mixers keeps documents apart"

#: Weights that start at zero (Gemma's norms, which it adds to 1) are tiny for a while and have no scale of their own.
_LEAST_SCALE = 1e-2


@dataclass(frozen=True)
class Difference:
    """Where a layout first leaves the reference."""

    step: int
    what: str
    value: float
    tolerance: float


def tolerances(config: Config) -> tuple[float, float]:
    """(of loss and gradient norm, of weights), relative."""
    least = config.parity.tolerance or TOLERANCE[config.train.precision]
    if config.optim.name == "adamw":
        return config.parity.tolerance or max(least, ADAMW_TOLERANCE), max(least, ADAMW_WEIGHT_TOLERANCE)
    return least, least


def compare(
    config: Config, reference: Path, layout: Path, runs: tuple[dict[str, Any], dict[str, Any]]
) -> dict[str, Any]:
    """Holds the layout's trajectory against the reference's.

    Args:
        reference, layout: folders with the weights that `rank.trajectory` left.
        runs: what `rank.trajectory` returned for each.

    Returns:
        The `parity` entry of results.json: a row a step, the largest differences, and the first one beyond tolerance.
        A weight tensor's difference is the largest absolute one over its largest absolute weight (at least 1e-2).
    """
    tolerance, weight_tolerance = tolerances(config)
    rows: list[dict[str, Any]] = []
    first: Difference | None = None
    for step in range(1, config.parity.steps + 1):
        loss, norm = (_relative(runs[1][key][step - 1], runs[0][key][step - 1]) for key in ("loss", "grad_norm"))
        name, weight = _worst_weight(reference, layout, step)
        rows.append({"step": step, "loss": loss, "grad_norm": norm, "weight": weight, "parameter": name})
        for what, value, most in (
            ("loss", loss, tolerance),
            ("grad_norm", norm, tolerance),
            (name, weight, weight_tolerance),
        ):
            if first is None and not value <= most:
                first = Difference(step, what, value, most)
    result = {
        "status": "ok" if first is None else "failed",
        "reference": config.parity.reference,
        "steps": config.parity.steps,
        "tolerance": tolerance,
        "weight_tolerance": weight_tolerance,
        "max_rel_loss_diff": max(row["loss"] for row in rows),
        "max_rel_grad_norm_diff": max(row["grad_norm"] for row in rows),
        "max_rel_weight_diff": max(row["weight"] for row in rows),
        "rows": rows,
    }
    if runs[0].get("mixers") and (config.data.name == "packed" or config.data.padding != "none"):
        result["reference_mixers"] = BY_DOCUMENT
    if first is not None:
        result["first_difference"] = {"step": first.step, "what": first.what, "value": first.value}
        result["reason"] = (
            f"{config.layout.name} differs from {config.parity.reference} first at step {first.step}: "
            f"{first.what} by {first.value:.2e} relative, tolerance {first.tolerance:g}"
        )
    return result


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / max(abs(reference), 1e-30)


def _worst_weight(reference: Path, layout: Path, step: int) -> tuple[str, float]:
    """The parameter that differs most after `step`, and by how much."""
    ours, theirs = (load_file(folder / f"weights{step}.safetensors") for folder in (layout, reference))
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"parameters differ between layouts: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    worst, largest = "", -1.0
    for name, tensor in theirs.items():
        scale = max(float(np.abs(tensor).max()), _LEAST_SCALE)
        difference = float(np.abs(ours[name] - tensor).max()) / scale
        if not difference <= largest:  # also for NaN
            worst, largest = name, difference
    return worst, largest
