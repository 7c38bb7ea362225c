"""What has a position of its own: saved as it was before the batch that a run is at, and told where it is not exact."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from trainkit.data.samplers import sampler_of
from trainkit.errors import warn
from trainkit.random import numpy_random

_told: set[type] = set()


def has_state(thing: Any) -> bool:
    """Whether something can give its state and take it back."""
    return all(callable(getattr(thing, f"{verb}state_dict", None)) for verb in ("", "load_"))


class Remembered:
    """The state of something that batches are drawn from, a step behind what was drawn.

    Args:
        thing: has `state_dict` and `load_state_dict`: a loader, or the data set of one without workers.
    """

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self._state: Any = None  # before the batch that it gave last
        self._finished: Any = None  # and at the end of its data
        self._over = False
        self._restored = False

    def open(self, begin: Callable[[bool], Iterator[Any]], start: int, inside: bool, claimed: float) -> Iterator[Any]:
        """Return an iterator; what was restored goes on where its state says.

        Args:
            begin: makes the iterator; it is told whether the state already stands at batch `start`.
            start: the index of the first batch.
            inside: whether that is inside of what is gone through, and not its beginning.
            claimed: how many batches there are.
        """
        if self._restored and self._over and inside:  # beside longer loaders
            return iter(())
        state = self._state if inside else self._finished  # at the beginning: where the epoch before ended
        restored = self._restored and state is not None
        if restored:
            self.thing.load_state_dict(copy.deepcopy(state))
        self._restored, self._over, self._finished = False, False, None
        return self._remembered(begin(restored), start, claimed)

    def _remembered(self, batches: Iterator[Any], given: int, claimed: float) -> Iterator[Any]:
        """Remember the state before each batch, because the run is one behind what it has looked at.

        The source is read to its end as a for loop would, so that it knows that its data are over.
        """
        while True:
            state = copy.deepcopy(self.thing.state_dict())
            batch = next(batches, batches)
            given += 1
            if batch is batches or (given == claimed and next(batches, batches) is batches):
                self._finished = copy.deepcopy(self.thing.state_dict())
            self._state, self._over = state, batch is batches
            if self._over:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"state": self._state, "finished": self._finished, "over": self._over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._state, self._finished, self._over = state["state"], state["finished"], state["over"]
        self._restored = True


class Begun:
    """The state of a sampler when an epoch began: from there it gives the same again, for any number of workers.

    Args:
        sampler: of indices, or of batches.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self._begun: Any = None
        self._restored: dict[str, Any] | None = None

    def begin(self, inside: bool) -> None:
        """Begin an epoch, or go on inside one."""
        if self._restored is not None:
            state = self._restored["begun" if inside else "now"]
            self._restored = None
            if state is not None:
                self.sampler.load_state_dict(copy.deepcopy(state))
        self._begun = copy.deepcopy(self.sampler.state_dict())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let somebody go through the running epoch from its beginning, and the sampler stand where it was after."""
        now = copy.deepcopy(self.sampler.state_dict())
        if self._begun is not None:
            self.sampler.load_state_dict(copy.deepcopy(self._begun))
        try:
            yield
        finally:
            self.sampler.load_state_dict(now)

    def to_its_end(self, batches: Iterator[Any], given: int, claimed: float) -> Iterator[Any]:
        """Read an epoch to its end as a for loop would, so that the sampler knows that it is over."""
        for batch in batches:
            given += 1
            if given == claimed:
                next(batches, None)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state at the running epoch's beginning, and the one now, with which the next epoch begins."""
        return {"begun": self._begun, "now": copy.deepcopy(self.sampler.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._restored = state


def stateful_sampler(loader: DataLoader[Any]) -> Any:
    """Return the sampler or batch sampler of a DataLoader that has a state, None where neither has."""
    batches, sampler = loader.batch_sampler, sampler_of(loader)
    own = [batches] * (type(batches) is not BatchSampler) + [sampler]
    return next((one for one in own if has_state(one)), None)


def tell_of_order(name: str, loader: DataLoader[Any]) -> None:
    """Warn that a resumed run may see another order: the user's own sampler decides it, and nothing is known of it."""
    batches, sampler = loader.batch_sampler, sampler_of(loader)
    decides = sampler if type(batches) in (BatchSampler, type(None)) else batches
    plain = type(decides).__module__.startswith("torch.utils.data") or isinstance(decides, (list, tuple, range))
    if plain or hasattr(decides, "set_epoch") or has_state(decides):
        return
    warn(
        f"the order of {name} after this resume may not be what it would have been: {type(decides).__name__} decides "
        "it, which has neither state_dict and load_state_dict nor set_epoch. It is the same if the sampler draws from "
        "torch's, numpy's or python's default random functions alone, and keeps no generator or counter; if it does, "
        "give it state_dict and load_state_dict."
    )


def tell_of_draws(name: str, dataset: Any, workers: int, saved: bool) -> None:
    """Warn, once for a kind of data set, that a resumed run may draw other random numbers."""
    kind = type(dataset)
    if kind in _told or saved or isinstance(dataset, IterableDataset):  # a stream is told of when it is read again
        return
    where = own_generator(dataset)
    if has_state(dataset) and workers:
        what = f"{kind.__name__} has a state_dict, but its state lies in worker processes, where it is not saved"
        remedy = "use num_workers=0, or torchdata's StatefulDataLoader"
    elif where is not None:
        what = f"{kind.__name__} has a random generator of its own ({where}), whose state is not saved"
        remedy = (
            "draw from torch's, numpy's or python's default random functions, which are seeded for each sample; or "
            "give the data set state_dict and load_state_dict, and its DataLoader num_workers=0"
        )
    else:
        return
    _told.add(kind)
    warn(f"what {name} gives after this resume may not be what it would have been: {what}. To make it so, {remedy}.")


def own_generator(thing: Any, depth: int = 5, most: int = 2000) -> str | None:
    """Return where a data set, or a transform in it, keeps a random generator; None if it seems to keep none.

    Args:
        thing: the data set.
        depth: how many attributes and containers deep to look.
        most: how many things to look at.
    """
    numpys = numpy_random()
    kinds = (torch.Generator, random.Random, numpys.Generator, numpys.RandomState)
    waiting, seen = deque([("dataset", thing, 0)]), {id(thing)}
    while waiting and len(seen) < most:
        path, thing, deep = waiting.popleft()
        if isinstance(thing, kinds):
            return path
        for where, value in _held(thing, path) if deep < depth else ():
            if id(value) not in seen:
                seen.add(id(value))
                waiting.append((where, value, deep + 1))
    return None


def _held(thing: Any, path: str) -> list[tuple[str, Any]]:
    """Return what something is made of, with names."""
    if isinstance(thing, (torch.Tensor, torch.nn.Module, str, bytes, type, ModuleType)):
        return []
    if isinstance(thing, dict):
        return [(f"{path}[{key!r}]", value) for key, value in list(thing.items())[:20]]
    if isinstance(thing, (list, tuple)):
        return [(f"{path}[{place}]", value) for place, value in enumerate(thing[:20])]
    return [(f"{path}.{name}", value) for name, value in getattr(thing, "__dict__", {}).items()]
