"""What there is to tell about a run: what it is, how fast it goes, what an epoch gave, how it ended.

`progress` asks when there is something to show, `console` shows it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from trainkit.callbacks.timer import Timer
from trainkit.metrics import numbers
from trainkit.resume_hint import checkpoints_of, resume_call, short_path, where_it_ended
from trainkit.summary import count

if TYPE_CHECKING:
    from trainkit import Module, Trainer


# ---------------------------------------------------------------------- what a run is
@dataclass(frozen=True)
class Facts:
    """What is trained on what."""

    run_directory: str
    model: str
    parameters: int
    data: Mapping[str, tuple[int | None, str]]  # "train" and "val" to their sizes, such as (1437, "samples")
    device: str
    precision: str
    seed: str | None
    resumed_from: str | None


def facts(trainer: Trainer, module: Module) -> Facts:
    """Gather what is trained on what, from a fit that is about to start."""
    device = str(trainer.device)
    if trainer.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(trainer.device)})"
    data = {"train": _size(trainer.train_dataloader, [trainer.num_training_batches])}
    if any(trainer.num_val_batches):
        data["val"] = _size(trainer.val_dataloaders, trainer.num_val_batches)
    return Facts(
        run_directory=short_path(trainer.log_dir or trainer.default_root_dir),
        model=type(module).__name__,
        parameters=count(module),
        data=data,
        device=device,
        precision=trainer.precision,
        seed=os.environ.get("PL_GLOBAL_SEED"),  # where seed_everything leaves it
        resumed_from=short_path(trainer.resume_path) if trainer.resume_path else None,
    )


def _size(loaders: Any, batches: Iterable[int | float]) -> tuple[int | None, str]:
    samples = _samples(loaders)
    if samples is not None:
        return samples, "samples"
    total = sum(batches)
    return (int(total), "batches") if total < math.inf else (None, "batches")


def _samples(loaders: Any) -> int | None:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        each = [_samples(loader) for loader in loaders]
        return None if not each or None in each else sum(size for size in each if size is not None)
    try:
        return len(loaders.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


# ---------------------------------------------------------------------- how fast it goes
class Pace:
    """Batches a second, and how long the rest will take.

    Told how many batches are done whenever somebody looks. Validations and saves pause it: they do not slow the rate
    down, but they count in the time that is left.
    """

    window = 5.0  # seconds: what was longer ago hardly counts

    def __init__(self, done: int = 0) -> None:
        self._first, self._done, self._since = done, done, monotonic()
        self._paused = False
        self._batches = self._seconds = 0.0  # both fade with the window; their ratio is the rate
        self._pauses, self._pauses_until = 0.0, done

    @property
    def rate(self) -> float | None:
        """Batches a second; None before there was one."""
        return self._batches / self._seconds if self._batches else None

    def look(self, done: int) -> None:
        """Take in how many batches are done now."""
        now = monotonic()
        seconds, batches = now - self._since, done - self._done
        if batches > 0 and not self._paused:
            fade = math.exp(-seconds / self.window)
            self._batches = self._batches * fade + batches
            self._seconds = self._seconds * fade + max(seconds, 1e-9)
            self._since, self._done = now, done

    def pause(self, done: int) -> None:
        """Stop counting time."""
        if not self._paused:
            self.look(done)
            self._paused, self._since, self._done = True, monotonic(), done

    def go_on(self) -> None:
        """Count time again."""
        if self._paused:
            now = monotonic()
            self._pauses += now - self._since
            self._paused, self._since, self._pauses_until = False, now, self._done

    def time_for(self, batches: float) -> float | None:
        """Return the seconds that so many more batches and their pauses will take; None when that is not known."""
        if self.rate is None or batches == math.inf:
            return None
        seen = self._pauses_until - self._first
        pause_per_batch = self._pauses / seen if seen else 0.0
        return batches / self.rate + pause_per_batch * (batches + self._done - self._pauses_until)


def time_left(trainer: Trainer, pace: Pace) -> float | None:
    """Return the seconds until the whole fit is done, or the epoch when a fit has no end; None when not known."""
    in_epoch, progress = trainer.num_training_batches, trainer.progress
    epochs, steps = limit(trainer.max_epochs), limit(trainer.max_steps)
    left = in_epoch - progress.batch
    if epochs is not None:
        left = (epochs - progress.epoch) * in_epoch - progress.batch
    elif steps is not None:
        left = math.inf
    if steps is not None:
        left = min(left, (steps - progress.step) * trainer.accumulate_grad_batches)
    seconds = pace.time_for(max(left, 0))
    for callback in trainer.callbacks:
        remaining = callback.time_remaining() if isinstance(callback, Timer) else None
        if remaining is not None:
            seconds = remaining if seconds is None else min(seconds, remaining)
    return seconds


def limit(given: int | None) -> int | None:
    """Return a limit of the Trainer as None when it has none."""
    return None if given is None or given < 0 else given


@dataclass(frozen=True)
class Frame:
    """What the live line tells at one moment."""

    stage: str  # "fit", "validate", "sanity check", ...
    epoch: str  # "3/20"; empty outside of fit
    done: int
    total: int | None  # None: the loader has no length
    step: int
    rate: float | None  # batches a second
    elapsed: float  # seconds
    remaining: float | None  # seconds
    metrics: Mapping[str, Any]


# ---------------------------------------------------------------------- what an epoch gave
@dataclass(frozen=True)
class Row:
    """One finished epoch: a value for those of the run's metrics that were logged in it."""

    epoch: int  # counted from 1
    epochs: int | None  # how many there will be
    step: int
    values: Mapping[str, float]
    names: Sequence[str]  # the run's metrics so far, as columns from left to right
    ranking: Sequence[str]  # the same, those to keep on a narrow terminal first
    elapsed: float  # seconds
    best: bool


@dataclass
class Best:
    """The best value of the monitored metric so far."""

    name: str
    mode: str  # "min" or "max"
    value: float = math.nan
    epoch: int | None = None  # counted from 1; None while there is none, and when it was before this run
    step: int = 0

    def improved(self, value: float, epoch: int, step: int) -> bool:
        """Take in an epoch's value and return whether it is the best so far."""
        better = value < self.value if self.mode == "min" else value > self.value
        if not math.isfinite(value) or not (better or math.isnan(self.value)):
            return False
        self.value, self.epoch, self.step = value, epoch, step
        return True


class Rows:
    """Makes rows of epochs: which metrics belong to it, in which order, and whether it was the best."""

    def __init__(self, trainer: Trainer) -> None:
        self.best = _monitored(trainer)
        self._names: list[str] = []
        self.evaluated: set[str] = set()  # metrics of the validation: an epoch without one has none
        self._before: dict[str, float] = {}
        self._validated = False

    def before_validation(self, trainer: Trainer) -> None:
        self._before = _values(trainer)

    def after_validation(self, trainer: Trainer) -> None:
        after = _values(trainer)
        self.evaluated |= {name for name in after if name not in self._before or after[name] != self._before[name]}
        self._validated = True

    def training_first(self, metrics: Mapping[str, Any], watched: Container[str]) -> dict[str, Any]:
        """Return metrics for the live line: training's before the validation's, per step rather than per epoch.

        Args:
            metrics: what is on the progress bar.
            watched: the names of the callback metrics, where one logged per step and per epoch has its bare name, too.
        """
        own: dict[str, Any] = {}
        for name in sorted(metrics, key=lambda name: name in self.evaluated):
            bare = name.removesuffix("_step")
            if bare != name and bare in watched:  # logged per step and per epoch
                own[bare] = metrics[name]
            elif not (name.endswith("_epoch") and name.removesuffix("_epoch") + "_step" in metrics):
                own[name] = metrics[name]
        return own

    def row(self, trainer: Trainer, preferred: Iterable[str], elapsed: float) -> Row:
        """Return the row of the epoch that has just ended; `preferred` metrics are the last to be left out."""
        values = {
            name: value for name, value in _values(trainer).items() if self._validated or name not in self.evaluated
        }
        self._validated = False
        self._names += [name for name in values if name not in self._names]
        names = sorted(self._names, key=lambda name: name in self.evaluated)  # stable: training first
        epoch, step, best = trainer.current_epoch + 1, trainer.global_step, self.best
        first = [best.name] if best else []
        return Row(
            epoch=epoch,
            epochs=limit(trainer.max_epochs),
            step=step,
            values=values,
            names=names,
            ranking=[name for name in dict.fromkeys([*first, *preferred, *names]) if name in names],
            elapsed=elapsed,
            best=best is not None and best.name in values and best.improved(values[best.name], epoch, step),
        )


def _values(trainer: Trainer) -> dict[str, float]:
    """Return the newest metrics; of one logged per step and per epoch only the epoch's."""
    values = numbers(dict(trainer.callback_metrics))
    forks = [f"{name}{end}" for name in values for end in ("_step", "_epoch")]
    return {name: value for name, value in values.items() if name not in forks}


def _monitored(trainer: Trainer) -> Best | None:
    for callback in (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks):
        name, mode = getattr(callback, "monitor", None), getattr(callback, "mode", "min")
        if name:
            score = getattr(callback, "best_model_score", None)
            return Best(name, mode, math.nan if score is None else float(score))
    return None


# ---------------------------------------------------------------------- how it ended
WORTH_ADVICE, WORTH_A_SPLIT = 1.0, 10.0
"""Seconds; where the time of a shorter run went is not shown at its end, `trainer.report_timing()` has it."""


@dataclass(frozen=True)
class Ending:
    """How a run ended and how to go on."""

    epochs: str  # "20", or "13 of 20"
    step: int
    elapsed: float  # seconds
    best: Best | None
    checkpoint: str  # the best one, or the newest when nothing is monitored; empty when there is none
    resume: str  # the command or call that goes on from the newest checkpoint; empty when there is none
    sentence: str = ""  # tells the rest after an interruption or an error
    time: str = ""  # where it went; empty for a short run
    advice: str = ""  # the worst of what is wrong with that; empty when all is well


def ending(trainer: Trainer, best: Best | None, elapsed: float, exception: BaseException | None = None) -> Ending:
    """Gather how a fit ended, and how to go on from its newest checkpoint."""
    finished, planned = trainer.progress.epoch, limit(trainer.max_epochs)
    top, newest = checkpoints_of(trainer)
    timing = trainer.report_timing()
    return Ending(
        epochs=f"{finished} of {planned}" if planned and planned != finished else str(finished),
        step=trainer.global_step,
        elapsed=elapsed,
        best=best if best is not None and not math.isnan(best.value) else None,
        checkpoint=short_path(top or newest) if top or newest else "",
        resume=resume_call(trainer, short_path(newest)) if newest else "",
        sentence="" if exception is None else where_it_ended(trainer, exception),
        time=timing.line if timing.total >= WORTH_A_SPLIT else "",
        advice=str(timing.advice[0]) if timing.advice and timing.total >= WORTH_ADVICE else "",
    )
