"""Bytes and operations to seconds, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ulysses_exp.config import Config
from ulysses_exp.config.hardware import load
from ulysses_exp.plan.step_time import Work, collectives, step_time
from ulysses_exp.plan.trace import Trace

H100 = replace(load("h100"), gbytes_per_s={"node": 400.0, "network": 50.0, "host": 60.0})


def traced(*operators: tuple[str, int, int, int], to_host: int = 0) -> Trace:
    return Trace(
        layers=1, seq_len=8, parameters=1, parameters_per_rank=1, device={}, host={}, rest={},
        collectives=list(operators), host_copies={"to_host": to_host}, all_to_all_calls=0, all_to_all_bytes=0,
    )  # fmt: skip


def test_what_a_rank_sends_by_kind_of_collective():
    sent = collectives(
        traced(("_allgather_base_", 8, 2, 800), ("allreduce_", 8, 1, 800), ("alltoall_base_", 8, 3, 800)), H100
    )
    assert {(c.name, c.calls, c.bytes_sent) for c in sent} == {
        ("all_gather", 2, 700),
        ("all_reduce", 1, 1400),
        ("all_to_all", 3, 700),
    }


def test_a_group_of_one_sends_nothing():
    assert collectives(traced(("allreduce_", 1, 5, 10**9)), H100) == []


def test_beyond_a_node_the_network_is_the_slowest_link():
    within, across = (collectives(traced(("_allgather_base_", n, 1, 10**9)), H100)[0].seconds for n in (8, 16))
    assert within == pytest.approx(7 / 8 / 400)
    assert across == pytest.approx(15 / 16 / 50)


def test_an_all_to_all_uses_both_links():
    (exchange,) = collectives(traced(("alltoall_base_", 16, 1, 16 * 10**8)), H100)
    assert exchange.seconds == pytest.approx(8 * 10**8 / 50e9), "eight of sixteen parts leave the node"


def test_step_time_of_pure_matrix_products():
    config = Config()
    config.train = replace(config.train, precision="bf16")
    config.sp = replace(config.sp, size=1)
    work = Work(model=3e15, hardware=4e15, attention_share=0.0)
    time = step_time(config, H100, traced(to_host=6 * 10**9), work)
    compute = 4e15 / 989e12 / H100.efficiency["matmul"]
    assert time.compute == time.total == pytest.approx(compute)
    assert time.host == pytest.approx(0.1)
    assert time.mfu_bound == pytest.approx(3 / 4 * H100.efficiency["matmul"])
    assert time.communication_share == pytest.approx(0)


def test_a_cpu_has_no_step_time():
    assert step_time(Config(), load("cpu"), traced(), Work(1.0, 1.0, 0.5)) is None
