"""A validation that a signal cuts short leaves no trace: the checkpoint says that it is due, as if it had not begun."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from trainkit.callback import Callback
from trainkit.hooks import is_overridden, overrides
from trainkit.random import random_state, set_random_state

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

BEFORE_ITS_END = tuple(f"on_validation_{event}" for event in ("start", "epoch_start", "batch_start", "batch_end"))


class CutShort(Exception):
    """Leave a validation in its middle, and take back what it did so far."""

    def __init__(self, undo: Undo) -> None:
        super().__init__()
        self.undo = undo


class Undo:
    """What a validation may change and a checkpoint holds, as it was before.

    Args:
        trainer: whose validation is about to begin.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.random = random_state()
        self.seen = trainer.metrics.noted()
        module = trainer.module
        self.weights = [
            (tensor, tensor._version, tensor.data_ptr()) for tensor in chain(module.parameters(), module.buffers())
        ]

    def possible(self) -> bool:
        """Whether nothing else was changed so far: weights, what callbacks keep, what loggers have written."""
        trainer = self.trainer
        listeners = [c for c in trainer.callbacks if any(overrides(c, name, Callback) for name in BEFORE_ITS_END)]
        kept = any(overrides(c, name, Callback) for c in listeners for name in ("state_dict", "on_save_checkpoint"))
        if kept or trainer.metrics.table.logs_steps or is_overridden(trainer.module, "on_save_checkpoint"):
            return False
        return all(t._version == version and t.data_ptr() == place for t, version, place in self.weights)

    def take_back(self) -> None:
        """Put everything back."""
        set_random_state(self.random)
        self.trainer.metrics.go_back(self.seen)
