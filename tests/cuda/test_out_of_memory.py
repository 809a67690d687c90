"""Out of memory in the words of everything that can run out: a search for the longest sequence goes on after it."""

import pytest

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
