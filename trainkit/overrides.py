"""Tell whether somebody has a method of their own, with Lightning's order of arguments."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from trainkit.callback import Callback
from trainkit.datamodule import DataModule
from trainkit.module import Module


def is_overridden(method_name: str, instance: object | None = None, parent: type | None = None) -> bool:
    """Whether an object's method is another than that of its base class.

    Args:
        method_name: the method.
        instance: whose method; None has none of its own.
        parent: the base class (default: that of trainkit's Module, DataModule and Callback which it is).

    Raises:
        ValueError: there is no parent, or the parent has no such method.
    """
    if instance is None:
        return False
    if parent is None:
        parent = next((base for base in (Module, DataModule, Callback) if isinstance(instance, base)), None)
    if parent is None:
        raise ValueError(f"give the base class as parent: {type(instance).__name__} is not derived from trainkit's.")
    own, base = getattr(instance, method_name, None), getattr(parent, method_name, None)
    if own is None:
        return False
    if base is None:
        raise ValueError(f"{parent.__name__} has no {method_name!r} that could be overridden.")
    return _function(own) is not _function(base)


def _function(method: Any) -> Any:
    """Return what a method is made of, past decorators that keep what they wrap."""
    while isinstance(method, partial):
        method = method.func
    method = inspect.unwrap(method)
    return getattr(method, "__func__", method)
