"""Make modules without drawing their initial weights, which are loaded afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILLS = frozenset(
    {Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_, Tensor.exponential_, Tensor.erfinv_, Tensor.clamp_}
)
"""What torch.nn.init fills a parameter with."""


class EmptyInit(TorchFunctionMode):
    """Leave parameters as their memory was; a large module is made in a fraction of the time. Buffers are filled."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function in FILLS and isinstance(args[0], nn.Parameter):
            return args[0]
        return function(*args, **(kwargs or {}))
