"""Which process speaks: functions that do their work in the process with rank 0 only.

    rank_zero_only              decorator: elsewhere the function returns None (or a default) and does nothing
    rank_zero_info, _debug      a message to the log; without a logging setup of the program's own, to stderr
    rank_zero_warn, _deprecation  a warning
    WarningCache                the same, but each message once

The rank is `rank_zero_only.rank`. It is read from the launcher's environment when this module is imported; a strategy
that gives out ranks later sets it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast, overload

P = ParamSpec("P")
T = TypeVar("T")
D = TypeVar("D")

log = logging.getLogger(__name__)

LAUNCHERS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Where launchers say a process's rank, in the order in which they are believed: torchrun, SLURM, jsrun."""


class LightningDeprecationWarning(DeprecationWarning):
    """Warn of something that will go away; the name that Lightning programs filter by."""


class Console(logging.Handler):
    """Print to stderr, unless the program has set logging up itself, or a test has put another stderr in place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message alone."""
        if not logging.root.handlers:
            print(self.format(record), file=sys.stderr)


log.addHandler(Console())
log.setLevel(logging.INFO)


def rank_of_environment() -> int:
    """Return the rank that the launcher gave this process, 0 without one."""
    return next((int(os.environ[name]) for name in LAUNCHERS if os.environ.get(name, "").isdigit()), 0)


@overload
def rank_zero_only(fn: Callable[P, T]) -> Callable[P, T | None]: ...


@overload
def rank_zero_only(fn: Callable[P, T], default: D) -> Callable[P, T | D]: ...


def rank_zero_only(fn: Callable[P, Any], default: Any = None) -> Callable[P, Any]:
    """Make a function do its work in the process with rank 0 only; elsewhere it returns `default`.

    Example:
        >>> @rank_zero_only
        ... def report(loss):
        ...     return f"loss {loss}"
        >>> report(0.5)
        'loss 0.5'
    """

    @wraps(fn)
    def on_rank_zero(*args: P.args, **kwargs: P.kwargs) -> Any:
        rank = getattr(rank_zero_only, "rank", None)
        if rank is None:
            raise RuntimeError("rank_zero_only.rank is not set. Set it to this process's rank, from 0.")
        return fn(*args, **kwargs) if rank == 0 else default

    return on_rank_zero


rank_zero_only.rank = rank_of_environment()  # type: ignore[attr-defined]


def current_rank() -> int:
    """Return the rank of this process, as `rank_zero_only` knows it."""
    return cast(int, getattr(rank_zero_only, "rank", None) or 0)


@rank_zero_only
def rank_zero_debug(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log a message for who looks for a mistake, with the arguments of `logging.debug`."""
    log.debug(*args, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_info(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log a message, with the arguments of `logging.info`."""
    log.info(*args, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_warn(message: str | Warning, stacklevel: int = 4, **kwargs: Any) -> None:
    """Warn, with the arguments of `warnings.warn`; by default of the line that called."""
    warnings.warn(message, stacklevel=stacklevel - 1, **kwargs)


@rank_zero_only
def rank_zero_deprecation(message: str | Warning, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warn that something will go away."""
    warnings.warn(message, kwargs.pop("category", LightningDeprecationWarning), stacklevel - 2, **kwargs)


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """Return the message with the rank before it, if there is one."""
    return message if rank is None else f"[rank: {rank}] {message}"


class WarningCache(set[str]):
    """Say each message once.

    Example:
        >>> once = WarningCache()
        >>> for _ in range(2):
        ...     once.info("the same")
        >>> once
        WarningCache({'the same'})
    """

    def warn(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        """Warn, the first time."""
        if self._is_new(message):
            rank_zero_warn(message, stacklevel=stacklevel, **kwargs)

    def deprecation(self, message: str, stacklevel: int = 6, **kwargs: Any) -> None:
        """Warn that something will go away, the first time."""
        if self._is_new(message):
            rank_zero_deprecation(message, stacklevel=stacklevel, **kwargs)

    def info(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        """Log a message, the first time."""
        if self._is_new(message):
            rank_zero_info(message, stacklevel=stacklevel, **kwargs)

    def _is_new(self, message: str) -> bool:
        new = message not in self
        self.add(message)
        return new
