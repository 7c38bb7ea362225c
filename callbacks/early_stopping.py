"""EarlyStopping: end training when a metric has stopped getting better."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from trainkit import Callback
from trainkit.callbacks.monitor import Event, Watch, epoch_is_whole, looks_at_epoch_end
from trainkit.errors import MisconfigurationException, MissingMetricError

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class EarlyStoppingReason(Enum):
    """Why training was ended."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """End training when a metric has not got better for a while.

    The metric is looked at after each validation that logged it, or at the end of each epoch. What was counted is part
    of a checkpoint; `patience` is not: a resumed run has the one it is given. A run resumed after it was stopped stops
    again at once, unless it has more patience now.

    Args:
        monitor: the metric's name.
        min_delta: by how much more than this it has to get better to count; below 0, how much worse still counts.
        patience: how many looks in a row without getting better end training.
        verbose: print each improvement and the end.
        mode: "min" when smaller is better, "max" when larger is.
        strict: a metric that is not there is an error; False warns once (RuntimeWarning) and goes on.
        check_finite: end training when the metric is NaN or infinite.
        stopping_threshold: end training as soon as the metric is better than this.
        divergence_threshold: end training as soon as the metric is worse than this.
        check_on_train_epoch_end: look at the end of the training epoch instead of after validation. None: at the end
            of the epoch when there is one validation in each epoch, at its end, or none at all.
        log_rank_zero_only: kept for Lightning's signature; only the first process prints.

    Attributes:
        wait_count: looks in a row without getting better.
        stopped_epoch: the epoch in which training was ended, 0 before.
        best_score: the best value so far.
        stopping_reason: an `EarlyStoppingReason`.
        stopping_reason_message: the same in words, None before.

    Raises:
        MisconfigurationException: an argument that can't work.
        MissingMetricError: during training, a metric that is not there (a RuntimeError, too).

    Example:
        >>> stopping = EarlyStopping("val_loss", patience=5)
        >>> stopping.wait_count
        0
    """

    monitors = True
    mode_dict: ClassVar[dict[str, Callable[..., Any]]] = {"min": torch.lt, "max": torch.gt}

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: Literal["min", "max"] = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        self._watch = Watch("EarlyStopping", monitor, mode)
        self.monitor, self.mode = monitor, mode
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            raise MisconfigurationException(
                f"EarlyStopping(patience=...) must be a whole number, 0 or more. Received: {patience!r}."
            )
        if not isinstance(min_delta, int | float) or not math.isfinite(min_delta):
            raise MisconfigurationException(
                f"EarlyStopping(min_delta=...) must be a finite number. Received: {min_delta!r}."
            )
        self.patience = patience
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.verbose = verbose
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self.log_rank_zero_only = log_rank_zero_only

        self._event: Event | None = None  # None outside of training
        self._forget()

    def _forget(self) -> None:
        self.wait_count = 0
        self.stopped_epoch = 0
        self.best_score: Tensor = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._warned = False

    @property
    def monitor_op(self) -> Callable[..., Any]:
        """Says of two tensors whether the first one is better."""
        return self.mode_dict[self.mode]

    # ---- state
    @property
    def state_key(self) -> str:
        """Name the state by what is watched, so that one run can have several."""
        return f"{type(self).__qualname__}{ {'monitor': self.monitor, 'mode': self.mode} }"

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
            "fresh": self._watch.fresh,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what was counted."""
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"])
        reason = state_dict.get("stopping_reason", 0)
        self.stopping_reason = EarlyStoppingReason[reason] if isinstance(reason, str) else EarlyStoppingReason(reason)
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
        self._watch.fresh = state_dict.get("fresh", False)

    # ---- hooks
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Forget what another run counted, when a new one begins."""
        self._watch.begin()
        if stage == "fit" and trainer.global_step == 0 and trainer.resume_path is None:
            self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Work out when to look, and stop again if this run had been stopped."""
        at_epoch_end = looks_at_epoch_end(trainer, self.check_on_train_epoch_end)
        self._event = None if trainer.fast_dev_run else "epoch" if at_epoch_end else "validation"
        if self.stopping_reason is EarlyStoppingReason.NOT_STOPPED or self._event is None:
            return
        if self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED and self.wait_count < self.patience:
            self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
            return
        trainer.should_stop = True
        warnings.warn(
            f"EarlyStopping had ended this run already: {self.stopping_reason_message} To go on, give it more patience "
            "or leave it out.",
            stacklevel=2,
        )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._watch.doubt(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Look at the metric, unless that is done at the end of the epoch."""
        if self._event is None or trainer.sanity_checking:
            return
        self._watch.after_validation(trainer)
        if self._event == "validation":
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Look at the metric, unless that is done after validation."""
        if self._event == "epoch" and epoch_is_whole(trainer):
            self._look(trainer)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """End looking."""
        self._event = None

    # ---- the decision
    def _look(self, trainer: Trainer) -> None:
        assert self._event is not None
        if not self._watch.is_new(trainer, self._event):
            if not self._watch.may_come(trainer):
                self._complain(self._watch.missing(trainer, self._event))
            return
        score = self._watch.read(trainer)
        reason, message = self._judge(score)
        if reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason, self.stopping_reason_message = reason, message
        if self.verbose and message and trainer.is_global_zero:
            trainer.print(f"EarlyStopping: {message}")

    def _complain(self, problem: str) -> None:
        if self.strict:
            raise MissingMetricError(problem)
        if not self._warned:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
            self._warned = True

    def _judge(self, score: Tensor) -> tuple[EarlyStoppingReason, str]:
        """Take a new value in; return whether it ends training, and what there is to say."""
        value, best, better = float(score), float(self.best_score), self._watch.better
        name = f"{self.monitor} = {value:.6g}"
        if self.check_finite and not math.isfinite(value):
            return EarlyStoppingReason.NON_FINITE_METRIC, f"{name} is not finite. The best was {best:.6g}."
        if self.stopping_threshold is not None and better(value, self.stopping_threshold):
            return EarlyStoppingReason.STOPPING_THRESHOLD, f"{name} is better than {self.stopping_threshold:g}."
        if self.divergence_threshold is not None and better(-value, -self.divergence_threshold):
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, f"{name} is worse than {self.divergence_threshold:g}."
        if better(value - self.min_delta, best):
            self.best_score, self.wait_count = score, 0
            before = f", before {best:.6g}" if math.isfinite(best) else ""
            return EarlyStoppingReason.NOT_STOPPED, f"{name} is the best so far{before}."
        self.wait_count += 1
        if self.wait_count >= self.patience:
            return (
                EarlyStoppingReason.PATIENCE_EXHAUSTED,
                f"{self.monitor} has not got better {self.wait_count} times in a row. The best was {best:.6g}.",
            )
        return EarlyStoppingReason.NOT_STOPPED, ""
