"""A covering subset of benchmarks/parity.py: every variant, every layout at least once, on warm ranks."""

import json
import sys

import pytest
from checkout import ROOT
from checkpoints.checkpoint_ranks import run

sys.path.insert(0, str(ROOT / "benchmarks"))
import parity

VARIANTS = [variant for variant in parity.VARIANTS if variant not in parity.UNEVEN]  # those want up to eight ranks
CELLS = [(variant, parity.LAYOUTS[(5 * i + 3) % len(parity.LAYOUTS)]) for i, variant in enumerate(VARIANTS)]
CELLS += [("gqa", layout) for layout in parity.LAYOUTS if layout not in {layout for _, layout in CELLS}]


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return parity.Harness(tmp_path_factory.mktemp("parity"))


def test_the_cells_cover_all_layouts_and_variants():
    assert {variant for variant, _ in CELLS} == set(VARIANTS)
    assert {layout for _, layout in CELLS} == set(parity.LAYOUTS)


@pytest.mark.parametrize(("variant", "layout"), CELLS, ids=lambda v: getattr(v, "name", v))
def test_a_layout_reproduces_the_single_process(harness, variant, layout):
    result = harness.cell(variant, "sgd", layout)
    assert result["status"] == "ok", result["reason"]
    assert parity.largest(result) <= result["tolerance"] <= 2e-5


@pytest.mark.parametrize("exchange", ["fused", "deepspeed"])
def test_adamw_and_both_exchanges(harness, exchange):
    result = harness.cell("gqa", "adamw", parity.Layout(4, 1, 3), exchange)
    assert result["max_rel_loss_diff"] <= 1e-5


def test_a_wrong_gradient_scale_is_noticed(harness, tmp_path):
    """The harness can fail: SGD at twice the rate is what a gradient of twice the size does."""
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


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return parity.Harness(tmp_path_factory.mktemp("bf16"), "bf16")


@pytest.mark.parametrize(
    ("variant", "optimizer", "layout"),
    [
        ("packed", "sgd", parity.Layout(2, 1, 2)),
        pytest.param("left padding", "sgd", parity.Layout(4, 1, 3), marks=pytest.mark.long),
        pytest.param("gqa", "adamw", parity.Layout(2, 2, 1), marks=pytest.mark.long),
    ],
)
def test_in_bf16_a_layout_is_as_near_as_bf16_lets_one_process_be(half, variant, optimizer, layout):
    result = half.cell(variant, optimizer, layout)
    assert result["status"] == "ok", result["reason"]
    assert 0 < result["max_noise_multiples"]["weight"] < 3


def without_borders(config, folder):
    """The trajectory of a layout whose attention takes each sequence for one document, and where its weights are."""
    import torch.distributed as dist

    from ulysses_exp.rank.session import open_session
    from ulysses_exp.stages.parity.rank import trajectory

    task = parity.Task("borders", config, (), folder)
    with open_session(task, dist.get_rank()) as session:
        task.results.mkdir(parents=True, exist_ok=True)
        begin = session.attention.begin
        session.attention.begin = lambda positions, mask: begin(_counted(positions), mask)
        return trajectory(session), task.results


def _counted(positions):
    import torch

    return torch.arange(positions.shape[-1]).expand_as(positions)


def planted(half, fault, optimizer):
    """What comes of a fault in bf16: (the clean configuration, result and weights of the faulty layout)."""
    variant = {"border": "packed", "window": "sliding window", "scale": "gqa"}[fault]
    clean, config = (parity.configuration(variant, optimizer, parity.Layout(2, 1, 2), precision="bf16") for _ in "ab")
    if fault == "border":
        return variant, clean, *run(2, without_borders, config, half.folder)[0]
    if fault == "window":
        config.model.architecture = dict(config.model.architecture) | {"sliding_window": None}
    else:
        config.optim.lr *= 2  # with SGD, what a gradient of twice the size does
    folder = half._trajectory("planted", config)
    return variant, clean, json.loads((folder / "trajectory.json").read_text()), folder


@pytest.mark.parametrize(
    ("fault", "optimizer"),
    [
        ("border", "sgd"),
        pytest.param("border", "adamw", marks=pytest.mark.long),
        pytest.param("window", "sgd", marks=pytest.mark.long),
        pytest.param("window", "adamw", marks=pytest.mark.long),
        pytest.param("scale", "sgd", marks=pytest.mark.long),
    ],
)
def test_in_bf16_what_is_lost_is_noticed(half, fault, optimizer):
    variant, clean, ours, folder = planted(half, fault, optimizer)
    references = [half._reference(variant, optimizer, "fused", precision) for precision in ("bf16", "fp32")]
    runs = [json.loads((f / "trajectory.json").read_text()) for f in references]
    result = parity.compare(clean, references[0], folder, (runs[0], ours), (references[1], runs[1]))
    assert result["status"] == "failed"
    assert result["max_noise_multiples"]["weight"] > 6, result["max_noise_multiples"]
