"""Timer: measure how long a run takes, and stop training when its time is over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from trainkit import Callback
from trainkit.duration import parse_duration
from trainkit.errors import MisconfigurationException
from trainkit.stages import RunningStage

if TYPE_CHECKING:
    from trainkit import Module, Trainer

_STAGES = tuple(stage.value for stage in RunningStage)


class Timer(Callback):
    """Measure training, validation and test, and stop training after `duration`.

    The time spent is part of a checkpoint: a resumed run goes on counting where the saved one was.

    Args:
        duration: training time after which the run stops: "DD:HH:MM:SS", a timedelta, or a dict such as
            {"hours": 12}. None measures only.
        interval: "step" looks at the clock after each batch, "epoch" after each epoch.
        verbose: say so when the time is over.

    Raises:
        MisconfigurationException: `interval` is neither.
        TypeError, ValueError: `duration` can't be read, see `parse_duration`.

    Example:
        >>> timer = Timer(duration="00:12:00:00")
        >>> timer.time_remaining()
        43200.0
    """

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, float] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise MisconfigurationException(f'Timer(interval=...) must be "step" or "epoch". Received: {interval!r}.')
        self.interval = interval
        self.verbose = verbose
        self.duration = None if duration is None else parse_duration(duration, "Timer(duration=...)").total_seconds()
        self._began: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._before: dict[str, float] = {}  # seconds spent by the runs this one was resumed from
        self._deadline = math.inf
        self._announced = False

    # ---- what was measured
    def start_time(self, stage: str = "train") -> float | None:
        """Return when "train", "validate" or "test" last began, in seconds of `time.monotonic`; None if it did not."""
        return self._began.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """Return when a stage last ended, in seconds of `time.monotonic`; None while it runs or if it never did."""
        return self._ended.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Return the seconds spent in a stage: in its latest run and in the runs this one was resumed from."""
        began, before = self.start_time(stage), self._before.get(stage, 0.0)
        if began is None:
            return before
        ended = self._ended.get(stage)
        return before + (monotonic() if ended is None else ended) - began

    def time_remaining(self, stage: str = "train") -> float | None:
        """Return the seconds left until `duration`, negative when it is over; None without a duration."""
        return None if self.duration is None else self.duration - self.time_elapsed(stage)

    # ---- measuring
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self._began, self._ended, self._before, self._announced = {}, {}, {}, False

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("train")
        if self.duration is not None:
            deadline = self._began["train"] + self.duration - self._before.get("train", 0.0)
            self._deadline = deadline if self.interval == "step" else math.inf
            if monotonic() >= deadline:  # resumed from a run whose time was over
                self._stop(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if monotonic() >= self._deadline:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        remaining = self.time_remaining()
        if remaining is not None and remaining <= 0:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._ended["train"] = monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._ended["validate"] = monotonic()

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("test")

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._ended["test"] = monotonic()

    def _begin(self, stage: str) -> None:
        self._ended.pop(stage, None)
        self._began[stage] = monotonic()

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = True
        if self.verbose and not self._announced and trainer.is_global_zero:
            self._announced = True
            limit = timedelta(seconds=round(self.duration or 0.0))
            trainer.print(f"Timer: {limit} of training are over, stopping.")

    # ---- resume
    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = {stage: float(seconds) for stage, seconds in state_dict.get("time_elapsed", {}).items()}


def _known(stage: str) -> str:
    if stage not in _STAGES:
        raise ValueError(f"a Timer knows the stages {', '.join(_STAGES)}. Received: {stage!r}.")
    return stage
