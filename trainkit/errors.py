"""The exceptions a caller may want to catch, and the wording they share.

ValueError
  MisconfigurationException     an argument, a method or a combination of them that can't work
RuntimeError
  CheckpointError               a checkpoint that is missing, damaged, or does not fit
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MisconfigurationException(ValueError):
    """Tell what in the user's code or configuration can't work, and what to write instead."""


class CheckpointError(RuntimeError):
    """Tell why a checkpoint was not written or not loaded; nothing was changed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" when a known name is close, else the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names) if names else "there is none"
