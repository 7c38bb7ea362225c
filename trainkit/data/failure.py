"""Errors of a data set: what they were, with the sample's name, from whichever process they come."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from typing import Any

from trainkit import signals

HERE = os.path.dirname(__file__)
ENDINGS = (StopIteration, GeneratorExit, SystemExit, KeyboardInterrupt)
"""What ends a loop, a generator or a process when it is raised, and must not end an epoch that way."""


class WorkerTraceback(Exception):
    """The cause of an error that comes from a worker process: its traceback, as it was there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Text(str):
    """Is shown as it is, in a KeyError, too."""

    __repr__ = str.__str__


def named(error: BaseException, where: str) -> BaseException:
    """Return an error whose message says where it happened: the same one, or what stands for one that is no error."""
    if isinstance(error, ENDINGS):
        what = type(error).__name__ + (f"({error})" if str(error) else "")
        stands_in = RuntimeError(f"a data set must not raise {what}.\n{where}")
        stands_in.__cause__ = error
        return stands_in
    args = error.args
    if not args or (len(args) == 1 and isinstance(args[0], str)):
        error.args = (_Text(f"{args[0]}\n{where}" if args else where),)
        if where in str(error):
            return error
        error.args = args
    error.add_note(where)  # an OSError, for example, says what its errno means
    return error


def from_signal(error: BaseException) -> bool:
    """Whether a signal's handler raised it, in the middle of whatever was going on."""
    handlers = {signal.getsignal(number) for number in signal.valid_signals()}
    codes = {getattr(handler, "__code__", None) for handler in handlers}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_code in codes or frame.f_code.co_filename == signals.__file__ for frame in frames)


class Failure:
    """An error on its way from a worker process to the main one, which raises it in its own type."""

    def __init__(self, error: BaseException) -> None:
        shown = error.__traceback__
        while shown is not None and os.path.dirname(shown.tb_frame.f_code.co_filename) == HERE:
            shown = shown.tb_next  # down to the user's own lines
        error.__traceback__ = shown or error.__traceback__
        self.traceback = "".join(traceback.format_exception(error)).rstrip()
        self.message, self.notes = str(error), getattr(error, "__notes__", [])
        self.pickled = self.kind = b""
        with contextlib.suppress(Exception):  # one that needs other arguments than it keeps can't come back
            pickled = pickle.dumps(error)
            if type(pickle.loads(pickled)) is type(error):
                self.pickled = pickled
        with contextlib.suppress(Exception):
            self.kind = pickle.dumps(type(error))

    def error(self) -> BaseException:
        """Return the error, with the worker's traceback as its cause."""
        error: Any = None
        with contextlib.suppress(Exception):
            if self.pickled:
                error = pickle.loads(self.pickled)
            elif self.kind:
                kind = pickle.loads(self.kind)
                error = kind.__new__(kind, self.message)
                error.args = (self.message,)
        if not isinstance(error, BaseException):
            error = RuntimeError(self.message)
        if not getattr(error, "__notes__", None):
            for note in self.notes:
                error.add_note(note)
        made: BaseException = error
        made.__cause__ = WorkerTraceback(self.traceback)
        return made
