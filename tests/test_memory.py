"""Errors that mean that memory ran out."""

from __future__ import annotations

import pytest
import torch

from trainkit.memory import (
    garbage_collection_cuda,
    get_model_size_mb,
    is_cuda_out_of_memory,
    is_cudnn_snafu,
    is_oom_error,
    is_out_of_cpu_memory,
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("anything"),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 8.00 GiB total capacity)"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_these_mean_that_memory_ran_out(error: BaseException) -> None:
    assert is_oom_error(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), RuntimeError(), ValueError("CUDA out of memory"), RuntimeError(1, 2)]
)
def test_these_do_not(error: BaseException) -> None:
    assert not is_oom_error(error)


def test_a_request_that_no_machine_can_serve_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_oom_error(caught.value)
    garbage_collection_cuda()


def test_each_kind_is_told_from_the_others() -> None:
    errors = [
        RuntimeError("CUDA out of memory."),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
        MemoryError(),
    ]
    for index, asks in enumerate((is_cuda_out_of_memory, is_cudnn_snafu, is_out_of_cpu_memory)):
        assert [asks(error) for error in errors] == [index == other for other in range(3)]


def test_a_modules_size_is_that_of_its_file() -> None:
    assert 0.400 < get_model_size_mb(torch.nn.Linear(100, 1000)) < 0.410  # 101,000 numbers of 4 bytes, and their names
