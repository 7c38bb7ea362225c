"""Images and convolutions in channels-last memory format, which fast convolution kernels read without turning them.

A tensor keeps its shape and its numbers: `x.shape` is (N, C, H, W) as ever, only `x.stride()` differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.tree import map_tensors

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the number of a tensor's dimensions."""


def channels_last(value: Any) -> Any:
    """Return a tensor of images or volumes in channels-last format, anything else as it is."""
    if isinstance(value, Tensor) and value.ndim in FORMATS and value.layout is torch.strided:
        return value.contiguous(memory_format=FORMATS[value.ndim])
    return value


def contiguous(value: Any) -> Any:
    """Return a tensor of images or volumes in torch's usual format, anything else as it is."""
    if isinstance(value, Tensor) and value.ndim in FORMATS and value.layout is torch.strided:
        return value.contiguous()
    return value


def lay(module: nn.Module, optimizers: Iterable[Optimizer], order: Callable[[Any], Any]) -> None:
    """Lay a module's parameters and buffers, their gradients and what optimizers keep of them in another order."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = order(tensor.data)
        if tensor.grad is not None:
            tensor.grad = order(tensor.grad)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state.update({name: order(value) for name, value in state.items()})


def after(transfer: Callable[[Any, int], Any] | None) -> Callable[[Any, int], Any]:
    """Return what brings a batch to the device, and lays its images in channels-last format when they are there."""

    def laid(batch: Any, dataloader_idx: int) -> Any:
        return map_tensors(channels_last, batch if transfer is None else transfer(batch, dataloader_idx))

    return laid


def as_saved(state: Any) -> Any:
    """Return a state with its images in torch's usual format; tensors that share memory still do."""
    laid: dict[tuple[Any, ...], Tensor] = {}

    def once(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim not in FORMATS or value.is_contiguous():
            return value
        where = value.data_ptr(), value.shape, value.stride(), value.dtype
        return laid.setdefault(where, contiguous(value))

    return map_tensors(once, state)
