"""What is wrong with a config, where it was written, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainkit.errors import MisconfigurationException, nearest

SHOWN = 8
"""Problems printed at once; of more only the number is told."""
WIDTH = 100
"""Characters of a source line that an excerpt shows."""
FEW = 8
"""Names listed when none is close to what was written."""


@dataclass(frozen=True)
class Place:
    """Where something was written.

    Args:
        source: the file's name as the user typed it, or the option as it stands on the command line.
        line: from 1; 0 for the command line and for a whole file.
        column: from 1.
        length: how many characters the caret line underlines.
        text: the line itself.
    """

    source: str
    line: int = 0
    column: int = 0
    length: int = 1
    text: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    def excerpt(self) -> list[str]:
        """Show the line with a caret under what is meant; nothing for a place without a line."""
        if not self.text.strip() or len(self.text) > WIDTH:
            return []
        number = str(self.line)
        length = max(1, min(self.length, len(self.text) - self.column + 1))
        blank = "".join("\t" if character == "\t" else " " for character in self.text[: self.column - 1])
        return [f"   {number} | {self.text}", f"   {' ' * len(number)} | {blank}{'^' * length}"]


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, where, under which key, and what helps."""

    title: str
    place: Place | None = None
    key: str = ""
    hint: str = ""

    def __str__(self) -> str:
        lines = [f"error: {self.title}"]
        where = str(self.place) if self.place else ""
        if self.key and not where.startswith("command line: "):  # there the option itself is the key
            where = f"{where}  ({self.key})" if where else f"({self.key})"
        if where:
            lines.append(f"  --> {where}")
        if self.place:
            lines += self.place.excerpt()
        lines += [f"   = {line}" for line in self.hint.splitlines()]
        return "\n".join(lines)


class ConfigError(MisconfigurationException):
    """A config that can't be run: all that is wrong with it."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(map(str, self.problems[:SHOWN])))

    @property
    def summary(self) -> str:
        """How many problems there are, for the last line; empty for one."""
        return f"{len(self.problems)} problems; " if len(self.problems) > 1 else ""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" when a known name is close, else a few known names, the nearest first."""
    names = sorted(known)
    if len(names) <= FEW or difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        return nearest(name, names)
    return f"the nearest of {len(names)}: " + ", ".join(difflib.get_close_matches(name, names, n=FEW, cutoff=0.0))
