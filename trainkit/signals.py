"""Signals that ask a run to end: noted by a handler, honoured by the loop where everything can be saved.

signal            what a run does                                                  exit code
------            ---------------                                                  ---------
SIGINT (Ctrl-C)   finishes the step, saves, says how to go on                      130
SIGTERM           the same                                                         143
SIGHUP            the same                                                         129
SIGUSR1, SIGUSR2  the same; in a job of SLURM it is queued again (see slurm.py)    138, 140; 0 when queued again

A second one stops at once. So does the first while there is nothing to finish: before training, and in evaluations.
What the process ignores it goes on ignoring. A signal that the user has given a handler of its own is left to it, but
for SIGTERM, which is noted before that handler is called.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeGuard

from trainkit.rank_zero import current_rank

NOTED = tuple(
    number
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if (number := getattr(signal, name, None)) is not None
)
NOTICES = NOTED[3:]
"""What schedulers send ahead of time: there is time to finish what is being done."""
STOPS = NOTED[:3]


class Interrupted(SystemExit, KeyboardInterrupt):
    """Ctrl-C, after the step was finished and saved: a KeyboardInterrupt that ends a script with 130, silently."""


class SIGTERMException(SystemExit):
    """SIGTERM, after the step was finished and saved: the process ends with 143."""


class Preempted(SystemExit):
    """SIGHUP, SIGUSR1 or SIGUSR2, after the step was finished and saved: the process ends with 128 and its number."""


class Interruption:
    """Which signal asked this run to end, if any. Nothing is saved inside a handler; the loop looks here."""

    asked = False
    """Whether one has come to this process, in any run."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.noted_at = 0.0
        """When it came, on the monotonic clock."""
        self.at_once: Collection[int] = ()
        """Signals that end the run where it is, because there is nothing to finish."""
        self.save_seconds: float | None = None
        """How long the longest save took so far."""
        self._before: dict[int, Any] = {}
        self._noting = self._by_others = False

    @contextmanager
    def listening(self, at_once: Collection[int] = ()) -> Iterator[None]:
        """Note signals instead of dying from them; in other threads than the main one signals can't be caught.

        Args:
            at_once: those that end the run where it is.
        """
        self.signal, self.at_once, self._noting, self._by_others = None, at_once, False, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._note) for number in NOTED if _is_free(number)}
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            if handler is not None:  # None: it was not installed from Python
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noting:
            return
        if self.signal is not None and not self._by_others:
            self._restore()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        told, self._by_others, Interruption.asked = self._by_others, False, True
        if not told:
            self.signal, self.noted_at = number, time.monotonic()
        self._noting = True
        try:
            handler = self._before.get(number)
            if _is_users_own(handler):
                handler(number, frame)
            time.sleep(0.02)  # timeout(1) and others signal the process and then its group: one request, not two
        finally:
            self._noting = False
        if number in self.at_once:
            self.leave()
        if not told:
            self._tell(number)

    def hear(self, number: int) -> None:
        """Note a signal that another process of the run got; this one's own, which may follow, is no second one."""
        self.signal, self.noted_at, self._by_others = number, time.monotonic(), True
        self._tell(number)

    def _tell(self, number: int) -> None:
        if current_rank() > 0:
            return
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        took = "" if self.save_seconds is None else f" (saves took up to {self.save_seconds:.1f} s)"
        # straight to the terminal: Python's streams may be in the middle of a write, which a handler can't enter again
        with contextlib.suppress(OSError):
            live = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
            start = "\r\x1b[2K" if live else "\n"  # in the place of a progress bar's line, which is drawn again below
            os.write(2, f"{start}{name}: finishing this step and saving{took}; once more stops at once\n".encode())

    def saved_in(self, seconds: float) -> None:
        """Remember how long the longest save took, for the notice that a scheduler gives."""
        self.save_seconds = max(self.save_seconds or 0.0, seconds)

    def leave(self) -> None:
        """Raise what the noted signal means: KeyboardInterrupt, or a SystemExit with 128 and its number."""
        if self.signal is not None:
            left = {signal.SIGINT: Interrupted, signal.SIGTERM: SIGTERMException}.get(signal.Signals(self.signal))
            raise (left or Preempted)(128 + self.signal)


def _is_free(number: int) -> bool:
    """Whether a run may note a signal: nobody ignores it, and nobody has given it another meaning."""
    handler = signal.getsignal(number)
    if handler is signal.SIG_IGN:  # as a shell's background job does with Ctrl-C, and nohup with SIGHUP
        return False
    if number == signal.SIGTERM:  # has one meaning only
        return True
    return handler is not None and not _is_users_own(handler) and not _is_caught_outside_of_python(number)


def _is_users_own(handler: Any) -> TypeGuard[Callable[..., Any]]:
    around = isinstance(getattr(handler, "__self__", None), Interruption)  # of a run in whose hook this one runs
    return callable(handler) and handler is not signal.default_int_handler and not around


def _is_caught_outside_of_python(number: int) -> bool:
    """Whether a library handles a signal that Python knows nothing of, as faulthandler.register does."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
