"""Strategy: how a run is spread over devices. The base class is one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.tree import to_device


class Strategy:
    """What the loop asks of a strategy. This one is a single device.

    Args:
        device: where the module and its batches live.
    """

    world_size = 1
    global_rank = 0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def setup(self, module: nn.Module) -> None:
        """Bring the module to its device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        module.to(self.device)

    def wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step as the loop calls it; on one device the method itself."""
        return step

    def to_device(self, batch: Any) -> Any:
        """Return the batch on the device; copies from pinned memory overlap with what the device does."""
        return to_device(batch, self.device)

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float, algorithm: str) -> None:
        """Clip gradients in place: their common norm ("norm") or each element ("value")."""
        if algorithm == "value":
            nn.utils.clip_grad_value_(parameters, limit)
        else:
            nn.utils.clip_grad_norm_(parameters, limit)

    def optimizers_to_device(self, optimizers: Iterable[Optimizer]) -> None:
        """Bring restored optimizer state to where its parameters are."""
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and name != "step" and value.device != parameter.device:
                        state[name] = value.to(parameter.device)

    def teardown(self, module: nn.Module) -> None:
        """Give an accelerator's memory back: the module returns to the host."""
        if self.device.type != "cpu":
            module.cpu()
