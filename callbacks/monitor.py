"""What callbacks that watch a metric share: which of two values is better, whether there is a new one, and why not."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trainkit.errors import MisconfigurationException, nearest, warn
from trainkit.hooks import is_overridden

if TYPE_CHECKING:
    from trainkit import Trainer
    from trainkit.metrics import Metric, Table

Event = Literal["batch", "validation", "epoch"]

COUNTERS = ("epoch", "step")


@dataclass
class Watch:
    """One metric of a run, and whether the value there is news.

    A metric of the validation is new once after each validation that logged it, one of training with on_step=True at
    any time, one with on_epoch=True at the end of the epoch, and what a callback put into `trainer.callback_metrics`
    past `log` at any time. Anything else there is left from earlier, and says nothing about the weights of now.

    Several processes have to ask together: they are told what the first one sees, so that they decide alike.

    Args:
        owner: the callback's name, for messages.
        monitor: the metric's name.
        mode: "min" when smaller is better, "max" when larger is.
        counters: "epoch" and "step" can be watched as well: the run's own count, where nothing of this name is logged.

    Raises:
        MisconfigurationException: the mode is neither, or the name is not one.
    """

    owner: str
    monitor: str
    mode: str
    counters: bool = False

    validated: bool = field(init=False)
    fresh: bool = field(init=False)
    """Whether a validation has logged it since it was read; a part of the owner's state."""
    _last_validation: Table | None = field(init=False)
    _told: tuple[bool, bool, Tensor | None] | None = field(init=False, default=None)
    """What the first of several processes saw: whether there is a new value, or may be later, and the value."""

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise MisconfigurationException(
                f"{self.owner}(monitor=...) must be a metric's name. Received: {self.monitor!r}."
            )
        check_mode(self.owner, self.mode)
        self.begin()

    def begin(self) -> None:
        """Begin a run: nothing has been validated yet."""
        self.validated = self.fresh = False
        self._last_validation = self._told = None

    def doubt(self, trainer: Trainer) -> None:
        """Warn before the first step if the name looks misspelt: the sanity check logged one that is very close."""
        if self._counts(trainer):
            return
        known = trainer.callback_metrics
        close = difflib.get_close_matches(self.monitor, known, n=1, cutoff=0.8)
        if close and self.monitor not in known:
            warn(
                f"{self.owner}(monitor={self.monitor!r}): the sanity check logged {close[0]!r}, and nothing of this "
                "name. If training does not log it either, the run stops at the end of its first epoch."
            )

    def after_validation(self, trainer: Trainer) -> None:
        """Take note of what a validation logged; to be called in `on_validation_end`."""
        self.validated = True
        self._last_validation = trainer.metrics.table
        self.fresh = self.fresh or self.monitor in names(self._last_validation, "epoch")

    def is_new(self, trainer: Trainer, event: Event) -> bool:
        """Whether the metric has a value that was not there before."""
        if trainer.world_size == 1:
            return self._sees_new(trainer, event)
        trainer.metrics.catch_up()
        new = self._sees_new(trainer, event)
        seen = (new, self._sees_one(trainer), self._value(trainer) if new else None)
        self._told = trainer.strategy.broadcast(seen)
        return self._told[0]

    def _sees_new(self, trainer: Trainer, event: Event) -> bool:
        training = trainer.metrics.train
        return (
            (self.fresh and event != "batch")
            or self.monitor in names(training, "step")
            or (event == "epoch" and self.monitor in names(training, "epoch"))
            or self.monitor in trainer.metrics.published
            or self._counts(trainer)
        )

    def read(self, trainer: Trainer) -> Tensor:
        """Return the value, on the host; from here it is not new any more."""
        self.fresh = False
        told = None if self._told is None else self._told[2]
        return self._value(trainer) if told is None else told

    def _value(self, trainer: Trainer) -> Tensor:
        if self._counts(trainer):
            return torch.tensor(trainer.current_epoch if self.monitor == "epoch" else trainer.global_step)
        return trainer.callback_metrics[self.monitor].detach().cpu()

    def may_come(self, trainer: Trainer) -> bool:
        """Whether the metric can still appear by itself: there is a value, or validation has not run yet."""
        return self._sees_one(trainer) if self._told is None else self._told[1]

    def _sees_one(self, trainer: Trainer) -> bool:
        waiting = trainer.enable_validation and not self.validated
        return waiting or self.monitor in trainer.callback_metrics

    def _counts(self, trainer: Trainer) -> bool:
        return self.counters and self.monitor in COUNTERS and self.monitor not in trainer.callback_metrics

    def missing(self, trainer: Trainer, event: Event) -> str:
        """Say why there is no value, and what there is."""
        known = sorted(trainer.callback_metrics)
        guess = nearest(self.monitor, known)
        guess = f"D{guess[1:]}" if guess.startswith("did you mean") else ""
        when = {"batch": "after this batch", "validation": "after validation", "epoch": "at the end of the epoch"}
        sentences = (
            f"{self.owner}(monitor={self.monitor!r}): there is no such metric {when[event]}.",
            guess,
            f"There is: {', '.join(known)}." if known else "No metric was logged at all.",
            self._reason(trainer, event),
        )
        return " ".join(filter(None, sentences))

    def _reason(self, trainer: Trainer, event: Event) -> str:
        tables = [table for table in (self._last_validation, trainer.metrics.train) if table is not None]
        for metric in (metric for table in tables for metric in table.metrics.values()):
            in_training = metric in trainer.metrics.train.metrics.values()
            if self.monitor not in (metric.name, f"{metric.name}_step", f"{metric.name}_epoch"):
                continue
            where = f"{metric.hook} logs {metric.name!r}"
            if metric.suffix and not self.monitor.endswith(metric.suffix):
                return (
                    f"{where} for several loaders, so it is called {metric.name + metric.suffix!r}: monitor one of "
                    "these, or log it with add_dataloader_idx=False."
                )
            if not in_training and not metric.on_epoch:
                return (
                    f"{where} with on_epoch=False, and of a validation only the mean over its batches can be watched: "
                    "leave on_epoch out."
                )
            if self.monitor != metric.name and self.monitor not in _forked(metric):
                return f"{where}, but not with on_step=True and on_epoch=True: monitor {metric.name!r}."
            if not in_training:
                return f"{where}, and of a validation there is only the mean over its batches: monitor {metric.name!r}."
            if metric.on_epoch and event != "epoch":
                return (
                    f"{where} for the epoch, so its value is there at the end of the training epoch, and not when "
                    f"{self.owner} looks: log it with on_step=True, or look at the epoch's end."
                )
            return f"{where}, but it did not in this epoch: log it every time."
        if not trainer.enable_validation and is_overridden(trainer.module, "validation_step"):
            return "This run does not validate: give it validation loaders, or monitor a metric of training."
        return (
            "Nothing logs it: call self.log with this name; if that is done under a condition, from the first "
            "validation or epoch on."
        )

    def better(self, value: float, than: float) -> bool:
        """Whether a value is better than another one. NaN is never better, and worse than anything finite."""
        if math.isnan(value) or math.isnan(than):
            return math.isnan(than) and not math.isnan(value)
        return value < than if self.mode == "min" else value > than


def check_mode(owner: str, mode: str) -> None:
    """Refuse a mode that is neither "min" nor "max"."""
    if mode not in ("min", "max"):
        raise MisconfigurationException(
            f'{owner}(mode=...) must be "min" (smaller is better) or "max" (larger is better). Received: {mode!r}.'
        )


def names(table: Table, kind: Literal["step", "epoch"]) -> set[str]:
    """Return what the values of a table are called that a step, or the end of an epoch, gives."""
    found: set[str] = set()
    for metric in table.metrics.values():
        if metric.logged and (metric.on_step if kind == "step" else metric.on_epoch):
            found.add(metric.name + metric.suffix)
            if metric.on_step and metric.on_epoch:
                found.add(f"{metric.name}_{kind}{metric.suffix}")
    return found


def looks_at_epoch_end(trainer: Trainer, wanted: bool | None) -> bool:
    """Whether to look at the end of the training epoch, rather than after each validation.

    Where nothing is wanted in particular: when there is one validation in each epoch, at its end, or none at all.
    """
    if wanted is not None:
        return wanted
    interval = trainer.val_check_interval
    once_an_epoch = isinstance(interval, float) and interval == 1.0 and trainer.check_val_every_n_epoch == 1
    return once_an_epoch or not trainer.enable_validation


def epoch_is_whole(trainer: Trainer) -> bool:
    """Whether the epoch that ends now had all its batches; a step limit or a stop can end it early."""
    return not trainer.stopping or trainer.progress.batch >= trainer.num_training_batches


def _forked(metric: Metric) -> set[str]:
    return {f"{metric.name}_step", f"{metric.name}_epoch"} if metric.on_step and metric.on_epoch else set()
