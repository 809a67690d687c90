"""Two runs of the same optimizer steps, in the configured layout and in a single process, held against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ulysses_exp.config import Config

#: Relative, in fp32: two layouts add the same numbers in another order. Measured at most 2e-7 (benchmarks/parity).
TOLERANCE = 1e-6

#: In bf16 a layout may differ from one process by so many times what bf16 makes of that process itself: the distance of
#: its bf16 run from its fp32 run. A layout rounds elsewhere than one process, so by chance it is as far from it as that
#: is from fp32. Of a weight tensor, which is many numbers, that is sharp: measured at most 1.0 times
#: (benchmarks/results/parity_bf16.md), and a lost window or gradient scale is 12 times and more. Loss
#: and gradient norm are one number a step, and the noise of three of them may come out far too small: measured up to
#: 7.7 times, and Student's t with 3 degrees of freedom is beyond 25 once in 7,000.
WEIGHT_NOISE, SCALAR_NOISE = 3.0, 25.0

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


def by_noise(config: Config) -> bool:
    """Whether a layout is judged by what bf16 makes of the reference, which then runs in fp32 as well."""
    return config.train.precision == "bf16" and config.parity.tolerance is None


def in_fp32(config: Config) -> Config:
    """The same experiment in fp32."""
    return replace(config, train=replace(config.train, precision="fp32"))


def tolerances(config: Config) -> tuple[float, float]:
    """(of loss and gradient norm, of weights), relative; not for bf16 by its noise."""
    least = config.parity.tolerance or TOLERANCE
    if config.optim.name == "adamw":
        return config.parity.tolerance or max(least, ADAMW_TOLERANCE), max(least, ADAMW_WEIGHT_TOLERANCE)
    return least, least


def compare(
    config: Config,
    reference: Path,
    layout: Path,
    runs: tuple[dict[str, Any], dict[str, Any]],
    full: tuple[Path, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Holds the layout's trajectory against the reference's.

    Args:
        reference, layout: folders with the weights that `rank.trajectory` left.
        runs: what `rank.trajectory` returned for each.
        full: folder and result of the reference in fp32, where `by_noise`.

    Returns:
        The `parity` entry of results.json: a row a step, the largest differences, and the first one beyond tolerance.
        A weight tensor's difference is the largest absolute one over its largest absolute weight (at least 1e-2).
        By noise, a row also has each difference as a multiple of the noise (`multiples`).
    """
    noise = None if full is None else _Noise(reference, runs[0], *full)
    tolerance, weight_tolerance = tolerances(config) if noise is None else noise.tolerances(config.parity.steps)
    rows: list[dict[str, Any]] = []
    first: Difference | None = None
    for step in range(1, config.parity.steps + 1):
        loss, norm = (_relative(runs[1][key][step - 1], runs[0][key][step - 1]) for key in ("loss", "grad_norm"))
        name, weight = _worst_weight(reference, layout, step)
        row: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": norm, "weight": weight, "parameter": name}
        limits = [("loss", loss, tolerance), ("grad_norm", norm, tolerance), (name, weight, weight_tolerance)]
        if noise is not None:
            name, multiple = noise.of_weights(layout, step, together=config.optim.name == "adamw")
            multiples = {key: noise.of(key, runs[1][key][step - 1], step) for key in ("loss", "grad_norm")}
            row["multiples"] = multiples | {"weight": multiple, "parameter": name}
            limits = [(key, value, SCALAR_NOISE) for key, value in multiples.items()]
            limits.append((name, multiple, WEIGHT_NOISE))
        rows.append(row)
        for what, value, most in limits:
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
    if noise is not None:
        result["max_noise_multiples"] = {
            key: max(row["multiples"][key] for row in rows) for key in ("loss", "grad_norm", "weight")
        }
    if first is not None:
        result["first_difference"] = {"step": first.step, "what": first.what, "value": first.value}
        by = f"{first.value:.2e} relative, tolerance {first.tolerance:g}"
        if noise is not None:
            by = f"{first.value:.1f} times what bf16 makes of one process, tolerance {first.tolerance:g} times"
        result["reason"] = (
            f"{config.layout.name} differs from {config.parity.reference} first at step {first.step}: "
            f"{first.what} by {by}"
        )
    return result


class _Noise:
    """What bf16 makes of the reference: its distance from the reference in fp32.

    Of loss and gradient norm, one number each, the root mean square over the steps: at a single step the two runs may
    agree by chance. Of a weight tensor, the Euclidean norm of the difference after each step.
    """

    def __init__(self, folder: Path, run: dict[str, Any], full_folder: Path, full_run: dict[str, Any]):
        self.folder, self.run, self.full, self.full_run = folder, run, full_folder, full_run
        self.scalars = {
            key: float(np.sqrt(np.mean(np.square(np.subtract(run[key], full_run[key])))))
            for key in ("loss", "grad_norm")
        }

    def of(self, key: str, value: float, step: int) -> float:
        """How many times the noise `value` is away from the reference's."""
        return _times(abs(value - self.run[key][step - 1]), self.scalars[key])

    def of_weights(self, layout: Path, step: int, together: bool) -> tuple[str, float]:
        """The tensor that is most times its noise away from the reference's after `step`, and how many times.

        Args:
            together: take all weights for one tensor. AdamW moves a weight by all of the rate one way or the other, so
                a tensor of a hundred weights differs in none of them or in some.
        """
        ours, theirs, full = (load_file(f / f"weights{step}.safetensors") for f in (layout, self.folder, self.full))
        pairs = {
            name: (float(np.linalg.norm(ours[name] - w)), float(np.linalg.norm(w - full[name])))
            for name, w in theirs.items()
        }
        if together:
            pairs = {
                "all weights": (
                    math.hypot(*(p[0] for p in pairs.values())),
                    math.hypot(*(p[1] for p in pairs.values())),
                )
            }
        times = {name: _times(*pair) for name, pair in pairs.items()}
        worst = max(times, key=lambda name: (times[name] != times[name], times[name]))
        return worst, times[worst]

    def tolerances(self, steps: int) -> tuple[float, float]:
        """Relative, as those of fp32: the most that loss and gradient norm may differ, and a weight."""
        scalars = max(self.scalars[key] / max(min(map(abs, self.run[key])), 1e-30) for key in self.scalars)
        weights = max(_worst_weight(self.full, self.folder, step)[1] for step in range(1, steps + 1))
        return SCALAR_NOISE * scalars, WEIGHT_NOISE * weights


def _times(difference: float, noise: float) -> float:
    """0 where there is neither: of what bf16 changes nothing."""
    if not noise:
        return 0.0 if difference == 0 else float("inf")
    return difference / noise


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
