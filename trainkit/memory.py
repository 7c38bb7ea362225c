"""Memory: tell whether an error means that it ran out, and give back what is no longer used."""

from __future__ import annotations

import gc

import torch

_SIGNS = (
    ("out of memory",),  # "CUDA out of memory", "HIP out of memory", "MPS backend out of memory"
    ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",),  # what cuDNN says when its workspace does not fit
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED",),
    ("CUBLAS_STATUS_ALLOC_FAILED",),
    ("DefaultCPUAllocator:", "can't allocate memory"),
    ("DefaultCPUAllocator:", "not enough memory"),  # the same, on Windows
)


def is_oom_error(exception: BaseException) -> bool:
    """Whether an exception says that an accelerator's memory, or the host's, is used up."""
    if isinstance(exception, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(exception)
    return isinstance(exception, RuntimeError) and any(all(part in message for part in sign) for sign in _SIGNS)


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
