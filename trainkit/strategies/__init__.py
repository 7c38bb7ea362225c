"""Strategies: how a run is spread over devices."""

from __future__ import annotations

from trainkit.strategies.base import SingleDeviceStrategy as SingleDeviceStrategy
from trainkit.strategies.base import Strategy as Strategy
from trainkit.strategies.ddp import DDPStrategy as DDPStrategy
from trainkit.strategies.fsdp import FSDPStrategy as FSDPStrategy
from trainkit.strategies.model_parallel import ModelParallelStrategy as ModelParallelStrategy
from trainkit.strategies.parallel import ParallelStrategy as ParallelStrategy

__all__ = [
    "DDPStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "Strategy",
]
