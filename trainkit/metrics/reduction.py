"""Several processes' running values as one: what each of them sends, and what the sums and maxima of all mean.

A mean is a sum and its weight, each added up before they are divided, so it does not depend on who had which batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EXTREMES = ("min", "max")
ROUNDED: dict[torch.dtype | None, float] = {torch.float32: 2.0**-23}
"""By which part of it a mean may be rounded: a division, or a product with a rounded inverse."""


class Share(NamedTuple):
    """What one process has of one name: numbers or 0-dimensional tensors."""

    reduce: str
    """One of "mean", "sum", "min", "max"."""
    total: Any
    """Of a mean, the sum of each value times its weight; None: this process has nothing."""
    weight: Any


def packed(shares: Sequence[Share], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a process's shares as two vectors: one to be added up over processes, one of which the maxima are taken.

    A minimum travels as the maximum of the negated, and a NaN beside it as a count: what backends make of one differs.
    """
    adding = _column([_sent(s, 0.0) for s in shares if s.reduce not in EXTREMES], dtype, device)
    extremes = _column([_sent(s, -math.inf) for s in shares if s.reduce in EXTREMES], dtype, device)
    weights = _column([0.0 if s.total is None else s.weight for s in shares], dtype, device)
    nans = extremes.isnan()
    return torch.cat([weights, adding, nans.to(dtype)]), extremes.masked_fill(nans, -math.inf)


def unpacked(reduces: Sequence[str], added: Sequence[float], maxima: Sequence[float]) -> list[tuple[float, float]]:
    """Return each name's total and weight over all processes, from the sums and the maxima of what was packed."""
    count = len(reduces)
    weights, totals = added[:count], iter(added[count : len(added) - len(maxima)])
    extremes = zip(added[len(added) - len(maxima) :], maxima, strict=True)
    found = []
    for reduce, weight in zip(reduces, weights, strict=True):
        if reduce in EXTREMES:
            nans, maximum = next(extremes)
            total = math.nan if nans else maximum if reduce == "max" else -maximum
        else:
            total = next(totals)
        found.append((total, weight))
    return found


def result(reduce: str, total: float, weight: float, dtype: torch.dtype | None) -> float:
    """Return what a total and its weight come to, of values that were logged in this dtype, None for numbers."""
    if reduce != "mean":
        return total
    return without_rounding(total, dtype) / weight if weight else math.nan


def without_rounding(total: Any, dtype: torch.dtype | None) -> Any:
    """Return a sum of means times their weights as the whole number that it is but for the rounding of the means.

    An accuracy of a batch, times its size, is a count. In float32 it is a little off, and by how much depends on how
    the samples are dealt out to batches and processes: the epoch's accuracy would differ in its last bit. What is so
    close to a whole number changes by less than the means themselves were rounded by.
    """
    close = ROUNDED.get(dtype, 2.0**-45)
    if not isinstance(total, Tensor):
        near = float(round(total)) if math.isfinite(total) else total
        return near if abs(total - near) <= abs(total) * close else total
    near_one = total.round()
    return torch.where((total - near_one).abs() <= total.abs() * close, near_one, total)


def _sent(share: Share, nothing: float) -> Any:
    if share.total is None:
        return nothing
    return -share.total if share.reduce == "min" else share.total


def _column(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers and tensors as one vector; nothing is read from the device."""
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=dtype, device=device)
    tensors = [value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype) for value in values]
    return torch.stack([tensor.detach().to(device, dtype).reshape(()) for tensor in tensors])
