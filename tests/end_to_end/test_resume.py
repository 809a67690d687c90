"""`checkpoint.source`: training goes on, at another layout too, as if it had never stopped."""

import json

import pytest
from checkout import only_run

QUICK = ["stages=[train]", "train.seq_len=64", "tracker.mode=disabled", "device=cpu", "optim.schedule=cosine",
         "optim.warmup_steps=2"]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "tolerance"),
    [
        ([], 0.0),
        pytest.param(["sp.size=1", "dp.size=2", "zero.stage=1"], 1e-6, marks=pytest.mark.long),
    ],
    ids=["same layout", "other layout"],
)
def test_the_curve_is_that_of_an_uninterrupted_run(command, tmp_path, layout, tolerance):
    whole, part, rest = (tmp_path / name for name in ("whole", "part", "rest"))
    for folder in (whole, part, rest):
        folder.mkdir()
    start = ["sp.size=2", "zero.stage=3", *QUICK]
    assert command(*start, "train.steps=6", "checkpoint.every=4", "checkpoint.keep=2", cwd=whole).returncode == 0
    source = only_run(whole) / "checkpoints" / "step4"
    done = command("stages=[train]", f"checkpoint.source={source}", "tracker.mode=disabled", *layout, cwd=rest)
    assert done.returncode == 0, done.stdout + done.stderr
    uninterrupted = json.loads((only_run(whole) / "results.json").read_text())["stages"]["train"]
    results = json.loads((only_run(rest) / "results.json").read_text())
    assert only_run(rest).name.endswith(f"-tiny_llama-{results['layout']['name']}"), "also where it is inherited"
    resumed = results["stages"]["train"]
    assert resumed["first_step"] == 4 and resumed["steps"] == 2
    for key in ("loss", "grad_norm", "learning_rate"):
        assert resumed[key] == pytest.approx(uninterrupted[key][4:], rel=tolerance, abs=0)
