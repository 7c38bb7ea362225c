"""Ctrl-C and SIGTERM during fit: the first is honoured at the next save point, the second acts at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NOTED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit, KeyboardInterrupt):
    """Ctrl-C, after the step was finished and saved: a KeyboardInterrupt that ends a script with 130, silently."""


class SIGTERMException(SystemExit):
    """SIGTERM, after the step was finished and saved: the process ends with 143."""


class Interruption:
    """Which signal asked this run to end, if any. Nothing is saved inside a handler; the loop looks here."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying from them; in other threads than the main one signals can't be caught."""
        self.signal = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # what the process ignores, as a shell's background job does with Ctrl-C, it goes on ignoring
        heard = [number for number in NOTED if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
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
        if self.signal is not None:
            self._restore()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.signal = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # straight to the terminal: Python's streams may be in the middle of a write, which a handler can't enter again
        with contextlib.suppress(OSError):
            live = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
            start = "\r\x1b[2K" if live else "\n"  # in the place of a progress bar's line, which is drawn again below
            os.write(2, f"{start}{name}: finishing this step and saving; once more stops at once\n".encode())

    def leave(self) -> None:
        """Raise what the noted signal means: KeyboardInterrupt, or a SystemExit with 143 for SIGTERM."""
        if self.signal is not None:
            raise Interrupted(130) if self.signal == signal.SIGINT else SIGTERMException(128 + self.signal)
