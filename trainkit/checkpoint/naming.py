"""File names from templates: "{epoch}-{val_loss:.2f}" becomes "epoch=2-val_loss=0.31"."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from typing import Any

from trainkit.errors import MisconfigurationException

COUNTERS = ("epoch", "step")
"""The names in a template that are whole numbers."""


def fill(template: str, metrics: Mapping[str, Any], insert_names: bool = True, equals: str = "=") -> str:
    """Return a template with the metrics' values in it; one that is missing is 0.

    A name is looked up as it stands and never evaluated, as `str.format` would do.

    Args:
        template: text with names in braces, each with a format behind a colon if need be.
        metrics: names and numbers.
        insert_names: put a metric's name before its value, with "_" for each "/", which would make a directory.
        equals: what stands between the two.

    Raises:
        MisconfigurationException: the template can't be used, see `check_template`.
    """
    name = ""
    for text, key, spec in _parts(template):
        name += text
        if key is not None:
            value = metrics.get(key, 0)
            value = value.item() if hasattr(value, "item") else value
            name += (key.replace("/", "_") + equals if insert_names else "") + _formatted(value, spec, key in COUNTERS)
    return name


def _formatted(value: Any, spec: str, whole: bool) -> str:
    """Write a value; where a format is for whole numbers, what is behind the point is dropped."""
    if isinstance(value, float) and (whole or spec[-1:] in tuple("bdoxX")):
        return format(int(value), spec) if math.isfinite(value) else str(value)
    return format(value, spec)


def names_in(template: str) -> set[str]:
    """Return the metrics a template asks for."""
    return {key for _, key, _ in _parts(template) if key is not None}


def check_template(template: Any, argument: str = "the template") -> None:
    """Refuse a template that would not become a file name.

    Args:
        template: what was given.
        argument: what the user calls it; errors begin with it.

    Raises:
        MisconfigurationException: it is not a string, leads out of the directory, has braces that do not match,
            something else than names in them, or a format that numbers do not have.
    """
    if not isinstance(template, str):
        raise _refusal(argument, template, "it must be a string")
    folders, _, last = template.rpartition("/")
    if template.startswith("/") or ".." in folders.split("/") or (folders and not last):
        raise _refusal(argument, template, "it is the name of a file below dirpath")
    for text, key, spec in _parts(template, argument):
        if "\0" in text:
            raise _refusal(argument, template, "a file name has no zero byte")
        try:
            _formatted(0.5, spec, key in COUNTERS)
        except ValueError as error:
            raise _refusal(argument, template, f"{key!r} can't be written with the format {spec!r}: {error}") from None


def _parts(template: str, argument: str = "the template") -> list[tuple[str, str | None, str]]:
    """Return pieces of text, each with the name and the format that follow it, or None and ""."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _refusal(argument, template, str(error)) from None
    parts: list[tuple[str, str | None, str]] = []
    for text, key, spec, conversion in pieces:
        if key is not None and (not key or key.isdigit() or conversion or "{" in (spec or "")):
            raise _refusal(argument, template, "only the name of a metric and a format can stand in the braces")
        parts.append((text, key, spec or ""))
    return parts


def _refusal(argument: str, template: Any, why: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{argument} can't be used: {why}. Received: {template!r}. Write it like '{{epoch}}-{{val_loss:.2f}}'."
    )
