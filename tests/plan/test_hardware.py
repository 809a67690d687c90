"""The tables of machines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from checkout import ROOT

from ulysses_exp.config import ConfigError
from ulysses_exp.config.hardware import GIB, load
from ulysses_exp.rank.metrics.flops import PEAK

NAMES = sorted(path.stem for path in (ROOT / "conf" / "hardware").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_a_machine(name):
    hardware = load(name)
    assert 0 < hardware.budget < hardware.memory_gib * GIB or not hardware.is_gpu
    if hardware.is_gpu:
        assert hardware.gbytes_per_s["network"] <= hardware.gbytes_per_s["node"], "a node's own links are not slower"
        assert all(0 < share < 1 for share in hardware.efficiency.values())


@pytest.mark.parametrize("part", sorted(PEAK))
def test_plans_and_mfu_take_the_same_peak(part):
    hardware = load(part.lower())
    assert {k: v * 1e12 for k, v in hardware.peak_tflops.items()} == PEAK[part]


def test_ranks_of_a_node_share_its_memory():
    h100 = load("h100")
    assert h100.host_budget(1) == h100.host_memory_gib * GIB
    assert h100.host_budget(8) == h100.host_budget(64) == h100.host_memory_gib * GIB / 8


def test_an_unknown_machine_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"plan\.hardware: 'h10' is not a choice; did you mean h100\?"):
        load("h10")


def test_a_file_of_ones_own(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        (ROOT / "conf" / "hardware" / "a100.yaml").read_text().replace("gpus_per_node: 8", "gpus_per_node: 4")
    )
    assert load(str(mine)) == replace(load("a100"), gpus_per_node=4)
    mine.write_text("name: mine\nmemory: 80\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml does not describe a machine"):
        load(str(mine))
