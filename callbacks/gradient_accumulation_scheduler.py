"""GradientAccumulationScheduler: accumulate more or fewer batches as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainkit import Callback
from trainkit.errors import MisconfigurationException, warn
from trainkit.hooks import is_overridden

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class GradientAccumulationScheduler(Callback):
    """Set `trainer.accumulate_grad_batches` by the epoch.

    Args:
        scheduling: from which epoch on, counted from 0, how many batches make one update. Before the first epoch
            named, it is every batch.

    Raises:
        TypeError: `scheduling` is empty or not a dict.
        MisconfigurationException: an epoch is not a whole number from 0, or a factor not one from 1.
        RuntimeError: when training starts, the module optimizes by itself.
        ValueError: when training starts, the Trainer has an `accumulate_grad_batches` of its own.

    Example:
        >>> GradientAccumulationScheduler({0: 8, 4: 4}).get_accumulate_grad_batches(5)
        4
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        if not isinstance(scheduling, Mapping) or not scheduling:
            raise TypeError(
                "GradientAccumulationScheduler(scheduling=...) must be a dict of epochs and factors, such as "
                f"{{0: 8, 4: 4}}. Received: {scheduling!r}."
            )
        for epoch, factor in scheduling.items():
            if not isinstance(epoch, int) or epoch < 0:
                raise MisconfigurationException(
                    f"GradientAccumulationScheduler: an epoch must be an int from 0. Received: {epoch!r}."
                )
            if not isinstance(factor, int) or factor < 1:
                raise MisconfigurationException(
                    f"GradientAccumulationScheduler: a factor must be an int from 1. Received: {factor!r} for epoch "
                    f"{epoch}."
                )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._factor = 1

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch has a factor above 1."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Return an epoch's factor."""
        return self.scheduling[max(first for first in self.epochs if first <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "GradientAccumulationScheduler does nothing with automatic_optimization=False: accumulate in "
                "training_step, and take the callback out."
            )
        if trainer.accumulate_grad_batches not in (1, self._factor):  # the latter is left from an earlier fit
            raise ValueError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and GradientAccumulationScheduler "
                f"both say how many batches make an update. Leave one of the two out."
            )
        for name in ("optimizer_step", "optimizer_zero_grad"):
            if self.going_to_accumulate_grad_batches() and is_overridden(pl_module, name):
                warn(f"{type(pl_module).__name__}.{name} is called once for each update, not with every batch.")
        self._apply(trainer)  # a run that is resumed inside an epoch hears of no epoch's start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._apply(trainer)

    def _apply(self, trainer: Trainer) -> None:
        self._factor = self.get_accumulate_grad_batches(trainer.current_epoch)
        trainer.accumulate_grad_batches = self._factor
