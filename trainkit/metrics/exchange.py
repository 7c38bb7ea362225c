"""What several processes have logged becomes one value, at points that all of them reach.

keys     a fingerprint of what is logged is compared; what differs is an error on all processes, which names both sides
values   the running sums and extremes of all names travel at once (reduction.py)
objects  the states of metric objects do (gathered.py)

Nothing of it happens while a value is read, nor for each batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trainkit.errors import MisconfigurationException
from trainkit.metrics.gathered import computed_alone, computed_from, on_host, own_states, updated
from trainkit.metrics.options import BATCH_HOOKS, Options
from trainkit.metrics.reduction import Share, packed, unpacked
from trainkit.metrics.shared import SharedMetric, SharedObject

if TYPE_CHECKING:
    from trainkit.strategies.base import Strategy

NOTHING = -(2**62)
LOOK_EVERY = 50
"""After how many accumulation windows a log point asks whether somebody logs with sync_dist=True by now."""


class Entry(NamedTuple):
    """What all processes must have alike of one name, and below it what one without a batch takes from the others."""

    name: str
    hook: str
    suffix: str
    loader: int | None
    reduce: str
    on_step: bool
    on_epoch: bool
    synced: bool
    attribute: str | None
    """Where in the module the metric object is; None: numbers are logged."""
    computed: bool
    """Whether that has computed since it was logged last."""

    prog_bar: bool
    logger: bool
    dtype: torch.dtype | None

    @property
    def compared(self) -> tuple[Any, ...]:
        """What is to be the same everywhere."""
        return self[: self._fields.index("prog_bar")]

    def __str__(self) -> str:
        return self.name + self.suffix


class Heard(NamedTuple):
    """What the processes agreed on."""

    entries: list[Entry]
    with_all: list[int]
    """The processes that logged all of it; the others were given no batch."""


class Exchange:
    """The processes of a run, and what they tell each other of what they logged.

    Args:
        strategy: how they reach each other.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._somebody_syncs = False
        self._looked: int | None = None  # the accumulation window of the last exchange at a log point

    # ---- the points
    def on_epoch(
        self, where: str, metrics: Sequence[SharedMetric | SharedObject], empty: bool, make: Callable[[Entry], Any]
    ) -> list[SharedMetric | SharedObject]:
        """Let the reductions be those of all processes; return what all of them logged, in its order.

        Args:
            where: the point, for messages.
            metrics: what this process has logged, in order.
            empty: it was given no batch, so that it has nothing of what others log for each.
            make: makes the name that others have logged.

        Raises:
            MisconfigurationException: the processes logged different things.
            RuntimeError: another one does not come.
        """
        by_key = {entry.compared: metric for metric in metrics for entry in (entry_of(metric),)}
        heard = self._keys(where, [entry_of(metric) for metric in metrics], empty)
        agreed = [by_key.get(entry.compared) or make(entry) for entry in heard.entries]
        numbers = [metric for metric in agreed if isinstance(metric, SharedMetric)]
        for metric, found in zip(numbers, self._values(where, [m.epoch_share() for m in numbers]), strict=True):
            metric.take_epoch(*found)
        for entry, one in zip(heard.entries, agreed, strict=True):
            if isinstance(one, SharedObject) and not entry.computed:
                one.take_epoch(self._computed(one, heard.with_all))
        return agreed

    def on_step(self, metrics: Sequence[SharedMetric], window: int, now: bool = False) -> None:
        """Let the last values logged with sync_dist=True be those of all processes.

        As long as nobody logs any, nothing is exchanged for a while.

        Args:
            metrics: what this process has logged, in order.
            window: how many accumulation windows are over.
            now: somebody decides by it, so that nothing is put off.

        Raises:
            MisconfigurationException, RuntimeError: as `on_epoch`.
        """
        due = self._looked is None or window - self._looked >= LOOK_EVERY
        if not (self._somebody_syncs or due or now):
            return
        where, self._looked = "a log point", window
        self._keys(where, [entry_of(metric) for metric in metrics], empty=False)
        self._somebody_syncs = bool(metrics)
        for metric, found in zip(metrics, self._values(where, [m.step_share() for m in metrics]), strict=True):
            metric.take_step(*found)

    # ---- keys
    def _keys(self, where: str, entries: list[Entry], empty: bool) -> Heard:
        """Return what all processes have logged, which must be the same; who was given no batch may lack what is."""
        of_batches = [entry for entry in entries if entry.hook in BATCH_HOOKS]
        others = [entry for entry in entries if entry.hook not in BATCH_HOOKS]
        lacks = empty and not of_batches
        said = (*_span(where, others), *((NOTHING, NOTHING) if lacks else _span(where, of_batches)), int(lacks))
        heard = self._reduced(where, torch.tensor(said, dtype=torch.int64, device=self.strategy.device), "max")
        low, high, low_of_batches, high_of_batches, somebody_lacks = (int(value) for value in heard)
        alike = low + high == 0 and (low_of_batches + high_of_batches == 0 or low_of_batches == NOTHING)
        if alike and not somebody_lacks:
            return Heard(entries, list(range(self.strategy.world_size)))
        everyone = self._told(where, (where, entries, lacks))
        if not alike:
            raise MisconfigurationException(difference(everyone))
        with_all = [rank for rank, (_, _, lacking) in enumerate(everyone) if not lacking]
        return Heard(everyone[with_all[0]][1] if with_all else entries, with_all)

    # ---- values
    def _values(self, where: str, shares: Sequence[Share]) -> list[tuple[float, float]]:
        if not shares:
            return []
        if not self._leads:  # what it computes, another process computes as well
            shares = [Share(share.reduce, None, 0) for share in shares]
        device = self.strategy.device
        adding, extremes = packed(shares, torch.float32 if device.type == "mps" else torch.float64, device)
        added = self._reduced(where, adding, "sum")
        maxima = self._reduced(where, extremes, "max") if extremes.numel() else []
        return unpacked([share.reduce for share in shares], added, maxima)

    def _computed(self, metric: SharedObject, with_all: list[int]) -> Any:
        """Return what an object computes of all processes' updates; where there was none it may not be able to."""
        mine, rank, where = own_states(metric.metric), self.strategy.global_rank, f"the computing of {metric.name!r}"
        if mine is not None:
            everyone = self._told(where, mine if self._leads else None)
            with_all = [rank for rank, states in enumerate(everyone) if updated(states)]
            if not with_all:
                return computed_alone(metric.metric)
            able, complete = updated(mine), len(with_all) == sum(self._leaders)
            value = computed_from(metric.metric, [everyone[other] for other in with_all]) if able else None
        else:  # it finds the other processes itself, if it wants them
            able, complete = rank in with_all, len(with_all) == self.strategy.world_size
            value = metric.metric.compute() if able else None
        if complete:
            return value
        sent = self._waiting(where, lambda: self.strategy.broadcast(on_host(value), with_all[0]))
        return value if able else sent

    # ---- the processes
    @property
    def part(self) -> int:
        """Which part of the data this process has."""
        return self.strategy.shard[0]

    @cached_property
    def _leaders(self) -> list[bool]:
        """Whether each process is the first of those that share its part of the data, and so compute the same."""
        part, parts = self.strategy.shard
        if parts == self.strategy.world_size:
            return [True] * parts
        every_part = self._told("the metrics were set up", part)
        return [part not in every_part[:rank] for rank, part in enumerate(every_part)]

    @property
    def _leads(self) -> bool:
        return self._leaders[self.strategy.global_rank]

    def _reduced(self, where: str, tensor: Tensor, op: str) -> list[float]:
        found: list[float] = self._waiting(where, lambda: self.strategy.all_reduce(tensor, op).tolist())
        return found

    def _told(self, where: str, value: Any) -> list[Any]:
        everyone: list[Any] = self._waiting(where, lambda: self.strategy.gather_objects(value))
        return everyone

    def _waiting(self, where: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.strategy.global_rank} of {self.strategy.world_size} waited at {where} for the others, "
                "to bring together what was logged, and they did not come: another process failed, ended, or does "
                f"something else, for example because only some call trainer.validate or leave a loop. ({error})"
            ) from error


def entry_of(metric: Any) -> Entry:
    """Return what the processes compare of a name."""
    return Entry(
        metric.name, metric.hook, metric.suffix, metric.loader, metric.reduce, metric.on_step, metric.on_epoch,
        getattr(metric, "synced", False), getattr(metric, "attribute", None),
        getattr(metric, "_computed", None) is not None, metric.prog_bar, metric.logger,
        metric.kind_of_value() if isinstance(metric, SharedMetric) else None,
    )  # fmt: skip


def of_others(entry: Entry, found: Any = None) -> SharedMetric | SharedObject:
    """Return a name as other processes have it, for one that was given no batch to log it for.

    Args:
        entry: the name.
        found: the metric object that belongs to it.
    """
    about = (entry.name, entry.hook, entry.suffix, entry.loader)
    metric = SharedMetric(*about) if entry.attribute is None else SharedObject(*about, found, entry.attribute)
    by = (entry.prog_bar, entry.logger, entry.on_step, entry.on_epoch)
    metric.configure(Options(*by, entry.reduce, False, bool(entry.suffix), entry.attribute, False, entry.synced))
    metric.options = None  # they come with its own first call
    if isinstance(metric, SharedMetric):
        metric.dtype = entry.dtype
    return metric


def difference(everyone: Sequence[tuple[str, list[Entry], bool]]) -> str:
    """Say who logged what where it is not the same; each is the point that a process is at, what it logged and whether
    it was given no batch.
    """
    if len({where for where, _, _ in everyone}) > 1:
        sides = _sides([f"is at {where}" for where, _, _ in everyone])
        return f"the processes are at different points: {sides}. Each of them must get to all of these points."
    names = [[str(entry) for entry in entries] for _, entries, _ in everyone]
    alike = all(listed == names[0] for listed in names)
    told = [[_in_full(entry) for entry in entries] for _, entries, _ in everyone] if alike else names
    of_batches = {str(entry) for _, entries, _ in everyone for entry in entries if entry.hook in BATCH_HOOKS}
    sets: list[set[str]] = [
        {*listed, *(of_batches if lacks else ())} for listed, (_, _, lacks) in zip(names, everyone, strict=True)
    ]
    some = {name for name in set().union(*sets) if not all(name in listed for listed in sets)}
    what = f"only some logged {sorted(some)}" if some else "with other options" if alike else "in another order"
    return (
        f"the processes logged different things until {everyone[0][0]}: "
        f"{_sides([f'logged {listed}' for listed in told])} ({what}). What is logged by epoch or with sync_dist=True "
        "is of all processes: call self.log on each of them with the same names in the same order, or on the first "
        "alone with rank_zero_only=True."
    )


def _in_full(entry: Entry) -> str:
    by = " and ".join(kind for kind, given in (("step", entry.on_step), ("epoch", entry.on_epoch)) if given)
    return f"{entry} ({entry.reduce} by {by} in {entry.hook}{', sync_dist' if entry.synced else ''})"


def _sides(said: Sequence[str], most: int = 4) -> str:
    """Return who says what, those who say the same together: "rank 0 ..., ranks 1, 2 ..."."""
    ranks: dict[str, list[str]] = {}
    for rank, words in enumerate(said):
        ranks.setdefault(words, []).append(str(rank))
    sides = [
        f"rank{'s' * (len(who) > 1)} {', '.join(who[:8])}{', ...' * (len(who) > 8)} {words}"
        for words, who in ranks.items()
    ]
    return ", ".join(sides[:most]) + (f" and {len(sides) - most} more" if len(sides) > most else "")


def _span(where: str, entries: list[Entry]) -> tuple[int, int]:
    """Return a fingerprint and its negative: the maxima of both over all processes add up to 0 if it is one."""
    text = repr((where, [entry.compared for entry in entries]))
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
    return number, -number
