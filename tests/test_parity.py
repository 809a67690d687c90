"""A covering subset of benchmarks/parity.py: every variant, every layout at least once, on warm ranks."""

import sys

import pytest
from checkout import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import parity

CELLS = [(variant, parity.LAYOUTS[(5 * i + 3) % len(parity.LAYOUTS)]) for i, variant in enumerate(parity.VARIANTS)] + [
    ("gqa", layout) for i, layout in enumerate(parity.LAYOUTS) if (i - 3) % 5 or (i - 3) // 5 >= len(parity.VARIANTS)
]


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return parity.Harness(tmp_path_factory.mktemp("parity"))


def test_the_cells_cover_all_layouts_and_variants():
    assert {variant for variant, _ in CELLS} == set(parity.VARIANTS)
    assert {layout for _, layout in CELLS} == set(parity.LAYOUTS)


@pytest.mark.parametrize(("variant", "layout"), CELLS, ids=lambda v: getattr(v, "name", v))
def test_a_layout_reproduces_the_single_process(harness, variant, layout):
    result = harness.cell(variant, "sgd", layout)
    assert result["status"] == "ok", result["reason"]
    assert parity.largest(result) <= 1e-6


@pytest.mark.parametrize("exchange", ["fused", "deepspeed"])
def test_adamw_and_both_exchanges(harness, exchange):
    result = harness.cell("gqa", "adamw", parity.Layout(4, 1, 3), exchange)
    assert result["max_rel_loss_diff"] <= 1e-5


def test_a_wrong_gradient_scale_is_noticed(harness, tmp_path):
    """The harness can fail: SGD at twice the rate is what a gradient of twice the size does."""
    import json

    config = parity.configuration("gqa", "sgd", parity.Layout(2, 1, 0))
    config.optim.lr *= 2
    reference = parity.configuration("gqa", "sgd", parity.REFERENCE)
    folders = [harness._trajectory("control", reference), harness._trajectory("doubled", config)]
    runs = tuple(json.loads((f / "trajectory.json").read_text()) for f in folders)
    result = parity.compare(config, *folders, runs)
    assert result["status"] == "failed" and result["first_difference"]["step"] == 1


@pytest.mark.parametrize("layout", [parity.Layout(2, 2, 1), parity.Layout(2, 1, 2), parity.Layout(2, 1, 3)], ids=str)
def test_deepspeeds_own_keys_change_no_number(harness, layout):
    """Buckets that fill many times, reduced beside the backward where DeepSpeed does that."""
    import json

    zero = {"reduce_bucket_size": 5_000, "allgather_bucket_size": 5_000, "overlap_comm": True}
    config = parity.configuration("gqa", "sgd", layout)
    config.deepspeed = {
        "zero_optimization": zero | ({"stage3_prefetch_bucket_size": 1_000} if layout.zero == 3 else {})
    }
    reference = harness._trajectory("control", parity.configuration("gqa", "sgd", parity.REFERENCE))
    ours = harness._trajectory("own-keys", config)
    runs = tuple(json.loads((folder / "trajectory.json").read_text()) for folder in (reference, ours))
    result = parity.compare(config, reference, ours, runs)
    assert result["status"] == "ok" and parity.largest(result) <= 1e-6, result.get("reason")
