"""When to save and what to keep: two kinds of pure functions over plain values, to be put together at will.

    when = any_of(every_n_steps(1000), every_seconds(600))
    keep = keep_any(keep_best(3, "min"), keep_last(1), keep_every_n_steps(10_000))

`when` answers whether something is saved at a moment; `keep` answers which of the saved ones stay. Neither reads a
clock, a metric or a directory, so what a run will do can be worked out, and tested, without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

Event = Literal["batch", "validation", "epoch"]


class Moment(NamedTuple):
    """A moment at which a run could save."""

    event: Event
    """What has just ended: a training batch, a validation, or an epoch with its validation."""
    epoch: int
    """The running epoch, from 0."""
    step: int
    """Updates done."""
    seconds: float
    """Since something was saved for the time, or since training began."""


class Saved(NamedTuple):
    """A checkpoint that is kept, or asks to be."""

    path: str
    score: float | None = None
    """Its metric, None when none is watched."""
    step: int = 0
    """Updates done."""
    finite: bool = True
    """Whether its weights are numbers, without NaN and infinity."""
    best: bool = True
    """Whether it is among the best, or asks to be; what is not may be kept for another reason."""


class Plan(NamedTuple):
    """What a new checkpoint leads to."""

    kept: tuple[Saved, ...]
    """What there will be, in the order in which it was saved."""
    write: bool
    """Whether the new one is among them."""
    remove: tuple[Saved, ...]
    """What goes, once the new one is written."""


When = Callable[[Moment], bool]
Keep = Callable[[Sequence[Saved]], Sequence[Saved]]


# ---------------------------------------------------------------------- when to save
def never(moment: Moment) -> bool:
    """Never save."""
    return False


def after(event: Event) -> When:
    """Save at the end of each batch, validation or epoch; put a rhythm beside it with `all_of`."""
    return partial(_after, event)


def every_n_steps(n: int) -> When:
    """Save after every n-th update; 0 is never."""
    return partial(_every_n_steps, n)


def every_n_epochs(n: int) -> When:
    """Save in every n-th epoch; 0 is never."""
    return partial(_every_n_epochs, n)


def every_seconds(seconds: float) -> When:
    """Save after the first batch that ends that long after the last save."""
    return partial(_every_seconds, seconds)


def any_of(*policies: When) -> When:
    """Save when one of the policies says so."""
    return partial(_any_of, policies)


def all_of(*policies: When) -> When:
    """Save when all policies say so."""
    return partial(_all_of, policies)


def _after(event: Event, moment: Moment) -> bool:  # functions of this module can be pickled, those inside others not
    return moment.event == event


def _every_n_steps(n: int, moment: Moment) -> bool:
    return n > 0 and moment.event == "batch" and moment.step > 0 and moment.step % n == 0


def _every_n_epochs(n: int, moment: Moment) -> bool:
    return n > 0 and (moment.epoch + 1) % n == 0


def _every_seconds(seconds: float, moment: Moment) -> bool:
    return moment.event == "batch" and moment.seconds >= seconds


def _any_of(policies: tuple[When, ...], moment: Moment) -> bool:
    return any(policy(moment) for policy in policies)


def _all_of(policies: tuple[When, ...], moment: Moment) -> bool:
    return all(policy(moment) for policy in policies)


# ---------------------------------------------------------------------- what to keep
def keep_all(saved: Sequence[Saved]) -> Sequence[Saved]:
    """Keep everything."""
    return saved


def keep_last(k: int) -> Keep:
    """Keep the k newest."""
    return partial(_last, k)


def keep_best(k: int, mode: str) -> Keep:
    """Keep the k best scores, and anything before a score or weights that are not finite.

    A new one has to be better than the worst, and of equal ones the earliest goes first.
    """
    return partial(_best, k, mode)


def keep_every_n_steps(n: int) -> Keep:
    """Keep the first one at or after each multiple of n updates; 0 keeps none."""
    return partial(_every, n)


def keep_any(*policies: Keep) -> Keep:
    """Keep what one of the policies keeps."""
    return partial(_any, policies)


def _last(k: int, saved: Sequence[Saved]) -> Sequence[Saved]:
    return saved[max(0, len(saved) - k) :]


def _best(k: int, mode: str, saved: Sequence[Saved]) -> Sequence[Saved]:
    new = len(saved) - 1
    ranked = sorted(range(len(saved)), key=lambda index: (*order(saved[index], mode), index == new, -index))
    return [saved[index] for index in sorted(ranked[:k])]


def _every(n: int, saved: Sequence[Saved]) -> Sequence[Saved]:
    kept: list[Saved] = []
    for one in saved:
        if n > 0 and one.step // n > (kept[-1].step // n if kept else 0):
            kept.append(one)
    return kept


def _any(policies: tuple[Keep, ...], saved: Sequence[Saved]) -> Sequence[Saved]:
    wanted = {one.path for policy in policies for one in policy(saved)}
    return [one for one in saved if one.path in wanted]


def rank(score: float | None, mode: str) -> float:
    """Order scores from the best, the smallest rank, to NaN and infinity, the worst whichever way is better."""
    if score is None or not math.isfinite(score):
        return math.inf
    return score if mode == "min" else -score


def order(one: Saved, mode: str) -> tuple[bool, float]:
    """Order checkpoints from the best, the smallest, to those whose weights are of no use."""
    return not one.finite, rank(one.score, mode)


def plan(saved: Sequence[Saved], new: Saved, best: Keep, also: Keep | None = None) -> Plan:
    """Work out what a new checkpoint leads to.

    Whatever the policies say, the newest one whose weights are finite stays until there is another, and one that is
    there already stays until another one is.

    Args:
        saved: what is there, in the order in which it was saved.
        new: what could be written.
        best: which of those that are among the best, and of the new one if it asks to be, stay there.
        also: which of all stay, among the best or not.
    """
    candidates = [*saved, new]
    top = {one.path for one in best([one for one in candidates if one.best])}
    wanted = top if also is None else top | {one.path for one in also(candidates)}
    if not any(one.finite for one in candidates if one.path in wanted):
        wanted |= {one.path for one in [one for one in saved if one.finite][-1:]}
    wanted |= {saved[-1].path} if saved and not wanted else set()
    kept = tuple(one._replace(best=one.path in top) for one in candidates if one.path in wanted)
    return Plan(kept, new.path in wanted, tuple(one for one in saved if one.path not in wanted))
