"""SimpleProfiler: how long each action took."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence

from trainkit.profiler.base import Profiler


class SimpleProfiler(Profiler):
    """Report how often each action ran, and for how long. Actions nest, so the times do not add up to the total.

    A device works on while the host goes ahead: on one, an action's time is what it took to hand the work over.

    Args:
        dirpath: the directory of the report; None takes the run's `trainer.log_dir`.
        filename: the report's file is `<stage>-<filename>.txt`; None logs the report.
        extended: report calls and the share of the total time, too.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        extended: bool = True,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        """When the actions that are under way began, in seconds of `time.perf_counter`."""
        self.recorded_durations: dict[str, list[float]] = defaultdict(list)
        """How long each action took, in seconds, each time."""
        self.start_time = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Begin to measure an action.

        Raises:
            ValueError: it is under way already.
        """
        if action_name in self.current_actions:
            raise ValueError(f"the action {action_name!r} was started, but it is under way already: stop it first.")
        self.current_actions[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Record how long an action took.

        Raises:
            ValueError: it was not started.
        """
        end = time.perf_counter()
        if action_name not in self.current_actions:
            raise ValueError(f"the action {action_name!r} was stopped, but it was not started.")
        self.recorded_durations[action_name].append(end - self.current_actions.pop(action_name))

    def summary(self) -> str:
        """Return a table of the actions, those that took longest first."""
        total = time.perf_counter() - self.start_time
        rows = [(action, len(times), math.fsum(times)) for action, times in self.recorded_durations.items()]
        if not self.extended:
            rows.sort(key=lambda row: row[2] / row[1], reverse=True)
            cells = [(action, f"{taken / calls:.5}", f"{taken:.5}") for action, calls, taken in rows]
            return f"{self._title()}\n\n{table(('Action', 'Mean duration (s)', 'Total time (s)'), cells)}\n"
        rows.sort(key=lambda row: row[2], reverse=True)
        head = ("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %")
        everything = ("Total", "-", str(sum(calls for _, calls, _ in rows)), f"{total:.5}", "100 %")
        long = [
            (action, f"{taken / calls:.5}", str(calls), f"{taken:.5}", f"{100 * taken / total:.5}")
            for action, calls, taken in rows
        ]
        return f"{self._title()}\n\n{table(head, [everything, *long])}\n"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows of cells under a head, in columns."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = "-" * (sum(widths) + 3 * len(widths) + 1)
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    top = "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(head, widths, strict=True)) + " |"
    return "\n".join([rule, top, rule, *lines, rule])
