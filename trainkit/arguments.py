"""Check the Trainer's arguments when it is made: what was given, what is possible, what to write instead."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from trainkit.duration import parse_duration
from trainkit.errors import MisconfigurationException


def count(name: str, value: Any, *, least: int, required: bool = False, what: str = "a whole number") -> Any:
    """Return a whole number of at least `least`; or None, unless it is required."""
    if value is None and not required:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {what}. Received: {value!r}.")
    if value < least:
        meaning = " (-1: no limit)" if least == -1 else ""
        raise MisconfigurationException(f"{name} must be at least {least}{meaning}. Received: {value!r}.")
    return value


def trial(value: Any) -> int:
    """Return fast_dev_run as a number of batches: 1 for True, 0 for False."""
    number = int(value) if isinstance(value, bool) else value
    batches: int = count("fast_dev_run", number, least=0, required=True, what="True, False or a number of batches")
    return batches


def folder(name: str, value: Any) -> str:
    """Return a folder's absolute path, the current one for None."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path. Received: {value!r}.")
    path: str = os.path.abspath(os.path.expanduser(os.fspath(value or ".")))
    return path


def order(low: str, least: int | None, high: str, most: int | None) -> None:
    """Refuse a minimum above its maximum."""
    if least is not None and most is not None and most != -1 and least > most:
        raise MisconfigurationException(f"{low}={least} is more than {high}={most}, so it could never be reached.")


def flag(name: str, value: Any, *also: Any) -> Any:
    """Return True, False, None, or one of the other values that are allowed."""
    if value is None or isinstance(value, bool) or value in also:
        return value
    allowed = ", ".join(map(repr, (True, False, *also)))
    raise TypeError(f"{name} must be one of {allowed}. Received: {value!r}.")


def limit(name: str, value: float | None, default: float = 1.0) -> float:
    """Return a number of batches (int) or a fraction of them (float from 0.0 to 1.0)."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of batches or a fraction of them. Received: {value!r}.")
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return value
    raise MisconfigurationException(
        f"{name} must be a whole number of batches, at least 0, or a fraction from 0.0 to 1.0. Received: {value!r}."
    )


def clip_value(value: Any) -> float | None:
    """Return gradient_clip_val; None and what is not positive mean no clipping."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"gradient_clip_val must be a number. Received: {value!r}.")
    if math.isnan(value) or value < 0:
        raise MisconfigurationException(f"gradient_clip_val must be a positive number. Received: {value!r}.")
    return float(value) if value > 0 else None


def choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """Return one of the words, or None."""
    if value is None or value in choices:
        return value
    raise MisconfigurationException(f"{name} must be {' or '.join(map(repr, choices))}. Received: {value!r}.")


def validation_interval(value: Any, every_n_epoch: int | None) -> float | timedelta:
    """Return val_check_interval: a fraction of the epoch, a number of batches, or a time."""
    if isinstance(value, (str, timedelta, Mapping)):
        return parse_duration(value, "val_check_interval")
    interval = limit("val_check_interval", value)
    if interval == 0:
        raise MisconfigurationException(
            f"val_check_interval={value!r} is never; limit_val_batches=0 turns validation off."
        )
    if isinstance(interval, float) and every_n_epoch is None:
        raise MisconfigurationException(
            "check_val_every_n_epoch=None counts batches across epochs, so val_check_interval must be a whole number "
            f"of batches or a time. Received: val_check_interval={value!r}."
        )
    return interval
