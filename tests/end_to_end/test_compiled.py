"""`train.compile=true`: the numbers of the model that is not compiled."""

import json

import pytest
from checkout import only_run


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 3])
def test_compiled_layers_give_the_same_numbers(command, tmp_path, zero):
    done = command(
        "sp.size=2", f"zero.stage={zero}", "stages=[parity]", "optim=sgd", "parity.steps=2", "train.seq_len=128",
        "train.compile=true", "device=cpu", "tracker.mode=disabled", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    assert json.loads((run / "results.json").read_text())["stages"]["parity"]["status"] == "ok"
    kernels = [path.read_text() for path in (run / "compiled").rglob("*.cpp")]
    assert any("exp()" in text for text in kernels) and any("sqrt" in text for text in kernels), "SiLU and norm"
