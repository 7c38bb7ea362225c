"""Loader: one epoch of batches at a time, from where the last one stopped.

It wraps what the user handed over, a DataLoader or any iterable, and adds what a run needs: a limit, looking ahead for
the last batch, and starting inside an epoch. Several of them make a `combined.Combination`.
"""

from __future__ import annotations

import copy
import itertools
import math
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Self

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from trainkit.data.distributed import UnrepeatedDistributedSampler
from trainkit.data.order import DealtOrder, EpochOrder, SeededBatches, batch_seed
from trainkit.data.samplers import draws_nothing, length_of, sampler_of, set_epoch
from trainkit.errors import CheckpointError, MisconfigurationException, warn
from trainkit.random import all_kept, derived_seed, draw_seed, torch_kept


class Batches:
    """Give batches with their index and whether they are the last, epoch by epoch, from any batch on.

    It looks one batch ahead: what it is made of may yield less than it claims.
    """

    name: str
    claimed: int | float
    """How many batches an epoch says it has; infinity when it does not say."""
    num_batches: int | float
    """How many of them are taken."""
    must_yield = False
    """Whether an epoch without a batch is an error, even when no length promises one."""
    read_once = False
    """Whether it is an iterator, which gives its batches once and never again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.claimed = self.num_batches = 0
        self.fetching: Callable[[Iterator[Any]], Iterator[Any]] | None = None
        """What a profiler watches the batches through."""
        self._warned = False

    @property
    def parts(self) -> list[Loader]:
        """The loaders that it takes batches from."""
        return []

    def open(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of an epoch."""
        return iter(())

    def limited_to(self, most: float) -> Self:
        """Return the same with at most so many batches."""
        shorter = copy.copy(self)
        shorter.num_batches = min(most, self.num_batches)
        return shorter

    def epoch(self, epoch: int, start: int = 0) -> Generator[tuple[int, Any, bool]]:
        """Yield (index, batch, is_last) from batch `start` of an epoch on."""
        limit = self.num_batches
        if start >= limit:
            return
        batches = self.open(epoch, start)
        if self.fetching is not None:
            batches = self.fetching(batches)
        index = start
        batch = next(batches, batches)
        if batch is batches:
            if start == 0:
                self._tell_of_no_batch()
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

    def _tell_of_no_batch(self) -> None:
        once = " A generator can be read once only; give something that can be iterated over again."
        message = f"{self.name} yielded no batch%s.{once if self.read_once else ''}"
        if self.claimed != math.inf:
            raise MisconfigurationException(message % f" although its length is {self.claimed}")
        if self.must_yield:
            raise MisconfigurationException(message % ", and max_epochs=-1 would wait for it forever")
        if not self._warned:
            self._warned = True
            warn(message % ": the epoch is over at once")

    def state_dict(self) -> dict[str, Any]:
        """Return what the order is drawn from and where it is."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def close(self) -> None:
        """Stop persistent workers."""
        for part in self.parts:
            part.close()


class Loader(Batches):
    """The batches of one DataLoader, or of any other iterable.

    Args:
        source: a DataLoader or any iterable of batches.
        limit: a fraction (float) or a number (int) of batches; 1.0 is all of them.
        name: how messages call it, "train_dataloader" for example.
        argument: the Trainer argument that the limit came from.
        may_be_empty: a length of 0 is no error.
        seed: what its order and its data's augmentation are drawn from, unless the DataLoader has a generator; None
            draws one from torch's.

    Raises:
        TypeError: the source is not iterable.
        MisconfigurationException: it is empty, or the limit does not fit its length.
    """

    def __init__(
        self,
        source: Any,
        *,
        limit: float = 1.0,
        name: str,
        argument: str,
        may_be_empty: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(name)
        samples = isinstance(source, Dataset) and not isinstance(source, Iterable)
        iterable = isinstance(source, Iterable) or hasattr(source, "__getitem__")
        if samples or isinstance(source, (str, type)) or not iterable:
            hint = " Wrap the data set: DataLoader(dataset, batch_size=...)." if samples else ""
            received = f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__
            raise TypeError(f"{name} must be an iterable of batches. Received: {received}.{hint}")
        self.source = source
        self.read_once = isinstance(source, Iterator)
        self.stateful = all(callable(getattr(source, f"{verb}state_dict", None)) for verb in ("", "load_"))
        self.seed = seed
        self.order: EpochOrder | None = None
        self._generator: torch.Generator | None = None  # the DataLoader's, seeded for each epoch
        self._may_draw = False  # loading a batch may draw random numbers in this process
        self._uses_order = False  # an __iter__ of a subclass may bring an order of its own: seen when it is called
        self.batch_size = 1
        self.iterable: Any = source
        if isinstance(source, DataLoader) and not self.stateful:  # StatefulDataLoader has an order of its own
            self.iterable = self._adapt(source)
        self.claimed = length_of(self.iterable)
        self.num_batches = limited(self.claimed, limit, name, argument, may_be_empty)
        self._state: Any = None  # a stateful source's, before the batch that it gave last
        self._finished: Any = None  # and at the end of its data
        self._over = False
        self._restored = False

    @property
    def parts(self) -> list[Loader]:
        """This very loader."""
        return [self]

    def _adapt(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Return the DataLoader with an order that can be repositioned; the user's object is left as it is."""
        adapted = copy.copy(loader)
        attributes = vars(adapted)  # DataLoader refuses assignment to most of these after its construction
        attributes["_iterator"] = None
        if loader.num_workers > 0:
            attributes["worker_init_fn"] = IgnoreInterrupts(loader.worker_init_fn)
        batches, sampler = loader.batch_sampler, sampler_of(loader)
        given = getattr(sampler, "generator", None) or loader.generator
        if given is not None or self.seed is None:
            self.seed = draw_seed(given)
        shuffled = (
            type(sampler) is RandomSampler
            and not sampler.replacement
            and sampler.num_samples == length_of(sampler.data_source)
        )
        is_dealt = type(sampler) in (DistributedSampler, UnrepeatedDistributedSampler)
        known = shuffled or is_dealt or type(sampler) is SequentialSampler
        if type(batches) not in (BatchSampler, type(None)) or not known:
            self._may_draw = True
            if loader.generator is None:
                attributes["generator"] = self._generator = torch.Generator()
            return adapted
        self._may_draw = loader.num_workers == 0 and not draws_nothing(loader)
        if is_dealt:
            self.order = DealtOrder(sampler, self.seed)
        else:
            self.order = EpochOrder(sampler.data_source, shuffled, self.seed)
        self._uses_order = type(loader).__iter__ is DataLoader.__iter__
        attributes["sampler"] = self.order
        attributes["generator"] = self._generator = torch.Generator()
        if isinstance(batches, BatchSampler):
            self.batch_size = batches.batch_size
            kind = SeededBatches if loader.num_workers > 0 else BatchSampler
            attributes["batch_sampler"] = kind(self.order, batches.batch_size, batches.drop_last)
        return adapted

    def open(self, epoch: int, start: int = 0, lap: int = 0) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of a lap of an epoch."""
        batches: Iterator[Any]
        order = self.order
        if not isinstance(self.iterable, DataLoader) or self.stateful:
            set_epoch(self.iterable, epoch)
            if self.stateful:
                return self._open_stateful(start, lap)
            return self._fast_forward(iter(self.iterable), start)
        seed = derived_seed(self.seed or 0, epoch, *[lap] * (lap > 0))
        if self._generator is not None:
            self._generator.manual_seed(seed)
        if order is not None:
            order.epoch, order.lap, order.start = epoch, lap, start * self.batch_size
            batches = self._seeded(iter(self.iterable), seed, start, start) if self._may_draw else iter(self.iterable)
            if self._uses_order:
                return batches
            first = list(itertools.islice(batches, 1))
            self._uses_order = order.used
            if not order.used:
                self.order = None
            if order.used or start == 0:
                return itertools.chain(first, batches)
        set_epoch(self.iterable, epoch)
        return self._fast_forward(self._seeded(all_kept(seed, iter, self.iterable), seed, 0, start), start)

    @staticmethod
    def _seeded(batches: Iterator[Any], seed: int, index: int, start: int) -> Iterator[Any]:
        """Load each batch with random sources that are a function of its index.

        Up to the first batch that is asked for the run's own random state is kept as a checkpoint brought it; later
        torch's is, while python's and numpy's go on from what the batch left, which is a function of its index, too.
        """
        while True:
            kept = torch_kept if index > start else all_kept
            batch = kept(batch_seed(seed, index), next, batches, batches)
            if batch is batches:
                return
            yield batch
            index += 1

    def _fast_forward(self, batches: Iterator[Any], start: int) -> Iterator[Any]:
        if start:
            warn(
                f"{self.name} can't be repositioned, so its first {start} batches are read and thrown away. They are "
                "the ones that were trained on only if it gives the same order again."
            )
            next(itertools.islice(batches, start - 1, start), None)
        return batches

    def _open_stateful(self, start: int, lap: int) -> Iterator[Any]:
        """Open a source that knows its position: a restored one goes on where its state says."""
        inside = start > 0 or lap > 0
        if self._restored and self._over and inside:  # beside longer loaders
            return iter(())
        state = self._state if inside else self._finished  # at the beginning: where the epoch before ended
        if self._restored and state is not None:
            self.source.load_state_dict(copy.deepcopy(state))
            batches = iter(self.source)
        else:
            batches = self._fast_forward(iter(self.source), start)
        self._restored, self._over, self._finished = False, False, None
        return self._remembered(batches, start)

    def _remembered(self, batches: Iterator[Any], given: int) -> Iterator[Any]:
        """Remember the state before each batch, because the run is one behind what it has looked at.

        The source is read to its end as a for loop would, so that it knows that its data are over.
        """
        while True:
            state = copy.deepcopy(self.source.state_dict())
            batch = next(batches, batches)
            given += 1
            if batch is batches or (given == self.claimed and next(batches, batches) is batches):
                self._finished = copy.deepcopy(self.source.state_dict())
            self._state, self._over = state, batch is batches
            if self._over:
                return
            yield batch

    def samples_of(self, epoch: int, batch_idx: int, lap: int = 0) -> list[Any] | None:
        """Return the indices of the samples in a batch of an epoch; None where the data have none.

        Args:
            epoch: which epoch, counted from 0.
            batch_idx: which batch of it.
            lap: how often the data were gone through before in it, beside longer ones.
        """
        if self.order is None:
            return None
        order = copy.copy(self.order)
        order.epoch, order.lap, order.start = epoch, lap, batch_idx * self.batch_size
        return list(itertools.islice(order, self.batch_size))

    def close(self) -> None:
        """Stop persistent workers."""
        if self.iterable is not self.source:
            vars(self.iterable)["_iterator"] = None

    def continue_order(self, before: Loader) -> None:
        """Draw the order from the seed of the loader that this one replaces."""
        self.reseed(before.seed)

    def reseed(self, seed: int | None) -> None:
        """Draw from another seed."""
        self.seed = seed
        if self.order is not None and seed is not None:
            self.order.seed = seed

    def state_dict(self) -> dict[str, Any]:
        """Return what the order is drawn from, and the position of a source that keeps its own."""
        state: dict[str, Any] = {"seed": self.seed}
        if self.stateful:
            state["source"] = {"state": self._state, "finished": self._finished, "over": self._over}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if "seed" not in state:
            raise CheckpointError(f"{self.name} is one loader, the checkpoint was written with several.")
        if state["seed"] is not None:
            self.reseed(state["seed"])
        if self.stateful and "source" in state:
            source = state["source"]
            self._state, self._finished, self._over = source["state"], source["finished"], source["over"]
            self._restored = True


class IgnoreInterrupts:
    """Let a worker leave Ctrl-C to the main process, which finishes its step with the batches already under way."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


def limited(length: int | float, limit: float, name: str, argument: str, may_be_empty: bool = False) -> int | float:
    """Return how many batches to take: a fraction (float) or a number (int) of them."""
    if length == 0 and may_be_empty:
        return 0
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
