"""Make an optimizer without importing torch's compiler.

torch keeps four methods of `Optimizer` from being traced by `torch.compile`. What does so imports `torch._dynamo` on
its first call, compiled or not: about a second of CPU time between the call of fit and the first training step, where
a mistake in that step could have shown. Until somebody imports the compiler (`Optimizer.step` does, or a user's
`torch.compile`), there is nothing to keep out, and the methods are called as they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

COMPILER = "torch._dynamo"
KEPT = "__dynamo_disable"
"""Where torch keeps, on the method, what it calls in its place."""
GUARDED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def defer_compiler() -> None:
    """Let the guarded methods wait for the compiler; nothing happens where torch has no such guards."""
    if COMPILER in sys.modules:
        return
    for name in GUARDED:
        guard: Any = getattr(Optimizer, name, None)
        method = getattr(guard, "__wrapped__", None)
        code = getattr(guard, "__code__", None)
        if method is not None and code is not None and code.co_name == "inner" and KEPT in code.co_consts:
            setattr(method, KEPT, _waiting(guard, method))


def _waiting(guard: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if COMPILER not in sys.modules:
            return method(*args, **kwargs)
        if getattr(method, KEPT, None) is call:
            delattr(method, KEPT)  # torch puts its own there
        return guard(*args, **kwargs)

    return call
