"""Profiler: what a run tells its profiler, and the report at its end.

Profiler                base: names the report's file, writes it; hears everything and records nothing
  PassThroughProfiler     stands for "off": a run does not even call it
  SimpleProfiler          how long each action took
  AdvancedProfiler        which functions took that long
  PyTorchProfiler         which operators, on the host and on the device; traces for Chrome and TensorBoard

The trainer's calls, in order:

    setup(stage, local_rank, log_dir)    before the first action of fit, validate, test or predict is named
    start(action), stop(action)          around each action; actions nest
    describe()                           at the end, errors or not: the report goes to its file or to the log
      summary(), teardown(stage)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from trainkit.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from trainkit.module import Module


class Profiler:
    """Record the actions of a run. Subclass it and override `start`, `stop` and `summary`.

    Args:
        dirpath: the directory of the report; None takes the run's `trainer.log_dir`.
        filename: the report's file is `<stage>-<filename>.txt`, a later report is written behind it. None: the report
            is logged instead.

    Example:
        >>> class Counter(Profiler):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.counts = {}
        ...     def start(self, action_name):
        ...         self.counts[action_name] = self.counts.get(action_name, 0) + 1
        >>> counter = Counter()
        >>> with counter.profile("augment"):
        ...     pass
        >>> counter.counts
        {'augment': 1}
    """

    _lightning_module: Module | None = None  # during a run; the name that profilers written for Lightning read

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None) -> None:
        for name, value in (("dirpath", dirpath), ("filename", filename)):
            if not isinstance(value, str | os.PathLike | None):
                raise TypeError(f"{name} must be a path or None. Received: {value!r}.")
        self.dirpath = dirpath
        self.filename = filename
        self._stage: str | None = None
        self._local_rank: int | None = None
        self._run_dir: str | None = None  # the log_dir that stands in for a dirpath

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine, from 0."""
        return self._local_rank or 0

    def start(self, action_name: str) -> None:
        """Called when an action begins."""

    def stop(self, action_name: str) -> None:
        """Called when an action has ended."""

    @contextmanager
    def _recording(self, action_name: str) -> Iterator[str]:
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def profile(self, action_name: str) -> AbstractContextManager[str]:
        """Record what happens inside a `with` block as an action of that name, for code of your own.

        Example:
            >>> with Profiler().profile("augment"):
            ...     pass
        """
        return self._recording(action_name)

    def summary(self) -> str:
        """Return the report; "" for none."""
        return ""

    def describe(self) -> None:
        """Write the report to its file, or log it when no file is named."""
        if summary := self.summary():
            if self.filename and self.dirpath:
                os.makedirs(self.dirpath, exist_ok=True)
                with open(os.path.join(self.dirpath, self._prepare_filename()), "a", encoding="utf-8") as file:
                    file.write(summary)
            elif self.local_rank == 0:
                rank_zero_info(summary)
        self.teardown(stage=self._stage)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Get ready for a run.

        Args:
            stage: "fit", "validate", "test" or "predict".
            local_rank: the number of this process, None when there is one only.
            log_dir: where files go that have no directory of their own.
        """
        self._stage = str(stage)
        self._local_rank = local_rank
        if self.dirpath is None or self.dirpath == self._run_dir:  # each run's files in its own directory
            self.dirpath = self._run_dir = log_dir

    def teardown(self, stage: str | None) -> None:
        """Let go of what the run needed; called by `describe`."""

    def _prepare_filename(self, action_name: str | None = None, extension: str = ".txt") -> str:
        """Return `<stage>-<filename>-<rank>-<action>.txt`, of these what there is, in characters any disk takes."""
        rank = None if self._local_rank is None else str(self._local_rank)
        base = "-".join(part for part in (self._stage, self.filename, rank, action_name) if part)
        return (re.sub(r'[\\/:*?"<>|\n\r\t_]+', "_", base).strip() or "profile") + extension

    def _stats_to_str(self, stats: Mapping[str, str]) -> str:
        """Return a report out of the reports on single actions."""
        rank = "" if self._local_rank is None else f" rank: {self._local_rank}"
        parts = [f"Profile stats for: {action}{rank}\n{text}" for action, text in stats.items()]
        return "\n".join([self._title(), *parts])

    def _title(self) -> str:
        return f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"


class PassThroughProfiler(Profiler):
    """Record nothing: what `trainer.profiler` is when no profiler was given, so that `profile` always works."""

    def profile(self, action_name: str) -> AbstractContextManager[str]:
        """Do nothing, for as little as that can cost."""
        return nullcontext(action_name)
