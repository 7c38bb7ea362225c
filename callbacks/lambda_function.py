"""LambdaCallback: a callback from a function for each hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainkit import Callback
from trainkit.errors import nearest

HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown"))


class LambdaCallback(Callback):
    """Call a function at a hook, without a class around it.

    Args:
        hooks: a function for each hook, under the hook's name, called with what the hook of a Callback is called
            with: the trainer, the module, and what the hook adds. None leaves a hook alone.

    Raises:
        TypeError: a name is no hook, or what is given cannot be called.

    Example:
        >>> greet = LambdaCallback(on_train_start=lambda trainer, pl_module: print("here we go"))
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if name not in HOOKS:
                raise TypeError(f"LambdaCallback knows no hook {name!r}; {nearest(name, HOOKS)}")
            if function is None:
                continue
            if not callable(function):
                raise TypeError(f"LambdaCallback({name}=...) must be a function. Received: {function!r}.")
            setattr(self, name, function)
