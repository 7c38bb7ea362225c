"""Bring batches to a CUDA device while it computes: on a stream of their own, from pinned memory where that is free.

The host runs ahead of the device: while the device works on a batch, the host already asks for the next. A copy on the
stream that computes would wait there until the device is done, and a copy from pageable memory would hold up the host
for as long; on a stream of its own it begins at once. What computes next waits for it on the device, not on the host.
Nothing is fetched earlier than the loop asks for it, so hooks, order and positions are what they are without this.

Pinned memory makes a copy twice as fast and lets the host go on meanwhile, but to copy pageable memory into it first
costs the host as much as it saves (PyTorch's tutorial on pin_memory and non_blocking). So batches are pinned only where
that is free: gathered or stacked into pinned memory in the first place, or by torch's own thread beside workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.strategies import Strategy
from trainkit.tree import leaves


class SideStream:
    """Copy batches to the strategy's device on a stream of their own; the current stream waits for each.

    Args:
        strategy: moves what it is given, on one CUDA device.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy, self.device = strategy, strategy.device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Return the batch on the device."""
        found = plain_tensors(batch)
        if not found or any(tensor.device.type != "cpu" for tensor in found):  # others may depend on what computes
            return self.strategy.to_device(batch)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            moved = self.strategy.to_device(batch)
        current.wait_stream(self.stream)
        for tensor in plain_tensors(moved) or ():
            if tensor.is_cuda:
                tensor.record_stream(current)  # its memory belongs to the other stream, and is in use on this one
        return moved


def plain_tensors(batch: Any) -> list[Tensor] | None:
    """Return the tensors in plain containers; None where something else may hold tensors that nobody sees."""
    found = []
    for leaf in leaves(batch, _never):
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided or leaf.is_nested:
                return None
            found.append(leaf)
        elif hasattr(leaf, "to") or dataclasses.is_dataclass(leaf) or isinstance(leaf, (Mapping, list, tuple)):
            return None
    return found


def _never(node: Any) -> bool:
    return False
