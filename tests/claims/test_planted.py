"""A fault is planted where it would be made, on real ranks: the right cell turns, the others stay."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from checkpoints.checkpoint_ranks import run
from safetensors.torch import load_file, save_file

from ulysses_exp.config import Config, resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.launch import Task
from ulysses_exp.model.attention.patched import Patched
from ulysses_exp.stages.claims.cell import DOES_NOT
from ulysses_exp.stages.claims.judgement import judged
from ulysses_exp.stages.claims.measured import checkpoints, weights

PARTS = ["communication", "gradients", "weights", "checkpoints"]


def configured() -> Config:
    return resolve(
        composed(
            ["experiment=claims", "device=cpu", "sp.size=2", "zero.stage=1", "train.seq_len=48",
             "model.architecture.num_hidden_layers=2", "tracker.mode=disabled"]
        )[0]
    )  # fmt: skip


def mask_dropped_in_bypass() -> contextlib.AbstractContextManager[Any]:
    whole = Patched._whole

    def without(self: Patched, kwargs: dict[str, Any], announced: Any) -> Any:
        return whole(self, kwargs | {"attention_mask": None}, announced)

    return patch.object(Patched, "_whole", without)


def all_to_all_left_in() -> contextlib.AbstractContextManager[Any]:
    attention = Patched.attention

    def with_one_more(self: Patched, module: Any, query: Any, *args: Any, **kwargs: Any):
        if not module.training:
            row = torch.zeros(2)
            dist.all_to_all_single(torch.empty_like(row), row, group=self.group)
        return attention(self, module, query, *args, **kwargs)

    return patch.object(Patched, "attention", with_one_more)


@contextlib.contextmanager
def a_ranks_weight_changed() -> Iterator[None]:
    count = weights.count

    def on_other_weights(subject: Any) -> Any:
        parameter = next(subject.model.parameters())
        if subject.rank == 1:
            parameter.data[0, 0] += 1e-3
        try:
            return count(subject)
        finally:
            dist.broadcast(parameter.data, 0)

    with patch.object(weights, "count", on_other_weights):
        yield


@contextlib.contextmanager
def a_parameter_left_out() -> Iterator[None]:
    contents = checkpoints.contents

    def of_a_copy(folder: Path) -> Any:
        copy = folder.parent / "copy"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("exports"))
        for path in (*copy.rglob("weights*.safetensors"), *copy.rglob("model*.safetensors")):
            tensors = load_file(path)
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, path)
        found = contents(copy)
        shutil.rmtree(copy)
        return found

    with patch.object(checkpoints, "contents", of_a_copy):
        yield


#: (what is planted, the claim whose cell turns)
FAULTS: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[Any]], str | None]] = {
    "nothing": (contextlib.nullcontext, None),
    "mask dropped in bypass": (mask_dropped_in_bypass, "C4"),
    "all-to-all left in": (all_to_all_left_in, "C1"),
    "a rank's weight changed": (a_ranks_weight_changed, "C5"),
    "a parameter left out of the checkpoint": (a_parameter_left_out, "C6"),
}


def measured(config: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """What the ranks count of this project, by fault and claim."""
    from ulysses_exp.stages.claims.rank import measure

    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())  # as a launcher tells; accelerate asks
    found = {}
    for name, (plant, _) in FAULTS.items():
        options = {"side": "here", "parts": PARTS, "folder": str(folder / name)}
        with plant():
            found[name] = measure(Task("claims", config, (), folder, options), dist.get_rank())
    return found


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    counted = run(2, measured, configured(), tmp_path_factory.mktemp("claims"), timeout=240)[0]
    return {
        name: {claim: judged(claim, "here", "sp2-dp1-z1", ranks).verdict for claim, ranks in claims.items()}
        for name, claims in counted.items()
    }


@pytest.mark.parametrize("name", FAULTS)
def test_the_right_cell_turns_and_the_others_stay(verdicts, name: str) -> None:
    turned = {claim for claim, verdict in verdicts[name].items() if verdict != verdicts["nothing"][claim]}
    claim = FAULTS[name][1]
    assert turned == ({claim} if claim else set())
    assert set(verdicts[name]) == {"C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "C10"}
    if claim is None:
        assert set(verdicts[name].values()) == {"holds"}
    else:
        assert verdicts[name][claim] == DOES_NOT


def upstream(config: Config, folder: Path) -> dict[str, Any]:
    from ulysses_exp.stages.claims.rank import measure

    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())  # as a launcher tells; accelerate asks
    options = {"side": "upstream", "parts": PARTS, "folder": str(folder)}
    return measure(Task("claims", config, (), folder, options), dist.get_rank())


def test_upstream_is_measured_as_the_findings_say(tmp_path: Path) -> None:
    config = configured()
    counted = run(2, upstream, replace(config, zero=replace(config.zero, stage=2)), tmp_path, timeout=240)[0]
    cells = {claim: judged(claim, "upstream", "sp2-dp1-z2", ranks) for claim, ranks in counted.items()}
    wrong = {claim: cell.finding for claim, cell in cells.items() if cell.verdict == DOES_NOT}
    assert wrong == {"C4": 5, "C9": 16, "C10": 1}, {claim: cell.why for claim, cell in cells.items()}
    assert cells["C8"].finding == 26 and "2.0000 x" in cells["C10"].figure and "left-padded" in cells["C4"].why
    assert counted["C1"][0]["moved"] == 0 and counted["C1"][0]["arrived"] == 2 * len(counted["C1"][0]["batches"])
