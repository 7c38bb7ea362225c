"""Strategies: how a run is spread over devices."""

from __future__ import annotations

from trainkit.strategies.base import SingleDeviceStrategy as SingleDeviceStrategy
from trainkit.strategies.base import Strategy as Strategy

__all__ = ["SingleDeviceStrategy", "Strategy"]
