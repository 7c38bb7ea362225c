"""Move and detach the tensors of nested data: what user code that handles batches by itself calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.tree import leaves, map_tensors, with_leaves


def move_data_to_device(batch: Any, device: torch.device | str) -> Any:
    """Return nested data on a device: every tensor, and everything else that has a `.to`.

    Args:
        batch: tuples, lists, dicts, dataclasses of tensors; what can't be moved is passed on as it is.
        device: where to; copies from pinned memory to an accelerator overlap with what it does.
    """
    device = torch.device(device)
    overlapping = device.type not in ("cpu", "mps")  # a copy to the host may be read before it has arrived

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=overlapping)
        moved = value.to(device)
        return value if moved is None else moved  # a `.to` in place that returns nothing

    return map_tensors(move, batch)


def tensors_on_device(data: Any, device: torch.device | str) -> Any:
    """Return nested data on a device, with numbers and numpy arrays as tensors; a bool is 0 or 1, a uint8."""

    def tensor_of(value: Any) -> Any:
        if isinstance(value, bool):
            return torch.tensor(value, dtype=torch.uint8)  # backends don't take bools
        if isinstance(value, (int, float)) or type(value).__module__ == "numpy":
            return torch.as_tensor(value)
        return value

    def nothing_else(_: Any) -> bool:
        return False

    held = [tensor_of(value) for value in leaves(data, nothing_else)]
    return move_data_to_device(with_leaves(data, nothing_else, held), device)


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """Return nested data with every tensor detached from its graph.

    Args:
        in_dict: the data.
        to_cpu: bring the tensors to the host, too.
    """

    def detach(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().cpu() if to_cpu else value.detach()

    return map_tensors(detach, in_dict)
