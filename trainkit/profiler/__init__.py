"""Profilers: where a run's time goes. Off, nothing of this is on a step's path."""

from __future__ import annotations

from collections.abc import Callable

from trainkit.profiler.advanced import AdvancedProfiler as AdvancedProfiler
from trainkit.profiler.base import PassThroughProfiler as PassThroughProfiler
from trainkit.profiler.base import Profiler as Profiler
from trainkit.profiler.pytorch import PyTorchProfiler as PyTorchProfiler
from trainkit.profiler.simple import SimpleProfiler as SimpleProfiler

__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler"]

PROFILERS: dict[str, Callable[[], Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
"""What `Trainer(profiler=...)` takes by name."""
