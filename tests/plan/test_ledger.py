"""Live bytes, counted as operators run."""

from __future__ import annotations

import torch

from ulysses_exp.plan.ledger import Ledger


def test_the_peak_is_what_lived_at_once():
    with Ledger({}) as ledger:
        ledger.begin("work")
        first = torch.empty(1000)
        second = torch.empty(500)
        view = second.view(5, 100)  # no storage of its own
        del first
        torch.empty(200)
        assert sum(ledger.live["cpu"].values()) == 2000
        del second, view
    assert sum(ledger.live["cpu"].values()) == 0
    assert sum(ledger.peaks["work"]["cpu"].values()) == 6000


def test_sizes_are_multiples_of_the_allocators_block():
    with Ledger({"cpu": 512}) as ledger:
        kept = torch.empty(1, dtype=torch.uint8), torch.empty(513, dtype=torch.uint8)
        assert sum(ledger.live["cpu"].values()) == 512 + 1024
        del kept


def test_a_phase_begins_with_what_is_there():
    with Ledger({}) as ledger:
        ledger.begin("first")
        kept = torch.empty(100)
        ledger.is_of(kept, "gradients")
        ledger.begin("second")
    assert ledger.peaks["second"]["cpu"] == {"gradients": 400} | dict.fromkeys(
        set(ledger.peaks["second"]["cpu"]) - {"gradients"}, 0
    )
    del kept
