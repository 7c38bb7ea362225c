"""The norms of gradients, to log them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grad_norm(module: nn.Module, norm_type: float | str, group_separator: str = "/") -> dict[str, Tensor]:
    """Return the norm of each parameter's gradient, and of all together, as tensors; nothing waits for the device.

    Args:
        module: parameters without a gradient are left out.
        norm_type: 1, 2, ... or "inf".
        group_separator: between the kind of norm and the parameter's name, where a logger makes groups.

    Raises:
        ValueError: the type of norm is not above 0.

    Example:
        >>> class Watched(Module):
        ...     def on_before_optimizer_step(self, optimizer):
        ...         self.log_dict(grad_norm(self, norm_type=2))
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0, or 'inf'. Received: {norm_type}.")
    norms = {
        f"grad_{norm_type}_norm{group_separator}{name}": torch.linalg.vector_norm(parameter.grad.detach(), norm_type)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if norms:
        first = next(iter(norms.values()))
        each = torch.stack([norm.to(first.device) for norm in norms.values()])
        norms[f"grad_{norm_type}_norm_total"] = torch.linalg.vector_norm(each, norm_type)
    return norms
