"""Loader: one epoch of batches at a time, from where the last one stopped.

It wraps what the user handed over, a DataLoader or any iterable, and adds what a run needs: a limit, looking ahead for
the last batch, and starting inside an epoch.
"""

from __future__ import annotations

import copy
import itertools
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from trainkit.data.order import EpochOrder
from trainkit.errors import MisconfigurationException, warn
from trainkit.random import draw_seed


class Loader:
    """Give an iterable's batches with their index and whether they are the last.

    Args:
        source: a DataLoader or any iterable of batches.
        limit: a fraction (float) or a number (int) of batches; 1.0 is all of them.
        name: how messages call it, "train_dataloader" for example.
        argument: the Trainer argument that the limit came from.
        sequential: take the data set's own order, whatever the DataLoader says.

    Raises:
        TypeError: the source is not iterable.
        MisconfigurationException: it is empty, or the limit does not fit its length.
    """

    def __init__(self, source: Any, *, limit: float = 1.0, name: str, argument: str, sequential: bool = False) -> None:
        samples = isinstance(source, Dataset) and not isinstance(source, Iterable)
        iterable = isinstance(source, Iterable) or hasattr(source, "__getitem__")
        if samples or isinstance(source, (str, type)) or not iterable:
            hint = " Wrap the data set: DataLoader(dataset, batch_size=...)." if samples else ""
            received = f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__
            raise TypeError(f"{name} must be an iterable of batches. Received: {received}.{hint}")
        self.source = source
        self.name = name
        self.order: EpochOrder | None = None
        self._uses_order = False  # an __iter__ of a subclass may bring an order of its own: seen when it is called
        self.batch_size = 1
        self.iterable: Any = source
        if isinstance(source, DataLoader):
            self.iterable = self._adapt(source, sequential)
        self.claimed = length_of(self.iterable)
        self.num_batches = limited(self.claimed, limit, name, argument)
        self.fetching: Callable[[Iterator[Any]], Iterator[Any]] | None = None
        """What a profiler watches the batches through."""
        self._warned = False

    def _adapt(self, loader: DataLoader[Any], sequential: bool) -> DataLoader[Any]:
        """Return the DataLoader with an order that can be repositioned; the user's object is left as it is."""
        if hasattr(loader, "load_state_dict"):  # torchdata's StatefulDataLoader has an order of its own
            return loader
        adapted = copy.copy(loader)
        attributes = vars(adapted)  # DataLoader refuses assignment to most of these after its construction
        attributes["_iterator"] = None
        if loader.num_workers > 0:
            attributes["worker_init_fn"] = IgnoreInterrupts(loader.worker_init_fn)
        batches = loader.batch_sampler
        sampler: Any = batches.sampler if type(batches) is BatchSampler else loader.sampler
        shuffled = (
            type(sampler) is RandomSampler
            and not sampler.replacement
            and sampler.num_samples == length_of(sampler.data_source)
        )
        if shuffled or type(sampler) is SequentialSampler:
            data = sampler.data_source
        elif sequential and not isinstance(loader.dataset, IterableDataset) and length_of(loader.dataset) < math.inf:
            data = loader.dataset
        else:
            return adapted
        if type(batches) not in (BatchSampler, type(None)):
            return adapted
        seed = draw_seed(sampler.generator if isinstance(sampler, RandomSampler) else None)
        self.order = EpochOrder(data, shuffled and not sequential, seed)
        self._uses_order = type(loader).__iter__ is DataLoader.__iter__
        attributes["sampler"] = self.order
        attributes["generator"] = torch.Generator()  # seeded for each epoch; the run's own random state is left alone
        if isinstance(batches, BatchSampler):
            self.batch_size = batches.batch_size
            attributes["batch_sampler"] = BatchSampler(self.order, batches.batch_size, batches.drop_last)
        return adapted

    def limited_to(self, most: float) -> Loader:
        """Return the same loader with at most so many batches."""
        shorter = copy.copy(self)
        shorter.num_batches = min(most, self.num_batches)
        return shorter

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Any, bool]]:
        """Yield (index, batch, is_last) from batch `start` of an epoch on."""
        limit = self.num_batches
        if start >= limit:
            return
        batches = self._open(epoch, start)
        if self.fetching is not None:
            batches = self.fetching(batches)
        index = start
        batch = next(batches, batches)
        if batch is batches:
            if start == 0:
                claim = f" although its length is {self.claimed}" if self.claimed != math.inf else ""
                once = " A generator can be read once only; give something that can be iterated over again."
                raise MisconfigurationException(
                    f"{self.name} yielded no batch{claim}.{once if isinstance(self.source, Iterator) else ''}"
                )
            return
        while index + 1 < limit:  # at the limit there is nothing to look ahead for
            following = next(batches, batches)
            if following is batches:
                break
            yield index, batch, False
            batch, index = following, index + 1
        if index + 1 < limit and self.claimed != math.inf and not self._warned:
            self._warned = True
            warn(
                f"{self.name} yielded {index + 1} batches although its length is {self.claimed}; the epoch ends there."
            )
        yield index, batch, True

    def _open(self, epoch: int, start: int) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of an epoch."""
        batches: Iterator[Any]
        order = self.order
        if order is not None:
            order.epoch, order.start = epoch, start * self.batch_size
            self.iterable.generator.manual_seed(order.epoch_seed())
            batches = iter(self.iterable)
            if self._uses_order:
                return batches
            first = list(itertools.islice(batches, 1))
            self._uses_order = order.used
            if not order.used:
                self.order = None
            if order.used or start == 0:
                return itertools.chain(first, batches)
        batch_sampler = getattr(self.iterable, "batch_sampler", None)
        for part in (getattr(self.iterable, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        batches = iter(self.iterable)
        if start:
            warn(
                f"{self.name} can't be repositioned, so its first {start} batches are read and thrown away. They are "
                "the ones that were trained on only if it gives the same order again."
            )
            next(itertools.islice(batches, start - 1, start), None)
        return batches

    def close(self) -> None:
        """Stop persistent workers."""
        if self.iterable is not self.source:
            vars(self.iterable)["_iterator"] = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the order is drawn from."""
        return {"seed": self.order.seed if self.order is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if self.order is not None and state["seed"] is not None:
            self.order.seed = state["seed"]


class IgnoreInterrupts:
    """Let a worker leave Ctrl-C to the main process, which finishes its step with the batches already under way."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


def length_of(source: Any) -> int | float:
    """Return the number of batches a source claims to have, infinity when it does not say."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return math.inf


def limited(length: int | float, limit: float, name: str, argument: str) -> int | float:
    """Return how many batches to take: a fraction (float) or a number (int) of them."""
    if length == 0 and limit != 0:
        raise MisconfigurationException(
            f"{name} is empty: its length is 0. Give it data, or batches small enough for drop_last; "
            f"{argument}=0 leaves it out."
        )
    if isinstance(limit, int):
        return min(limit, length)
    if limit == 1.0 or length == math.inf:
        if limit not in (0.0, 1.0):
            raise MisconfigurationException(
                f"{argument}={limit} is a fraction, but {name} has no length. Give a whole number of batches."
            )
        return length if limit else 0
    count = int(length * limit)
    if count == 0 and limit > 0:
        raise MisconfigurationException(
            f"{argument}={limit} leaves no batch of the {length} in {name}. Give at least {1 / length:.3g}, or a "
            "whole number of batches."
        )
    return count
