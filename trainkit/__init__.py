"""trainkit: subclass Module, hand it to a Trainer, and the training loop is done.

The names below load when they are first used, so that `trainkit --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit import callbacks as callbacks
    from trainkit import loggers as loggers
    from trainkit import profiler as profiler
    from trainkit.callback import Callback as Callback
    from trainkit.datamodule import DataModule as DataModule
    from trainkit.module import Module as Module
    from trainkit.random import seed_everything as seed_everything
    from trainkit.trainer import Trainer as Trainer

__version__ = "0.1.0"
__all__ = ["Callback", "DataModule", "Module", "Trainer", "seed_everything"]

_HOME = {
    "Callback": "trainkit.callback",
    "DataModule": "trainkit.datamodule",
    "Module": "trainkit.module",
    "Trainer": "trainkit.trainer",
    "seed_everything": "trainkit.random",
}
_PACKAGES = ("callbacks", "loggers", "profiler")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"trainkit.{name}")
    else:
        raise AttributeError(f"module 'trainkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
