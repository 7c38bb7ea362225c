"""The norms of gradients, to log them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.pieces import by_kind, is_spread, norm_of, whole


def grad_norm(module: nn.Module, norm_type: float | str, group_separator: str = "/") -> dict[str, Tensor]:
    """Return the norm of each parameter's gradient, and of all together, as tensors; nothing waits for the device.

    Of gradients that are spread over processes, which all call this, it is that of all their pieces.

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
        f"grad_{norm_type}_norm{group_separator}{name}": norm_of(parameter.grad.detach(), norm_type)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    norms = _whole(norms)
    if norms:
        first = next(iter(norms.values()))
        each = torch.stack([norm.to(first.device) for norm in norms.values()])
        norms[f"grad_{norm_type}_norm_total"] = torch.linalg.vector_norm(each, norm_type)
    return norms


def _whole(norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return norms of whole gradients; those of one mesh take one message."""
    for group in by_kind(norm for norm in norms.values() if is_spread(norm)):
        names = [name for name, norm in norms.items() if any(norm is one for one in group)]
        norms.update(zip(names, whole(torch.stack([norms[name] for name in names])).unbind(), strict=True))
    return norms
