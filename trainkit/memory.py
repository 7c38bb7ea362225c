"""Memory: tell whether an error means that it ran out, give back what is no longer used, measure a module."""

from __future__ import annotations

import gc
import re
from io import BytesIO
from pathlib import Path

import torch
from torch import nn

_CUDNN = (
    ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",),  # what cuDNN says when its workspace does not fit
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED",),
)
_CPU = (
    ("DefaultCPUAllocator:", "can't allocate memory"),
    ("DefaultCPUAllocator:", "not enough memory"),  # the same, on Windows
)


def is_oom_error(exception: BaseException) -> bool:
    """Whether an exception says that an accelerator's memory, or the host's, is used up."""
    if isinstance(exception, (torch.OutOfMemoryError, MemoryError)):
        return True
    others = (("out of memory",), ("CUBLAS_STATUS_ALLOC_FAILED",))  # "HIP out of memory", "MPS backend out of memory"
    return _says(exception, *others, *_CUDNN, *_CPU)


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Whether an exception says that a CUDA device's memory is used up."""
    return _says(exception, ("CUDA", "out of memory"))


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Whether an exception is one of those that cuDNN raises where memory is used up."""
    return _says(exception, *_CUDNN)


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether an exception says that the host's memory is used up."""
    return isinstance(exception, MemoryError) or _says(exception, *_CPU)


def _says(exception: BaseException, *signs: tuple[str, ...]) -> bool:
    message = str(exception)
    return isinstance(exception, RuntimeError) and any(all(part in message for part in sign) for sign in signs)


def garbage_collection_cuda() -> None:
    """Collect garbage, and let the accelerator's allocator give its free blocks back."""
    gc.collect()
    try:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()
    except RuntimeError as error:  # a device whose memory is used up may refuse even this
        if not is_oom_error(error):
            raise


def get_model_size_mb(model: nn.Module) -> float:
    """Return how many megabytes (10**6 bytes) a module's parameters and buffers take as a file."""
    file = BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getbuffer()) / 1e6


def swapped_out() -> int:
    """Return how many bytes of this process are swapped out; 0 where the system does not say, which is Linux only."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmSwap:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
