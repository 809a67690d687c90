"""`train.compile=true`: the numbers of the model that is not compiled."""

import json

import pytest
from checkout import only_run


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 3])
def test_compiled_layers_give_the_same_numbers(command, tmp_path, zero, monkeypatch):
    if zero:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    done = command(
        "sp.size=2", f"zero.stage={zero}", "stages=[parity]", "optim=sgd", "parity.steps=2", "train.seq_len=128",
        "train.compile=true", "device=cpu", "tracker.mode=disabled", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    assert json.loads((run / "results.json").read_text())["stages"]["parity"]["status"] == "ok"
    cache = tmp_path / "mine" if zero else run / "compiled"
    kernels = [path.read_text() for path in cache.rglob("*.cpp")]
    assert any("exp()" in text for text in kernels) and any("sqrt" in text for text in kernels), "SiLU and norm"
    stored = [list(graph.iterdir()) for graph in cache.glob("fxgraph/*/*")]
    assert stored and all(len(by) == 1 for by in stored), "one rank compiles, the others find it"
