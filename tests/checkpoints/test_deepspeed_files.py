"""DeepSpeed's own checkpoints are pickles: opened where the user says that they can be trusted, and only there."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from checkpoint_ranks import run
from test_damage import _Payload
from tiny_engine import engine, steps

from ulysses_exp.layout import Layout
from ulysses_exp.rank import checkpoints


def save_with_deepspeed(folder: Path, layout: Layout) -> list[float]:
    with engine(layout) as made:
        steps(made, layout, 0, 2)
        made.save_checkpoint(str(folder), tag="step2")
        return steps(made, layout, 2, 3)


def attempt(folder: Path, layout: Layout, trust: bool) -> str | list[float]:
    with engine(layout, seed=1) as made:
        try:
            loaded = checkpoints.load(made, folder / "step2", layout=layout, trust_pickle=trust)
        except checkpoints.CheckpointError as error:
            return str(error)
        assert (loaded.route, loaded.step, loaded.weights_bit_exact) == ("direct", 2, None)
        return steps(made, layout, 2, 3)


@pytest.mark.parametrize("name", ["sp1-dp1-z0", "sp2-dp1-z2", "sp1-dp2-z3"])
def test_opened_on_trust_only(name: str, tmp_path: Path) -> None:
    layout = Layout.parse(name)
    expected = run(layout.world, save_with_deepspeed, tmp_path, layout)[0]
    message = run(layout.world, attempt, tmp_path, layout, False)[0]
    assert message.startswith(f"{tmp_path}/step2: ") and "checkpoint.trust_pickle=true" in message
    assert run(layout.world, attempt, tmp_path, layout, True)[0] == expected


def test_another_layout_is_refused_in_one_line(tmp_path: Path) -> None:
    run(2, save_with_deepspeed, tmp_path, Layout(1, 2, 2))
    message = run(1, attempt, tmp_path, Layout(1, 1, 2), True)[0]
    assert message.startswith(f"{tmp_path}/step2: ") and "\n" not in message


def test_a_pickle_that_is_not_trusted_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "step2").mkdir()
    file = tmp_path / "step2" / "mp_rank_00_model_states.pt"
    file.write_bytes(pickle.dumps(_Payload(f"touch {tmp_path}/executed")))
    assert "pickled" in run(1, attempt, tmp_path, Layout(1, 1, 0), False)[0]
    assert not (tmp_path / "executed").exists()
