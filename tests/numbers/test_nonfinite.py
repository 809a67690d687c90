"""A step that is not finite: found where it shows, and left out exactly where that is asked for."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints.checkpoint_ranks import run
from small_sessions import at, configured, session

from ulysses_exp.config import Config
from ulysses_exp.launch import strict_json
from ulysses_exp.rank import checkpoints, nonfinite
from ulysses_exp.rank import step as training
from ulysses_exp.rank.checkpoints.homes import fragments, weights_changed
from ulysses_exp.rank.session import Session

BAD = "model.layers.0.mlp.gate_proj.weight"
PLACES = [("z0", False), ("z1", False), ("z2", False), ("z3", False), ("z1", True), ("z2", True), ("z3", True)]


def spoil(opened: Session, rank: int, value: float = math.nan) -> Any:
    """From now on the gradient of `BAD` holds a `value` on `rank`; returns what ends it."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() != rank:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[7] = value
        return gradient

    return dict(opened.engine.module.named_parameters())[BAD].register_hook(hook)


def held(opened: Session) -> tuple[checkpoints.Fingerprint, dict[str, str]]:
    from ulysses_exp.rank.checkpoints.fingerprints import module_digests

    return checkpoints.fingerprint(opened.engine), module_digests(opened.engine)


def skip_one(config: Config, folder: Path, places: list[tuple[str, bool]]) -> list[str]:
    """What is wrong with a skipped step, in words, over places of one precision and optimizer."""
    wrong = []
    for zero, offload in places:
        here = at(config, f"sp1-dp2-{zero}", offload)
        where = f"{zero}{' offload' if offload else ''} {here.train.precision} {here.optim.name}"
        with session(here, folder) as opened:
            opened.engine.train()
            first = training.optimizer_step(opened, 0)
            before = held(opened)
            hook = spoil(opened, rank=1)
            skipped = training.optimizer_step(opened, 1)
            hook.remove()
            if held(opened) != before:
                wrong.append(f"{where}: the skipped step has changed something")
            third = training.optimizer_step(opened, 2)
            after = held(opened)
        with session(here, folder) as opened:  # as if the step had not been
            opened.engine.train()
            training.optimizer_step(opened, 0)
            opened.engine.lr_scheduler.step()
            expected = training.optimizer_step(opened, 2)
            if held(opened) != after:
                wrong.append(f"{where}: the step after it is another one")
        if (third.loss, third.grad_norm, third.learning_rate) != (
            expected.loss, expected.grad_norm, expected.learning_rate
        ):  # fmt: skip
            wrong.append(f"{where}: {third} instead of {expected}")
        if not (first.finite and skipped.skipped and not skipped.finite and not first.skipped):
            wrong.append(f"{where}: {skipped}")
        if (skipped.trouble or {}).get("parameter") != BAD:
            wrong.append(f"{where}: {skipped.trouble}")
    return wrong


ADAMW = ["optim=adamw", "optim.weight_decay=0.1", "optim.schedule=linear"]
MOMENTUM = ["optim=sgd", "optim.momentum=0.9", "optim.weight_decay=0.1", "optim.schedule=cosine"]


@pytest.mark.parametrize(
    ("overrides", "places"),
    [
        ([*ADAMW, "train.precision=fp32"], [("z0", False), ("z2", False), ("z1", True)]),
        ([*MOMENTUM, "train.precision=bf16"], [("z0", False), ("z1", False), ("z3", False)]),
        pytest.param([*ADAMW, "train.precision=bf16"], PLACES, marks=pytest.mark.long),
        pytest.param([*MOMENTUM, "train.precision=fp32"], PLACES, marks=pytest.mark.long),
    ],
    ids=["adamw", "momentum bf16", "adamw bf16, everywhere", "momentum, everywhere"],
)
def test_a_skipped_step_changes_nothing(overrides, places, tmp_path):
    config = configured("sp.size=1", "dp.size=2", "train.on_nonfinite=skip", *overrides)
    assert run(2, skip_one, config, tmp_path, places, timeout=200)[0] == []


def stopped(config: Config, folder: Path, places: list[tuple[str, bool]]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for layout, offload in places:
        with session(at(config, layout, offload), folder) as opened:
            opened.engine.train()
            training.optimizer_step(opened, 0)
            spoil(opened, rank=0, value=math.inf)
            made = [training.make_step(opened, step) for step in (1, 2)]
            steps = training.figures(opened, made)
            assert not steps[0].finite and math.isnan(steps[0].grad_norm), (layout, steps)
            found.append((layout, steps[0].trouble))
    return found


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "bf16"])
def test_the_parameter_where_a_gradient_is_not_finite_is_named(precision, tmp_path):
    config = configured("sp.size=1", "dp.size=2", f"train.precision={precision}")
    places = [(f"sp1-dp2-{zero}", offload) for zero, offload in PLACES]
    for layout, trouble in run(2, stopped, config, tmp_path, places)[0]:
        assert (trouble["step"], trouble["what"], trouble["parameter"]) == (2, "gradient", BAD), (layout, trouble)
        assert trouble["parameters"] == 1, (layout, trouble)
        assert BAD in nonfinite.words(trouble) and "step 2" in nonfinite.words(trouble)


def spoiled_data(config: Config, folder: Path) -> dict[str, Any]:
    """The loss of one sequence is not finite: its second micro batch on rank 1."""
    with session(config, folder) as opened:
        opened.engine.train()
        calls = []

        def hook(module: Any, arguments: Any, output: Any) -> Any:
            calls.append(None)
            if dist.get_rank() == 1 and len(calls) == 2:
                output.loss = output.loss * math.nan
            return output

        opened.engine.module.register_forward_hook(hook)
        trouble = training.optimizer_step(opened, 0).trouble
        assert trouble is not None
        return trouble


@pytest.mark.parametrize("zero", [0, 2])
def test_the_sequence_whose_loss_is_not_finite_is_named(zero, tmp_path):
    config = configured("sp.size=1", "dp.size=2", f"zero.stage={zero}")
    for trouble in run(2, spoiled_data, config, tmp_path):
        assert trouble == {"step": 1, "what": "loss", "value": "nan", "rank": 1, "sequences": [3]}
    assert nonfinite.words(trouble) == "step 1: the loss is nan on rank 1 (data: sequence 3)"


def spoiled_weights(config: Config, folder: Path) -> list[dict[str, Any]]:
    found = []
    for zero in ("z0", "z1", "z3"):
        for precision in ("fp32", "bf16"):
            here = at(replace(config, train=replace(config.train, precision=precision)), f"sp1-dp2-{zero}")
            with session(here, folder) as opened:
                opened.engine.train()
                for fragment in fragments(opened.engine):
                    if (fragment.kind, fragment.name) == ("weights", "model.norm.weight") and fragment.data.numel():
                        fragment.data.fill_(math.nan)
                weights_changed(opened.engine)
                assert nonfinite.spoiled_state(opened.engine) == ("weights", "model.norm.weight")
                found.append(training.optimizer_step(opened, 0).trouble)
    return found


def test_weights_that_were_not_finite_before_the_step_are_named(tmp_path):
    for trouble in run(2, spoiled_weights, configured("sp.size=1", "dp.size=2"), tmp_path)[0]:
        assert (trouble["what"], trouble["parameter"], trouble["parameters"]) == ("weights", "model.norm.weight", 1)
        assert "it began with weights that are nan, first model.norm.weight" in nonfinite.words(trouble)


def test_json_that_every_reader_takes():
    written = strict_json.dumps({"loss": [1.5, math.nan], "deep": [{"x": -math.inf}], "n": 3, "s": "NaN"})
    assert json.loads(written) == {"loss": [1.5, None], "deep": [{"x": None}], "n": 3, "s": "NaN"}
