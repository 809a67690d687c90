"""A profile's events, divided; and what a profiled run says."""

from types import SimpleNamespace

import pytest

from ulysses_exp.rank.metrics.step_split import step_split


def event(name: str, begin_ms: float, end_ms: float, device: str = "CPU") -> SimpleNamespace:
    time_range = SimpleNamespace(start=begin_ms * 1e3, end=end_ms * 1e3)  # torch gives microseconds
    return SimpleNamespace(name=name, time_range=time_range, device_type=SimpleNamespace(name=device))


def test_a_step_is_divided_and_adds_up():
    events = [
        event("ProfilerStep#3", 0, 100),
        event("ProfilerStep#4", 100, 200),
        event("aten::mm", 0, 90),
        event("gloo:all_to_all", 10, 30),
        event("gloo:all_gather", 20, 50),  # 10 ms of it beside the all-to-all, whose time that is
        event("gloo:all_gather", 40, 60),
    ]
    split = step_split(events, steps=2, input_seconds=0.002)
    assert split == pytest.approx({"compute": 0.073, "exchange": 0.01, "zero": 0.015, "input": 0.002})
    assert sum(split.values()) == pytest.approx(0.1)


def test_on_cuda_kernels_count_and_launches_do_not():
    events = [
        event("ProfilerStep#3", 0, 100),
        event("ProfilerStep#3", 0, 100, "CUDA"),
        event("nccl:all_to_all", 0, 1),
        event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 10, 30, "CUDA"),
        event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 30, 35, "CUDA"),
    ]
    split = step_split(events, steps=1, input_seconds=0.0)
    assert split == pytest.approx({"compute": 0.075, "exchange": 0.02, "zero": 0.005, "input": 0.0})
