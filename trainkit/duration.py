"""Durations as people write them: "DD:HH:MM:SS", a timedelta, or a dict of its arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from trainkit.errors import MisconfigurationException, WrongTypeException

_PATTERN = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)", re.ASCII)
_UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")
_EXPECTED = 'a string "DD:HH:MM:SS" such as "00:12:00:00", a timedelta, or a dict such as {"hours": 12}'


def parse_duration(value: str | timedelta | Mapping[str, float], argument: str = "duration") -> timedelta:
    """Return a duration as a timedelta.

    Args:
        value: "DD:HH:MM:SS" (days, hours, minutes, seconds), a timedelta, or a dict of a timedelta's arguments.
        argument: what the user calls this value; errors begin with it.

    Raises:
        WrongTypeException (a TypeError): the value is none of the three.
        MisconfigurationException (a ValueError): the string or the dict can't be read, or the duration is negative.
    """
    duration = _read(value, argument)
    if duration < timedelta():
        raise MisconfigurationException(f"{argument} must not be negative. Received: {value!r}.")
    return duration


def _read(value: Any, argument: str) -> timedelta:
    if isinstance(value, timedelta):
        return value
    try:
        if isinstance(value, str):
            if found := _PATTERN.fullmatch(value.strip()):
                days, hours, minutes, seconds = map(int, found.groups())
                return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
            raise MisconfigurationException(f"{argument} must be {_EXPECTED}. Received: {value!r}.")
        if isinstance(value, Mapping):
            if unknown := [str(unit) for unit in value if unit not in _UNITS]:
                known = ", ".join(_UNITS)
                raise MisconfigurationException(f"{argument} has no unit {', '.join(unknown)}: a dict takes {known}.")
            if wrong := [unit for unit, n in value.items() if isinstance(n, bool) or not isinstance(n, (int, float))]:
                raise MisconfigurationException(
                    f"{argument}[{wrong[0]!r}] must be a number. Received: {value[wrong[0]]!r}."
                )
            if any(number != number for number in value.values()):
                raise MisconfigurationException(f"{argument} must be made of finite numbers. Received: {value!r}.")
            return timedelta(**value)
    except OverflowError as error:
        raise MisconfigurationException(
            f"{argument} is longer than a timedelta can be. Received: {value!r}."
        ) from error
    hint = ""
    if isinstance(value, int) and not isinstance(value, bool):
        hint = " In YAML, quote it: unquoted, 01:00:00:00 can be read as one number."
    raise WrongTypeException(
        f"{argument} must be {_EXPECTED}. Received: {value!r} of type {type(value).__name__}.{hint}"
    )
