"""Out of memory in the words of everything that can run out: a search for the longest sequence goes on after it."""

import pytest

from ulysses_exp.config import resolve
from ulysses_exp.config.composing import composed
from ulysses_exp.experiment.out_of_memory import advice
from ulysses_exp.launch.failure import RankFailure

WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",  # torch
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "NCCL error: unhandled cuda error, NCCL version 2.27.5\nFailed to CUDA calloc 6291456 bytes",
    "ncclUnhandledCudaError: Call to CUDA function failed. cudaErrorMemoryAllocation",
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
)


@pytest.mark.parametrize("said", WORDS)
def test_it_is_told_from_other_errors(said):
    assert RankFailure(1, said).out_of_memory


@pytest.mark.parametrize("said", ["CUDA error: an illegal memory access was encountered", "NCCL timeout", "ValueError"])
def test_other_errors_are_none(said):
    assert not RankFailure(1, said).out_of_memory


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), "set memory=checkpointing, memory=alst or zero.stage=3"),
        (("memory=alst", "zero.stage=3"), "set zero=stage3_offload, sp.size=4 or train.seq_len=256"),
        (("memory=alst", "zero=stage3_offload", "sp.size=8"), "set sp.size=16 or train.seq_len=256"),
        (
            ("train.micro_batch_size=2", "memory=alst", "sp.size=1"),
            "set train.micro_batch_size=1, sp.size=2 or train.seq",
        ),
    ],
)
def test_what_would_help_is_told(overrides, told):
    assert advice(resolve(composed(["device=cpu", *overrides])[0])).startswith(told)
