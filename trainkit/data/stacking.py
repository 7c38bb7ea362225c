"""What default_collate makes of samples, in two thirds of its time where they are tuples or dicts of tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

TORCHS_OWN = dict(default_collate_fn_map)
"""How default_collate puts things together, unless somebody has changed that since."""


def is_default(collate_fn: Any) -> bool:
    """Whether a collate_fn stacks tensors, and nothing else, as torch's own does."""
    return collate_fn is default_collate and default_collate_fn_map == TORCHS_OWN


def collate_of(collate_fn: Callable[[Any], Any], pinned: bool = False) -> Callable[[Any], Any]:
    """Return what gives the same batches as a collate_fn; in a worker its own way, which stacks in shared memory.

    Args:
        collate_fn: the user's.
        pinned: stack into pinned memory, for a CUDA device.
    """
    if not is_default(collate_fn) or get_worker_info() is not None:
        return collate_fn
    return partial(stacked, stack=pinned_stack) if pinned else stacked


def stacked(samples: Any, stack: Callable[[Any], Tensor] = torch.stack) -> Any:
    """Return the samples put together."""
    first = samples[0]
    try:
        if type(first) is tuple:
            return [_stacked(column, stack) for column in zip(*samples, strict=True)]
        if type(first) is dict:
            return {key: _stacked([sample[key] for sample in samples], stack) for key in first}
        if type(first) is Tensor:
            return _stacked(samples, stack)
    except Exception:
        return default_collate(samples)  # which says what is wrong with them
    return default_collate(samples)


def pinned_stack(tensors: Any) -> Tensor:
    """Stack tensors of the host into pinned memory, others as torch does.

    Raises:
        RuntimeError: they do not fit together, or need a gradient.
    """
    first = tensors[0]
    if first.device.type != "cpu" or not first.is_contiguous() or len(set(map(attrgetter("dtype"), tensors))) > 1:
        return torch.stack(tensors)
    out = torch.empty((len(tensors), *first.shape), dtype=first.dtype, device="cpu", pin_memory=True)
    return torch.stack(tensors, out=out)


def _stacked(column: Any, stack: Callable[[Any], Tensor]) -> Any:
    first = column[0]
    if type(first) is Tensor and first.layout is torch.strided and not first.is_nested:
        return stack(column)
    return default_collate(column)
