"""AdvancedProfiler: which functions an action spent its time in."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from trainkit.errors import MisconfigurationException
from trainkit.profiler.base import Profiler

if TYPE_CHECKING:
    from cProfile import Profile


class AdvancedProfiler(Profiler):
    """Report the Python functions that each action called, with Python's own cProfile.

    Python watches for one profile at a time, so a call counts for the innermost action it happened in; an outer
    action's report goes on where the inner one has ended. Watching every call slows Python code down.

    Args:
        dirpath: the directory of the report; None takes the run's `trainer.log_dir`.
        filename: the report's file is `<stage>-<filename>.txt`; None logs the report.
        line_count_restriction: report so many functions of each action (int), or that fraction of them (0.0 to 1.0).
        dump_stats: keep each action's profile as `<stage>-<filename>-<action>.prof`, for pstats and its viewers.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self.profiled_actions: dict[str, Profile] = {}
        """The profile of each action; empty again when the report is written."""
        self._open: list[str] = []  # the innermost last

    def start(self, action_name: str) -> None:
        """Watch what an action calls, instead of the action around it."""
        from cProfile import Profile

        if self._open:
            self.profiled_actions[self._open[-1]].disable()
        self._open.append(action_name)
        self.profiled_actions.setdefault(action_name, Profile()).enable()

    def stop(self, action_name: str) -> None:
        """Go on with the action around this one.

        Raises:
            ValueError: it was not started.
        """
        if action_name not in self._open:
            raise ValueError(f"the action {action_name!r} was stopped, but it was not started.")
        self.profiled_actions[self._open[-1]].disable()
        del self._open[len(self._open) - 1 - self._open[::-1].index(action_name)]
        if self._open:
            self.profiled_actions[self._open[-1]].enable()

    def summary(self) -> str:
        """Return a table of functions for each action, those first that took longest with all they called.

        Raises:
            MisconfigurationException: dump_stats, and no directory to write to.
        """
        import pstats

        if self.dump_stats and self.dirpath is None:
            raise MisconfigurationException("dump_stats=True needs a directory: give dirpath, or the Trainer a logger.")
        reports = {}
        for action, profile in self.profiled_actions.items():
            if self.dump_stats:
                assert self.dirpath is not None
                os.makedirs(self.dirpath, exist_ok=True)
                profile.dump_stats(os.path.join(self.dirpath, self._prepare_filename(action, extension=".prof")))
            text = io.StringIO()
            pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative").print_stats(
                self.line_count_restriction
            )
            reports[action] = text.getvalue()
        return self._stats_to_str(reports)

    def teardown(self, stage: str | None) -> None:
        """Forget the profiles."""
        if self._open:
            self.profiled_actions[self._open[-1]].disable()
        self._open.clear()
        self.profiled_actions.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "profiled_actions": {}, "_open": []}  # a profile can't be pickled
