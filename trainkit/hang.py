"""Hang: what the states of all processes say together: who waits for whom, and whether that is worth a word.

A state is what a process writes on the board (`watchdog.Watchdog.state`), {} of one that never wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

State = Mapping[str, Any]
GROUPS = 6  # that a sentence names
NEVER = "has not been heard of"


def culprits(states: Sequence[State], silent: Collection[int]) -> list[int]:
    """Return the ranks that the others wait for, [] when all wait in the same way.

    Args:
        states: of all processes, by rank.
        silent: those that write no more.
    """
    late = [rank for rank, state in enumerate(states) if rank in silent or state.get("kind") != "waits"]
    if late:
        return late
    least = min(state["done"] for state in states)
    behind = [rank for rank, state in enumerate(states) if state["done"] == least]
    return behind if len(behind) < len(states) else []


def is_hang(states: Sequence[State], silent: Collection[int]) -> bool:
    """Return whether nothing has happened for too long, and nobody has a reason for it."""
    late = culprits(states, silent)
    heard = [states[rank] for rank in late or range(len(states)) if rank not in silent]
    if any(state["quiet"] or state["still"] <= state["limit"] for state in heard):
        return False
    waits = any(state.get("kind") == "waits" and rank not in silent for rank, state in enumerate(states))
    return waits or all(state["counted"] and not state["slow"] for state in heard)


def sentence(states: Sequence[State], silent: Mapping[int, float | None]) -> str:
    """Return who waits for whom.

    Args:
        states: of all processes, by rank.
        silent: those that write no more, with the seconds since they did; None when they never did.
    """
    late = culprits(states, silent)
    groups: dict[tuple[bool, str], list[int]] = {}
    for rank in sorted(range(len(states)), key=lambda rank: (rank not in late, rank)):
        groups.setdefault((rank in late, _doing(states[rank], rank in silent)), []).append(rank)
    others = [ranks for (is_late, _), ranks in groups.items() if not is_late]
    parts = []
    for (is_late, doing), ranks in list(groups.items())[:GROUPS]:
        rest = not is_late and bool(late) and len(others) == 1 and len(ranks) > 1
        who = "the others" if rest else named(ranks)
        if ranks[0] in silent:
            seconds = max((silent[rank] or 0.0 for rank in ranks), default=0.0)
            since = f" since {seconds:.0f} s" if seconds else ""
        else:
            since = f" since {max(states[rank]['still'] for rank in ranks):.0f} s" if not is_late or not others else ""
        parts.append(f"{who} {_of_several(doing) if len(ranks) > 1 else doing}{since}")
    if len(groups) > GROUPS:
        parts.append(f"and {len(groups) - GROUPS} more such groups")
    text = ", ".join(parts)
    return text if late or len(groups) == 1 else f"{text}: each waits for the others, as they do not call the same"


def _doing(state: State, silent: bool) -> str:
    return NEVER if silent else str(state["doing"])


def _of_several(doing: str) -> str:
    verb, _, rest = doing.partition(" ")
    return f"{ {'is': 'are', 'waits': 'wait', 'has': 'have'}.get(verb, verb) } {rest}"


def named(ranks: Sequence[int]) -> str:
    """Return "rank 1", or "ranks 0-3 and 7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    pieces = [f"{run[0]}-{run[-1]}" if len(run) > 2 else piece for run in runs for piece in _each(run)]
    text = pieces[0] if len(pieces) == 1 else f"{', '.join(pieces[:-1])} and {pieces[-1]}"
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _each(run: list[int]) -> list[str]:
    return [""] if len(run) > 2 else [str(rank) for rank in run]
