"""Profilers: where a run's time goes. Off, nothing of this is on a step's path."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainkit.profiler.base import PassThroughProfiler as PassThroughProfiler
from trainkit.profiler.base import Profiler as Profiler

if TYPE_CHECKING:
    from trainkit.profiler.advanced import AdvancedProfiler as AdvancedProfiler
    from trainkit.profiler.pytorch import PyTorchProfiler as PyTorchProfiler
    from trainkit.profiler.simple import SimpleProfiler as SimpleProfiler

__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler"]

_HOME = {"AdvancedProfiler": "advanced", "PyTorchProfiler": "pytorch", "SimpleProfiler": "simple"}
PROFILERS = {"simple": "SimpleProfiler", "advanced": "AdvancedProfiler", "pytorch": "PyTorchProfiler"}
"""What `Trainer(profiler=...)` takes by name."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
