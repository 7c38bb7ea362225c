"""Logged names in a run of several processes: the value that all of them came to shows in place of a process's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.metrics.gathered import computed_alone
from trainkit.metrics.metric import Kind, Metric
from trainkit.metrics.objects import ObjectMetric
from trainkit.metrics.options import Options
from trainkit.metrics.reduction import Share, result


class SharedMetric(Metric):
    """A name whose epoch's reduction is that of all processes, and with sync_dist=True its last value, too.

    Until the processes have agreed on it, it is this one's own.
    """

    __slots__ = ("dtype", "epoch_of_all", "last_weight", "step_of_all", "synced")
    SAVED = (*Metric.SAVED, "synced")
    RUNNING = (*Metric.RUNNING, "last_weight", "step_of_all", "epoch_of_all")

    def __init__(self, name: str, hook: str, suffix: str, loader: int | None) -> None:
        self.dtype: torch.dtype | None = None  # what the others log it as, where this process logs nothing
        self.synced = False
        super().__init__(name, hook, suffix, loader)

    def configure(self, options: Options) -> None:
        """Take the options of the name's first call."""
        super().configure(options)
        self.synced = options.sync_dist and self.on_step
        self.weighted = self.weighted or (self.synced and self.reduce == "mean")

    def reset(self) -> None:
        """Forget the values, keep the options."""
        super().reset()
        self.last_weight: Any = 1
        self.step_of_all: Any = None
        self.epoch_of_all: Any = None

    def update(self, value: Any, weight: Any) -> None:
        """Take one value in; a tensor's is read later."""
        super().update(value, weight)
        self.last_weight = weight
        self.epoch_of_all = None

    def value(self, kind: Kind) -> Any:
        """Return what all processes came to, else this one's own value."""
        found = self.step_of_all if kind == "step" else self.epoch_of_all
        return super().value(kind) if found is None else found

    # ---- what the processes tell each other
    def epoch_share(self) -> Share:
        """Return this process's part of the epoch's reduction."""
        return Share(self.reduce, self.total, self.weight)

    def step_share(self) -> Share:
        """Return this process's part of the last value: a mean is weighted by the sizes of the batches."""
        if self.last is None:
            return Share(self.reduce, None, 0)
        wide = self.last.double() if isinstance(self.last, Tensor) and self.last.device.type != "mps" else self.last
        total = wide * self.last_weight if self.reduce == "mean" else wide
        return Share(self.reduce, total, self.last_weight)

    def take_epoch(self, total: float, weight: float) -> None:
        """Take what the epoch came to on all processes."""
        self.epoch_of_all = self._like_own(result(self.reduce, total, weight, self.kind_of_value()))

    def take_step(self, total: float, weight: float) -> None:
        """Take what the last values came to on all processes."""
        self.step_of_all = self._like_own(result(self.reduce, total, weight, self.kind_of_value()))

    def kind_of_value(self) -> torch.dtype | None:
        """Return the dtype of what is logged, None for numbers."""
        return super().kind_of_value() or self.dtype

    def _like_own(self, value: float) -> Any:
        dtype = self.kind_of_value()
        own = next((one for one in (self.last, self.total) if isinstance(one, Tensor)), None)
        return value if dtype is None else torch.tensor(value, dtype=dtype, device=None if own is None else own.device)


class SharedObject(ObjectMetric):
    """A metric object that computes what all processes have updated it with, at points that all of them reach."""

    __slots__ = ()

    def epoch_value(self) -> Any:
        """Return what was computed last; nothing is computed here, as the others would have to as well."""
        return self._computed

    def take_epoch(self, value: Any) -> None:
        """Take what the object computed on all processes."""
        self._computed = None if value is None else self._checked(value, "compute()")


class OwnObject(ObjectMetric):
    """A metric object that only one process logs: it computes what that one has updated it with."""

    __slots__ = ()

    def epoch_value(self) -> Any:
        """Return what the object computes, once for each time that it was logged."""
        if self._computed is None:
            self._computed = self._checked(computed_alone(self.metric), "compute()")
        return self._computed
