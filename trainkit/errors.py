"""The exceptions a caller may want to catch, and the wording they share.

ValueError
  MisconfigurationException     an argument, a method or a combination of them that can't work
    WrongTypeException          the same, and a TypeError
    DuplicateStateError         two callbacks with one state; the same, and a RuntimeError
    MissingMetricError          the same, and a RuntimeError
RuntimeError
  CheckpointError               a checkpoint that is damaged, or does not fit
    NoCheckpointError           there is none of that name; also a FileNotFoundError and a ValueError
    CheckpointExistsError       there is one of that name, and it is not to be replaced; also a FileExistsError
    IncompleteCheckpointError   it has weights, and nothing to resume a run from; also a KeyError
  MissingRankError              processes waited too long for one that did not come; also a TimeoutError
ArithmeticError
  NonFiniteError                nan_policy: a loss or a gradient is not finite; a FloatingPointError
Exception
  SearchOver                    no error: a run that was only made to search for something is over
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Iterable

_HERE = os.path.dirname(os.path.abspath(__file__))
_OURS = (_HERE + os.sep, os.path.join(os.path.dirname(_HERE), "callbacks") + os.sep)


class MisconfigurationException(ValueError):
    """Tell what in the user's code or configuration can't work, and what to write instead."""


class WrongTypeException(MisconfigurationException, TypeError):
    """Tell which argument is of a type that can't work."""


class DuplicateStateError(MisconfigurationException, RuntimeError):
    """Tell which callbacks would overwrite each other's state in a checkpoint."""


class MissingMetricError(MisconfigurationException, RuntimeError):
    """Tell which metric is watched and never logged."""


class CheckpointError(RuntimeError):
    """Tell why a checkpoint was not written or not loaded; nothing was changed."""


class NoCheckpointError(CheckpointError, FileNotFoundError, ValueError):
    """Tell that there is no such checkpoint, whether a file or "best" and "last" name it."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """Tell that there is a checkpoint of that name, which was not to be replaced."""


class IncompleteCheckpointError(CheckpointError, KeyError):
    """Tell what a checkpoint lacks that a run needs to go on from it."""

    __str__ = Exception.__str__  # that of KeyError puts the message in quotes


class MissingRankError(RuntimeError, TimeoutError):
    """Tell which process the others waited for in vain, and what it was doing.

    Attributes:
        ranks: those that were missing.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = list(ranks)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.ranks)


class NonFiniteError(FloatingPointError):
    """Tell which update was not made because its loss or its gradients are not finite.

    Attributes:
        step: updates before it.
        epoch, batch_idx: the batch; in an accumulation window the first whose loss is not finite.
        loss: that batch's loss.
        parameter: the name of the first parameter whose gradient is not finite, None when all are.
    """

    def __init__(self, message: str, step: int, epoch: int, batch_idx: int, loss: float, parameter: str | None) -> None:
        super().__init__(message)
        self.step, self.epoch, self.batch_idx, self.loss, self.parameter = step, epoch, batch_idx, loss, parameter

    def __reduce__(self) -> tuple[object, ...]:
        details = (self.step, self.epoch, self.batch_idx, self.loss, self.parameter)
        return type(self), (str(self), *details)


class SearchOver(Exception):
    """End a run from one of its hooks, with its teardown but without telling anybody of an error; then catch it."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's code that led here, past trainkit's own frames."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_ours(file: str) -> bool:
    return file.startswith(_OURS) or file == contextlib.__file__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" when a known name is close, else the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names) if names else "there is none"
