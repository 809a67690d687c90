"""Saved in one layout, opened in others: every bit of weights and states, and the same losses after it."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from checkpoint_ranks import run
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from tiny_engine import Recipe, engine, steps

from ulysses_exp.layout import Layout
from ulysses_exp.rank import checkpoints
from ulysses_exp.rank.checkpoints import homes, streaming
from ulysses_exp.rank.checkpoints.digest import digest, digest_where_it_lies, to_hex
from ulysses_exp.rank.checkpoints.fingerprints import module_digests

# 3 steps of 2 micro steps are no multiple of the 4 that a layout with one replica accumulates
BEFORE, AFTER = 3, 3


def train_and_save(folder: Path, layout: Layout, recipe: Recipe) -> dict[str, Any]:
    with engine(layout, recipe) as made:
        steps(made, layout, 0, BEFORE)
        checkpoints.save(made, folder, layout=layout, step=BEFORE, state={"cursor": [1, 2]})
        identical = checkpoints.weights_identical(made, dist.group.WORLD)
        return {"identical": identical, "after": steps(made, layout, BEFORE, AFTER)}


def train_and_save_on_two_machines(folder: Path, layout: Layout, recipe: Recipe) -> dict[str, Any]:
    """Ranks 0 and 1 on one, 2 and 3 on the other: parts travel to writers elsewhere."""
    streaming._on_this_machine = lambda: [rank // 2 == dist.get_rank() // 2 for rank in range(dist.get_world_size())]
    return train_and_save(folder, layout, recipe)


def load_and_train(folder: Path, layouts: list[Layout], recipe: Recipe) -> list[dict[str, Any]]:
    results = []
    for layout in layouts:
        with engine(layout, recipe, seed=1) as made:
            loaded = checkpoints.load(made, folder, layout=layout)
            results.append({"loaded": loaded, "rate": made.get_lr()[0], "after": steps(made, layout, BEFORE, AFTER)})
    return results


RECIPES = {
    "adamw": (Recipe(), "sp2-dp1-z2"),
    "bf16": (Recipe(bf16=True), "sp1-dp2-z3"),
    "bf16 without ZeRO": (Recipe(bf16=True), "sp2-dp1-z0"),
    "sgd": (Recipe("sgd"), "sp1-dp2-z1"),
    "momentum, tied": (Recipe("momentum", tied=True), "sp1-dp1-z0"),
    "bf16, tied, offload": (Recipe(bf16=True, tied=True, offload=True), "sp2-dp1-z3"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_any_layout_goes_on(name: str, tmp_path: Path) -> None:
    recipe, source_name = RECIPES[name]
    source = Layout.parse(source_name)
    folder = tmp_path / "checkpoints" / "step3"
    saved = run(source.world, train_and_save, folder, source, recipe)[0]
    assert saved["identical"] is True
    assert checkpoints.source_layout(folder) == source
    stages = (1, 2, 3) if recipe.offload else (0, 1, 2, 3)
    for world, groups in ((1, [(1, 1)]), (2, [(2, 1), (1, 2)])):
        layouts = [Layout(sp, dp, zero) for sp, dp in groups for zero in stages]
        for layout, result in zip(layouts, run(world, load_and_train, folder, layouts, recipe)[0], strict=True):
            loaded = result["loaded"]
            assert (loaded.weights_bit_exact, loaded.optimizer_bit_exact) == (True, True), layout
            assert (loaded.step, loaded.state, loaded.route) == (BEFORE, {"cursor": [1, 2]}, "portable")
            # bf16: another layout adds in another order, and the forward pass keeps 8 bits of what comes of it
            tolerance = 0 if layout == source else 2e-4 if recipe.bf16 else 1e-6
            assert result["after"] == pytest.approx(saved["after"], rel=tolerance, abs=0), layout


@pytest.mark.parametrize("offload", [False, True])
def test_states_of_a_fused_optimizer_open_in_one_that_is_not_and_back(tmp_path: Path, offload: bool) -> None:
    source = Layout(2, 1, 2)
    targets = [source, Layout(1, 2, 3), Layout(2, 1, 1 if offload else 0)]
    for fused in (True, False):
        recipe, folder = Recipe(bf16=True, offload=offload, fused=fused), tmp_path / str(fused) / "step3"
        saved = run(2, train_and_save, folder, source, recipe)[0]
        for result in run(2, load_and_train, folder, targets, replace(recipe, fused=not fused))[0]:
            assert result["loaded"].weights_bit_exact and result["loaded"].optimizer_bit_exact
            assert result["after"] == pytest.approx(saved["after"], rel=2e-4)


def test_a_fused_optimizer_has_its_count_of_steps_where_its_weights_are() -> None:
    """On a device that is not the host; of torch's own, without DeepSpeed."""
    module = torch.nn.Linear(2, 2, device="meta")
    for fused in (True, False):
        optimizer = torch.optim.AdamW(module.parameters(), fused=False)
        optimizer.param_groups[0]["fused"] = fused  # which torch refuses to make on this device
        engine = SimpleNamespace(module=module, optimizer=optimizer, basic_optimizer=optimizer)
        homes.prepare_states(
            engine, {n: {"exp_avg"} for n in ("weight", "bias")}, {n: {"step": 3.0} for n in ("weight", "bias")}
        )
        assert [state["step"].device.type for state in optimizer.state.values()] == ["meta" if fused else "cpu"] * 2


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("sp4-dp1-z3", train_and_save),
        ("sp2-dp2-z1", train_and_save),
        ("sp4-dp1-z3", train_and_save_on_two_machines),
        ("sp2-dp2-z2", train_and_save_on_two_machines),
    ],
)
def test_four_ranks(name: str, work: Callable[..., Any], tmp_path: Path) -> None:
    source = Layout.parse(name)
    folder = tmp_path / "checkpoints" / "step3"
    saved = run(4, work, folder, source, Recipe())[0]
    targets = [source, Layout(1, 4, 2), Layout(2, 2, 3)]
    for layout, result in zip(targets, run(4, load_and_train, folder, targets, Recipe())[0], strict=True):
        assert result["loaded"].weights_bit_exact and result["loaded"].optimizer_bit_exact
        assert result["after"] == pytest.approx(saved["after"], rel=0 if layout == source else 1e-6, abs=0)


def save_before_the_first_step(folder: Path) -> list[float]:
    layout = Layout(1, 2, 2)
    with engine(layout) as made:
        checkpoints.save(made, folder, layout=layout, step=0, state={})
        return steps(made, layout, 0, AFTER)


def load_before_the_first_step(folder: Path) -> list[float]:
    layout = Layout(1, 2, 3)
    with engine(layout, seed=1) as made:
        steps(made, layout, 7, 1)  # has states that the checkpoint has not
        assert checkpoints.load(made, folder, layout=layout).optimizer_bit_exact
        return steps(made, layout, 0, AFTER)


def test_a_checkpoint_without_optimizer_states(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step0"
    expected = run(2, save_before_the_first_step, folder)[0]
    assert run(2, load_before_the_first_step, folder)[0] == pytest.approx(expected, rel=1e-6)


def disturb(layout: Layout) -> tuple[bool, bool]:
    with engine(layout) as made:
        before = checkpoints.weights_identical(made, dist.group.WORLD)
        if dist.get_rank() == 1:
            parameter = next(p for p in made.module.parameters() if p.numel())
            parameter.data.view(-1)[3] += 1e-3
        return before, checkpoints.weights_identical(made, dist.group.WORLD)


@pytest.mark.parametrize("name", ["sp2-dp1-z0", "sp2-dp1-z2"])
def test_a_rank_that_differs_is_found(name: str) -> None:
    assert run(2, disturb, Layout.parse(name)) == [(True, False)] * 2


def save_what_comes_to_the_host_late(folder: Path, layout: Layout, waits: bool) -> bool:
    """As from a device: host memory is filled only when it is waited for, and digests are made where the tensor lies.
    Each rank is a machine of its own, so that parts are also sent."""

    def to_host(data: list[torch.Tensor], stream: None) -> tuple[list[torch.Tensor], Callable[[], None]]:
        hosts = [torch.full_like(part, 255) for part in data]

        def arrive() -> None:
            for host, part in zip(hosts, data, strict=True):
                host.copy_(part)

        return hosts, arrive if waits else lambda: None

    streaming.to_host = to_host
    streaming.PIECE_BYTES = 1 << 12  # many rounds
    streaming._on_this_machine = lambda: [rank == dist.get_rank() for rank in range(dist.get_world_size())]
    streaming.digest = lambda data, start: digest_where_it_lies(data.view(torch.uint8), start * data.element_size())
    with engine(layout) as made:
        steps(made, layout, 0, 1)
        checkpoints.save(made, folder, layout=layout, step=1, state={})
        try:
            loaded = checkpoints.load(made, folder, layout=layout)
        except checkpoints.CheckpointError:
            return False
        return bool(loaded.weights_bit_exact and loaded.optimizer_bit_exact)


@pytest.mark.parametrize("waits", [True, False])
def test_nothing_is_written_before_it_has_come_from_the_device(waits: bool, tmp_path: Path) -> None:
    assert run(2, save_what_comes_to_the_host_late, tmp_path / "step1", Layout(1, 2, 3), waits) == [waits] * 2


def digests_where_nothing_may_be_gathered(recipe: Recipe) -> tuple[bool, bool, dict[str, str], dict[str, str]]:
    """Of ZeRO 3 (are ranks alike, also when one's copy of a small parameter differs, digests, those of gathered
    weights)."""
    with engine(Layout(1, 2, 3), recipe) as made:
        steps(made, Layout(1, 2, 3), 0, 1)
        sharded = dict(made.module.named_parameters())
        own = [p for p in sharded.values() if p.ds_status == ZeroParamStatus.AVAILABLE]
        assert own and len(own) < len(sharded)
        gather = deepspeed.zero.GatheredParameters.__enter__
        deepspeed.zero.GatheredParameters.__enter__ = None  # calling it is an error
        found, alike = module_digests(made), checkpoints.weights_identical(made, dist.group.WORLD)
        before = own[0].data.clone()
        if dist.get_rank() == 1:
            own[0].data.view(-1)[3] += 1e-1
        disturbed = checkpoints.weights_identical(made, dist.group.WORLD)
        own[0].data.copy_(before)
        deepspeed.zero.GatheredParameters.__enter__ = gather
        with deepspeed.zero.GatheredParameters(list(sharded.values())):
            whole = {name: to_hex(digest(parameter.data)) for name, parameter in sharded.items()}
        return alike, disturbed, found, whole


@pytest.mark.parametrize("bf16", [False, True])
def test_under_zero_3_ranks_hash_their_parts_and_the_digests_are_those_of_whole_weights(bf16: bool) -> None:
    # the embeddings of 150,000 elements are gathered when they are used, all else stays gathered
    for alike, disturbed, found, whole in run(
        2, digests_where_nothing_may_be_gathered, Recipe(bf16=bf16, vocabulary=4699)
    ):
        assert alike and not disturbed
        assert found == whole


def keep_two(folder: Path) -> None:
    layout = Layout(1, 1, 0)
    with engine(layout) as made:
        for step in (1, 2, 3, 3, 10):
            checkpoints.save(made, folder / f"step{step}", layout=layout, step=step, state={"n": step}, keep=2)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    run(1, keep_two, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step10", "step3"]
    assert (tmp_path / "latest").read_text() == "step10"


def random_numbers(folder: Path, layout: Layout) -> tuple[list[float], list[float]]:
    with engine(layout) as made:
        torch.manual_seed(100 + dist.get_rank())
        checkpoints.save(made, folder, layout=layout, step=0, state={})
        drawn = torch.rand(3).tolist()
        checkpoints.load(made, folder, layout=layout)
        return drawn, torch.rand(3).tolist()


def test_each_rank_draws_the_same_random_numbers_again(tmp_path: Path) -> None:
    first, second = run(2, random_numbers, tmp_path / "step0", Layout(1, 2, 0))
    assert first[0] == first[1] and second[0] == second[1] and first != second


def save_on_a_full_disk(folder: Path, layout: Layout) -> str:
    with engine(layout) as made:
        steps(made, layout, 0, 1)  # so that there are states, and files for rank 1
        checkpoints.save(made, folder / "step1", layout=layout, step=1, state={})
        if dist.get_rank() == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            checkpoints.save(made, folder / "step2", layout=layout, step=2, state={})
        except checkpoints.CheckpointError as error:
            return str(error)
    return "saved"


@pytest.mark.parametrize("zero", [0, 3])
def test_a_rank_that_cannot_write_is_an_error_on_all(zero: int, tmp_path: Path) -> None:
    messages = run(2, save_on_a_full_disk, tmp_path, Layout(1, 2, zero))
    assert messages == [f"{tmp_path}/step2: the checkpoint cannot be written: File too large"] * 2
    assert (tmp_path / "latest").read_text() == "step1" and not (tmp_path / "step2").exists()


def train_while_a_disk_is_slow(folder: Path, layout: Layout) -> dict[str, Any]:
    """Three steps while rank 1's bytes are not on disk yet; the checkpoint is of the step before them."""
    slow, sync = threading.Event(), os.fsync
    with engine(layout) as made:
        steps(made, layout, 0, BEFORE)
        if dist.get_rank() == 1:
            os.fsync = lambda descriptor: (slow.wait(60), sync(descriptor))[1]
        saving = checkpoints.begin(made, folder, layout=layout, step=BEFORE, state={})
        after = steps(made, layout, BEFORE, AFTER)
        there = folder.exists()
        dist.barrier()
        slow.set()
        saved = saving.wait()
        loaded = checkpoints.load(made, folder, layout=layout)
        again = steps(made, layout, BEFORE, AFTER)
    return {"early": there, "seconds": saved.seconds, "loaded": loaded, "after": after, "again": again}


def test_training_goes_on_while_a_checkpoint_goes_to_disk(tmp_path: Path) -> None:
    results = run(2, train_while_a_disk_is_slow, tmp_path / "step3", Layout(1, 2, 2))
    for found in results:
        assert not found["early"], "without rank 1's bytes there is no checkpoint"
        assert found["loaded"].weights_bit_exact and found["loaded"].optimizer_bit_exact
        assert found["after"] == found["again"]
    assert results[0]["seconds"] > 0
