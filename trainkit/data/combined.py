"""CombinedLoader: several loaders as one, in four modes; and Combination, the same inside a run.

mode               ends with              a shorter loader
----               ---------              ----------------
min_size           the shortest           ends it
max_size           the longest            gives None from there on
max_size_cycle     the longest            begins again
sequential         the last               is followed by the next one
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Self

from trainkit.data.loader import EMPTY, Batches, Loader
from trainkit.data.samplers import length_of
from trainkit.errors import CheckpointError
from trainkit.tree import children, leaves, with_leaves

Mode = Literal["min_size", "max_size_cycle", "max_size", "sequential"]
MODES: tuple[Mode, ...] = ("min_size", "max_size_cycle", "max_size", "sequential")
Item = tuple[Any, int, int]


class CombinedLoader:
    """Draw from several iterables at once, or from one after the other.

    Iterating gives `(batch, batch_idx, dataloader_idx)`. In the mode "sequential" a batch is one iterable's own; in
    the others it has the structure of `iterables` with a batch of each, and `dataloader_idx` is 0.

    Args:
        iterables: DataLoaders or other iterables, in lists, tuples and dicts nested as you like.
        mode: "min_size" ends with the shortest iterable; "max_size" with the longest, and those that are over give
            None; "max_size_cycle" with the longest too, and those that are over begin again; "sequential" takes one
            after the other and opens each when its turn comes.

    Raises:
        ValueError: there is no such mode.

    Example:
        >>> list(CombinedLoader({"a": "xyz", "b": range(2)}, "max_size_cycle"))
        [({'a': 'x', 'b': 0}, 0, 0), ({'a': 'y', 'b': 1}, 1, 0), ({'a': 'z', 'b': 0}, 2, 0)]
        >>> list(CombinedLoader(["xyz", range(2)], "sequential"))
        [('x', 0, 0), ('y', 1, 0), ('z', 2, 0), (0, 0, 1), (1, 1, 1)]
    """

    def __init__(self, iterables: Any, mode: Mode = "min_size") -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}. Received: {mode!r}.")
        self.mode: Mode = mode
        self._iterables = self._structure = iterables  # whatever comes into its places, what was given is the structure
        self._flattened = flattened(iterables)
        self._limits: list[int | float] | None = None
        self._iterator: Iterator[Item] | None = None

    @property
    def iterables(self) -> Any:
        """The iterables as they were given."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The iterables in one flat list. Setting it puts others in their places."""
        return self._flattened

    @flattened.setter
    def flattened(self, iterables: list[Any]) -> None:
        self._check_count("flattened", iterables)
        self._iterables = refilled(self._structure, iterables)
        self._flattened = iterables

    @property
    def sampler(self) -> Any:
        """The samplers of the iterables, in their structure; None for one without."""
        return self._each("sampler")

    @property
    def batch_sampler(self) -> Any:
        """The batch samplers of the iterables, in their structure; None for one without."""
        return self._each("batch_sampler")

    def _each(self, name: str) -> Any:
        return refilled(self._structure, [getattr(iterable, name, None) for iterable in self._flattened])

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches of each iterable count, None for all.

        They make `len` smaller; iterating stops at them in the mode "sequential" only, elsewhere whoever iterates
        does. One number is for each of the iterables. A Trainer has limits of its own (`limit_train_batches`).
        """
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        elif limits is not None:
            self._check_count("limits", limits)
        self._limits = limits

    def _check_count(self, what: str, given: Sequence[Any]) -> None:
        if len(given) != len(self._flattened):
            raise ValueError(
                f"{what} must have one entry for each of the {len(self._flattened)} iterables. "
                f"Received: {len(given)} entries."
            )

    def __iter__(self) -> Self:
        if self.mode == "sequential":
            self._iterator = self._one_after_the_other()
        else:
            opened = [iter(iterable) for iterable in self._flattened]
            rounds = combine(self.mode, opened, lambda index, _: iter(self._flattened[index]))
            self._iterator = (
                (refilled(self._structure, batches), batch_idx, 0) for batch_idx, batches in enumerate(rounds)
            )
        return self

    def _one_after_the_other(self) -> Iterator[Item]:
        limits = self._limits if self._limits is not None else [None] * len(self._flattened)
        for dataloader_idx, (iterable, limit) in enumerate(zip(self._flattened, limits, strict=True)):
            if limit is None or limit > 0:  # one that is left out is not opened
                for batch_idx, batch in enumerate(iterable):
                    yield batch, batch_idx, dataloader_idx
                    if limit is not None and batch_idx + 1 >= limit:
                        break

    def __next__(self) -> Item:
        if self._iterator is None:
            raise RuntimeError("a CombinedLoader has no next batch before iter(combined_loader).")
        return next(self._iterator)

    def __len__(self) -> int:
        if self._iterator is None:
            raise RuntimeError("the length of a CombinedLoader is known after iter(combined_loader).")
        lengths = [length_of(iterable) for iterable in self._flattened]
        if self._limits is not None:
            lengths = list(map(min, lengths, self._limits))
        total = sum(lengths) if self.mode == "sequential" else overall(self.mode, lengths)
        if not isinstance(total, int):
            raise TypeError(f"the CombinedLoader has no length: with {self.mode!r} it ends with an iterable without.")
        return total

    def reset(self) -> None:
        """Forget the position, and stop the workers of DataLoaders."""
        self._iterator = None
        for iterable in self._flattened:
            running = getattr(iterable, "_iterator", None)
            if running is not None:
                getattr(running, "_shutdown_workers", lambda: None)()
                iterable._iterator = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_iterator": None}  # a position can't be pickled


class Combination(Batches):
    """The loaders of a run drawn from at once: a batch has their structure, from any batch of an epoch on.

    Args:
        loaders: in the order in which they lie in `structure`.
        structure: what the user gave.
        mode: any but "sequential".
        name: how messages call it.
    """

    def __init__(self, loaders: list[Loader], structure: Any, mode: Mode, name: str) -> None:
        super().__init__(name)
        self.loaders, self.structure, self.mode = loaders, structure, mode
        self.read_once = any(loader.read_once for loader in loaders)
        self.count()
        self.looks_ahead = min(loader.looks_ahead for loader in loaders)
        self.sliced = any(loader.sliced for loader in loaders)
        """Whether this process takes its part of batches that all processes share, of some loader."""
        self.even = True
        """Whether it gives as many batches as in other processes, `EMPTY` where it has no sample."""
        self._laps = [(0, 0)] * len(loaders)  # which lap each is in, and the batch of the epoch that began it

    def count(self) -> None:
        """Work out how many batches there are."""
        self.claimed = overall(self.mode, [loader.claimed for loader in self.loaders])
        self.num_batches = overall(self.mode, [loader.num_batches for loader in self.loaders])

    @property
    def parts(self) -> list[Loader]:
        """The loaders."""
        return self.loaders

    def taken(self, epoch: int) -> int | float:
        """Return at which batch this process's epoch ends."""
        taken = self.num_batches
        if not self.even and self.sliced:
            while 0 < taken < math.inf and self._has_nothing(epoch, int(taken) - 1):
                taken -= 1
        return taken

    def taken_by_all(self, epoch: int) -> int | float:
        """Return at which batch the epoch of the last process ends."""
        return self.num_batches

    def stand_in(self, epoch: int, batch_idx: int) -> Any:
        """Return what another process has of a batch that this one has no sample of."""
        places = zip(self.loaders, self.places(batch_idx), strict=True)
        return refilled(
            self.structure,
            [
                None if place is None
                else one.stand_in(epoch, *place) if one.empty(epoch, *place)
                else one.batch_at(epoch, *place)
                for one, place in places
            ],
        )  # fmt: skip

    def _has_nothing(self, epoch: int, batch_idx: int) -> bool:
        there = [(one, place) for one, place in zip(self.loaders, self.places(batch_idx), strict=True) if place]
        return all(loader.empty(epoch, *place) for loader, place in there)

    def lacking(self, epoch: int, batch_idx: int) -> bool:
        """Whether some process has no sample of a batch, of no loader."""
        there = [(one, place) for one, place in zip(self.loaders, self.places(batch_idx), strict=True) if place]
        return self.sliced and all(loader.lacking(epoch, *place) for loader, place in there)

    def share(self, epoch: int, batch_idx: int) -> float:
        """Return the mean of the loaders' shares of a batch, which is exact where all of them have as many samples."""
        if not self.sliced:
            return 1.0
        places = zip(self.loaders, self.places(batch_idx), strict=True)
        shares = [loader.share(epoch, *place) for loader, place in places if place]
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def promised(self) -> float:
        """How many batches an epoch that begins now gives for sure."""
        return overall(self.mode, [loader.promised for loader in self.loaders]) if self._all_promise() else 0

    def _all_promise(self) -> bool:
        return all(loader.promised for loader in self.loaders)

    def open(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of an epoch."""
        if start == 0:
            self._laps = [(0, 0)] * len(self.loaders)

        def again(index: int, batch_idx: int) -> Iterator[Any]:
            lap = self._laps[index][0] + 1
            self._laps[index] = lap, batch_idx
            return self.loaders[index].open(epoch, 0, lap)

        laps = list(zip(self.loaders, self._laps, strict=True))
        opened = [loader.open(epoch, start - begun, lap) for loader, (lap, begun) in laps]
        rounds = combine(self.mode, opened, again, start, {index for index, (_, (lap, _)) in enumerate(laps) if lap})
        if self.sliced:
            rounds = map(partial(self._without_gaps, epoch), itertools.count(start), rounds)
        return map(self._together, rounds)

    def _together(self, batches: Any) -> Any:
        return EMPTY if batches is EMPTY else refilled(self.structure, batches)

    def _without_gaps(self, epoch: int, batch_idx: int, batches: list[Any]) -> Any:
        """Return a round that a step can work with: beside samples of other loaders there is one in each place.

        Where this process has no sample of one loader's last batch it gets one of another process, or None with
        "max_size", where loaders that are over give that.
        """
        if not any(batch is EMPTY for batch in batches):
            return batches
        places = self.places(batch_idx)
        if all(batch is EMPTY for batch, place in zip(batches, places, strict=True) if place):
            return EMPTY
        return [
            batch if batch is not EMPTY or place is None
            else None if self.mode == "max_size"
            else loader.stand_in(epoch, *place)
            for loader, batch, place in zip(self.loaders, batches, places, strict=True)
        ]  # fmt: skip

    def samples_of(self, epoch: int, batch_idx: int) -> list[Any] | None:
        """Return the indices of the samples in a batch, a list for each loader; None for one that is over."""
        return [
            None if place is None else loader.samples_of(epoch, *place)
            for loader, place in zip(self.loaders, self.places(batch_idx), strict=True)
        ]

    def batch_at(self, epoch: int, batch_idx: int) -> Any:
        """Return one batch of an epoch, with the samples and the random numbers that it has in the run."""
        if batch_idx >= self.claimed:
            return super().batch_at(epoch, batch_idx)
        batches = [
            None if place is None else loader.batch_at(epoch, *place)
            for loader, place in zip(self.loaders, self.places(batch_idx), strict=True)
        ]
        return self._together(self._without_gaps(epoch, batch_idx, batches))

    def places(self, batch_idx: int) -> list[tuple[int, int] | None]:
        """Return which batch of its data each loader gives to a batch, and in which lap; None for one that is over."""
        return [self._place(loader, batch_idx) for loader in self.loaders]

    def _place(self, loader: Loader, batch_idx: int) -> tuple[int, int] | None:
        """Return which batch of a loader's data is in a batch, and in which lap; None when the loader is over."""
        if loader.claimed in (0, math.inf) or batch_idx < loader.claimed:
            return batch_idx, 0
        lap, rest = divmod(batch_idx, int(loader.claimed))
        return (rest, lap) if self.mode == "max_size_cycle" else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each loader, and which lap it is in."""
        return {
            "loaders": [loader.state_dict() for loader in self.loaders],
            "laps": [list(lap) for lap in self._laps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        saved = state.get("loaders", [state])
        if len(saved) != len(self.loaders):
            raise CheckpointError(f"the checkpoint has {len(saved)} loaders, {self.name} has {len(self.loaders)}.")
        for loader, loader_state in zip(self.loaders, saved, strict=True):
            loader.load_state_dict(loader_state)
        self._laps = [(lap, begun) for lap, begun in state.get("laps", [(0, 0)])]


def combine(
    mode: Mode,
    opened: list[Iterator[Any]],
    again: Callable[[int, int], Iterator[Any]],
    start: int = 0,
    over: set[int] | None = None,
) -> Iterator[list[Any]]:
    """Yield lists of one batch from each iterator.

    Args:
        mode: when that ends, and what a shorter iterator gives.
        opened: the iterators.
        again: called with (index of an iterator, index of the batch) to begin one again.
        start: the index of the first batch.
        over: which of the iterators have been begun again before.
    """
    if mode == "max_size_cycle":
        return _cycle(opened, again, start, over if over is not None else set())
    return _side_by_side(opened, longest=mode == "max_size")


def _side_by_side(opened: list[Iterator[Any]], longest: bool) -> Iterator[list[Any]]:
    """Yield what zip does, or zip_longest, and hold on to nothing of it."""
    end, ended = object(), 0
    while opened:
        batches = []
        for index, iterator in enumerate(opened):
            batch = next(iterator, end)
            if batch is end:
                ended, opened[index] = ended + 1, itertools.repeat(None)
                if not longest or ended == len(opened):
                    return
                batch = None
            batches.append(batch)
        yield batches
        del batches, batch


def _cycle(
    opened: list[Iterator[Any]], again: Callable[[int, int], Iterator[Any]], start: int, over: set[int]
) -> Iterator[list[Any]]:
    end = object()
    for batch_idx in itertools.count(start):
        batches = []
        for index, iterator in enumerate(opened):
            batch = next(iterator, end)
            if batch is end:
                over.add(index)
                if len(over) == len(opened):
                    return
                opened[index] = again(index, batch_idx)
                batch = next(opened[index], end)
                if batch is end:  # a generator, which can be read once only
                    return
            batches.append(batch)
        yield batches
        del batches, batch


def overall(mode: Mode, lengths: Sequence[int | float]) -> int | float:
    """Return how many batches several loaders give together."""
    return min(lengths) if mode == "min_size" else max(lengths)


def flattened(iterables: Any) -> list[Any]:
    """Return the iterables that nested containers hold; a list of plain numbers or strings is itself one."""
    return leaves(iterables, _is_iterable)


def refilled(iterables: Any, values: Sequence[Any]) -> Any:
    """Return containers as these, holding other things."""
    return with_leaves(iterables, _is_iterable, values)


def _is_iterable(node: Any) -> bool:
    held = children(node)
    return held is None or all(isinstance(child, (int, float, str)) for child in held)
