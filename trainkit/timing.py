"""Where the time of a fit goes, always on: two clock reads a part, added up at log points.

Timing         on the host: `perf_counter` between the parts of a step
DeviceTiming   on cuda: events between them, in one step of eight, read at log points once the device has passed them

The loop takes the times; the hooks' table (`hooks.py`) takes those of each callback and of the module's own hooks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from trainkit.memory import swapped_out

Lap = tuple[Any, ...]
"""When a step's parts were over: the batch before, waiting, transfer, forward + backward, optimizer, the step."""

PARTS = {
    "data_wait": "data wait",
    "transfer": "transfer",
    "forward_backward": "forward + backward",
    "optimizer": "optimizer",
    "callbacks": "callbacks",
    "logging": "logging",
    "checkpoint": "checkpoint",
    "validation": "validation",
    "other": "the loop",
}
"""The parts of a fit, by the name they are logged under, `time/<name>`, and as the table calls them."""
LOGGED = ("data_wait", "transfer", "forward_backward", "optimizer", "callbacks", "logging", "checkpoint")
BETWEEN_ROWS = 1.0
"""Seconds; a log point of a tiny model comes many times a second, and a row costs as much as one of its steps."""
FEW = 40
"""Steps; the first row says something of so many, or of a second."""
BETWEEN_WRITES = 0.1
"""Seconds; the rows that a kill may cost, unless a checkpoint came after them. Resumed, the run logs them again."""
FOLD = 1000
"""So many steps are added up at once where there are no log points."""
BEFORE_BACKWARD = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward")
BEFORE_STEP = ("on_before_optimizer_step",)
BESIDE = ("setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_exception", "on_save_checkpoint")
"""Hooks outside of the time that is split."""


class Spent:
    """The seconds that one owner's method for one hook took, in all."""

    __slots__ = ("hook", "owner", "saves", "seconds")

    def __init__(self, owner: str, hook: str, saves: bool) -> None:
        self.owner, self.hook, self.saves = owner, hook, saves
        self.seconds = 0.0


@dataclass
class Split:
    """The seconds of some steps, by part."""

    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, steps: int, **seconds: float) -> None:
        """Add steps, and seconds by part."""
        self.steps += steps
        for name, value in seconds.items():
            self.seconds[name] += value

    def __sub__(self, other: Split) -> Split:
        return Split(self.steps - other.steps, {name: self.seconds[name] - other.seconds[name] for name in PARTS})


class Timing:
    """The clocks of one fit. The loop begins and ends it; the first step is kept apart: it warms up.

    Nothing in here reads a tensor or waits for a device.
    """

    def __init__(self) -> None:
        self.now: Callable[[], float] = perf_counter
        """What the loop calls between two parts, and nobody else: on cuda each call marks a place in the step."""
        self.laps: list[Lap] = []
        self.lap: Callable[[Lap], None] = self.laps.append
        """What the loop calls at the end of a step."""
        self.spent: dict[tuple[str, str], Spent] = {}
        self.logging = 0.0
        self.validation = 0.0
        self.first: float | None = None
        """Seconds of the first step."""
        self.began: float | None = None
        self.ended: float | None = None
        self.swapped = 0
        """Bytes of this process that were swapped out when the fit began."""
        self._sums = Split()
        self._logged = Split()  # as it was at the last log point
        self._write_at = 0.0
        self._due = 0.0  # when the next row may be logged
        self._hooks_before: dict[str, float] = {}

    # ---- who takes times
    def spent_by(self, owner: object, hook: str) -> Spent:
        """Return where the time of an owner's method for a hook is added up; callbacks of a class share a place."""
        key = type(owner).__name__, hook
        return self.spent.setdefault(key, Spent(*key, saves=bool(getattr(owner, "saves", False))))

    def begin(self) -> None:
        """Begin, with the first epoch."""
        self.began, self.swapped = perf_counter(), swapped_out()
        self._due = self.began + BETWEEN_ROWS
        self._hooks_before = self._by_part()

    def end(self) -> None:
        """End, with the last one; an end that came before stays."""
        self.fold()
        if self.ended is None:
            self.ended = perf_counter()

    # ---- adding up
    def fold(self) -> None:
        """Add up the laps since the last time."""
        laps = self.laps
        if not laps:
            return
        if self.first is None:
            self._leave_first_out(laps[0])
        self._add(laps)
        laps.clear()

    def _leave_first_out(self, lap: Lap) -> None:
        left, *_, ended = lap
        self.first = ended - left
        del self.laps[0]

    def _add(self, laps: list[Lap]) -> None:
        waited = moving = computing = updating = 0.0
        for left, arrived, ready, computed, updated, _ in laps:
            waited += arrived - left
            moving += ready - arrived
            computing += computed - ready
            updating += updated - computed
        self._sums.add(len(laps), data_wait=waited, transfer=moving, forward_backward=computing, optimizer=updating)

    def _by_part(self) -> dict[str, float]:
        """Return the time of all hooks: those inside of forward + backward, of the optimizer, who save, the others."""
        found = dict.fromkeys(("forward_backward", "optimizer", "checkpoint", "callbacks"), 0.0)
        for spent in self.spent.values():
            if spent.hook in BESIDE or spent.hook.startswith(("on_validation", "on_sanity_check")):
                continue
            if spent.hook in BEFORE_BACKWARD:
                found["forward_backward"] += spent.seconds
            elif spent.hook in BEFORE_STEP:
                found["optimizer"] += spent.seconds
            found["checkpoint" if spent.saves else "callbacks"] += spent.seconds
        return found

    def split(self) -> Split:
        """Return the seconds of all parts since the fit began, without the first step."""
        self.fold()
        split = Split(self._sums.steps, dict(self._sums.seconds))
        hooks = {name: value - self._hooks_before.get(name, 0.0) for name, value in self._by_part().items()}
        for name in ("forward_backward", "optimizer"):
            split.seconds[name] = max(split.seconds[name] - hooks[name], 0.0)
        split.seconds["callbacks"], split.seconds["checkpoint"] = hooks["callbacks"], hooks["checkpoint"]
        split.seconds["logging"], split.seconds["validation"] = self.logging, self.validation
        if self.began is not None:
            known = sum(value for name, value in split.seconds.items() if name != "other")
            end = perf_counter() if self.ended is None else self.ended
            split.seconds["other"] = max(end - self.began - (self.first or 0.0) - known, 0.0)
        return split

    def row(self) -> dict[str, float]:
        """Return the seconds per step since the last row: one a second at most, and none of a handful of steps."""
        now = perf_counter()
        if now < self._due and (self._logged.steps or self._sums.steps < FEW):
            return {}
        split = self.split()
        since = split - self._logged
        if not since.steps:
            return {}
        self._due, self._logged = now + BETWEEN_ROWS, split
        return {f"time/{name}": since.seconds[name] / since.steps for name in LOGGED}

    def writing_due(self, now: float) -> bool:
        """Whether rows that wait are handed to the system now: not more often than ten times a second."""
        if now < self._write_at:
            return False
        self._write_at = now + BETWEEN_WRITES
        return True

    # ---- who took the time
    def owners(self) -> dict[str, dict[str, float]]:
        """Return the seconds of each callback, and of the module's own hooks, by hook."""
        found: dict[str, dict[str, float]] = {}
        for spent in self.spent.values():
            if spent.seconds and spent.hook not in BESIDE:
                found.setdefault(spent.owner, {})[spent.hook] = spent.seconds
        return found

    @property
    def idle(self) -> float | None:
        """The share of steps at whose end the device had nothing left to do; None on the host."""
        return None


class DeviceTiming(Timing):
    """Ask a cuda device, for whose work the host does not wait: its own clock says when a part was over.

    What the host did meanwhile takes no time of a step; a part during which the device had nothing to do does.

    Args:
        device: which.
    """

    EVERY = 8
    """One step in so many is marked: an event costs the host a microsecond or two."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.now, self.lap = self._now, self._lap
        self._stream = torch.cuda.current_stream(device)
        self._marks: list[Any] | None = None  # the events of the step that is running; None in a step without
        self._passing: deque[list[Any]] = deque()  # those that the device has yet to pass
        self._free: list[Any] = []
        self._until = self.EVERY
        self._unasked = 0  # steps that no event has spoken for yet
        self._caught_up = self._sampled = 0

    def _now(self) -> float:
        if self._marks is not None:
            event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._marks.append(event)
        return perf_counter()

    def _lap(self, lap: Lap) -> None:
        self.laps.append(lap)
        marks, self._marks = self._marks, None
        if marks is not None and len(marks) >= len(lap):
            self._sampled += 1
            self._caught_up += bool(marks[-3].query())  # backward is over although the host has hardly gone on
            self._passing.append(marks)
        self._until -= 1
        if self._until == 0:
            self._until, self._marks = self.EVERY, []

    def _add(self, laps: list[Lap]) -> None:
        self._sums.steps += len(laps)
        self._unasked += len(laps)
        passed: list[list[Any]] = []
        while self._passing and self._passing[0][-1].query():
            passed.append(self._passing.popleft())
        if not passed:
            return
        each = self._unasked / len(passed) / 1000
        for marks in passed:
            left, arrived, ready, computed, updated, _ = marks[-6:]  # what a skipped batch left comes before
            for name, begin, end in (
                ("data_wait", left, arrived), ("transfer", arrived, ready), ("forward_backward", ready, computed),
                ("optimizer", computed, updated),
            ):  # fmt: skip
                self._sums.seconds[name] += begin.elapsed_time(end) * each
            self._free += marks
        self._unasked = 0

    @property
    def idle(self) -> float | None:
        return self._caught_up / self._sampled if self._sampled else None


def timing_of(device: torch.device) -> Timing:
    """Return the clocks of a fit on a device."""
    return DeviceTiming(device) if device.type == "cuda" else Timing()
