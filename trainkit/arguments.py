"""Check the Trainer's arguments when it is made: what was given, what is possible, what to write instead."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from trainkit.duration import parse_duration
from trainkit.errors import MisconfigurationException


def count(name: str, value: Any, *, least: int, what: str = "a whole number") -> Any:
    """Return a whole number of at least `least`, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {what}. Received: {value!r}.")
    if value < least:
        meaning = " (-1: no limit)" if least == -1 else ""
        raise MisconfigurationException(f"{name} must be at least {least}{meaning}. Received: {value!r}.")
    return value


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
    if isinstance(value, (str, timedelta, dict)):
        return parse_duration(value)
    interval = limit("val_check_interval", value)
    if isinstance(interval, int) and not isinstance(interval, bool) and interval == 0:
        raise MisconfigurationException(
            "val_check_interval=0 batches is never; limit_val_batches=0 turns validation off."
        )
    if isinstance(interval, float) and every_n_epoch is None:
        raise MisconfigurationException(
            "check_val_every_n_epoch=None counts batches across epochs, so val_check_interval must be a whole number "
            f"of batches or a time. Received: val_check_interval={value!r}."
        )
    return interval
