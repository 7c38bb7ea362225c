"""Which sample is at which position of an epoch: a pure function of (seed, epoch, lap, position)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from trainkit.data.permutation import Permutation, permutation
from trainkit.data.seeding import own_stream
from trainkit.data.slices import Slices
from trainkit.random import derived_seed


class EpochOrder(Sampler[int]):
    """The order of one data set's samples, epoch by epoch, from any position on; all processes have the same.

    Args:
        data: the samples; only their number is looked at, each time an epoch begins.
        shuffle: draw a new order for each epoch; False keeps the data set's own.
        seed: what the orders are drawn from.
    """

    known = True
    """Whether any position of any epoch can be asked for."""
    sized = True
    """Whether it surely gives as many as it says."""

    def __init__(self, data: Sized, shuffle: bool, seed: int) -> None:
        self.data, self.shuffle, self.seed = data, shuffle, seed
        self.epoch = 0
        self.lap = 0
        """How often the data were gone through before in this epoch: 0, unless they are cycled beside longer ones."""
        self.start = 0
        self.used = False
        """Whether anybody has iterated over it."""
        self.part, self.parts = 0, 1  # other processes go through orders of their own: their draws are others
        self._permutation: Permutation | None = None  # the epoch's, as soon as anybody has asked

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        self.used = True
        if not self.shuffle:
            return iter(range(self.start, len(self)))
        return itertools.chain.from_iterable(self.permutation().blocks(self.start, len(self)))

    def lists(self, size: int) -> Iterator[list[Any]]:
        """Yield what iterating gives in lists of so many, the last of which may be smaller."""
        items = iter(self)
        return iter(lambda: list(itertools.islice(items, size)), [])

    def batches(self, size: int, drop_last: bool) -> Iterator[Any]:
        """Return an iterator over the batches from here on: tensors of indices where they are known, else lists."""
        self.used = True
        stop = len(self) // size * size if drop_last else len(self)
        return itertools.chain.from_iterable(self.permutation().batches(self.start, stop, size))

    def sliced(self, slices: Slices, drop_last: bool) -> Iterator[tuple[range, Any]]:
        """Yield one part's piece of each batch from here on: its positions, and a tensor or list of what is there."""
        self.used = True
        return self.permutation().pieces(slices.pieces(self.start, len(self), drop_last))

    def permutation(self) -> Permutation:
        """Return the epoch's order: which index is at which position, and the other way round."""
        n, seed = len(self), self.epoch_seed()
        kept = self._permutation
        if kept is None or (kept.n, kept.seed) != (n, seed):
            self._permutation = kept = permutation(n, seed) if self.shuffle else Permutation(n, seed)
        return kept

    def indices(self, start: int, stop: int) -> list[int]:
        """Return the indices at positions `start` to `stop` of the epoch, fewer where it ends before."""
        return list(itertools.chain.from_iterable(self.permutation().blocks(start, stop)))

    def positions(self, start: int, stop: int) -> range:
        """Return where in the epoch these are for all processes together, which is what their draws depend on."""
        return range(start * self.parts + self.part, stop * self.parts + self.part, self.parts)

    def epoch_seed(self) -> int:
        """Return the 63-bit seed of the epoch's lap."""
        return derived_seed(self.seed, self.epoch, *[self.lap] * (self.lap > 0))

    def at(self, epoch: int, lap: int = 0, start: int = 0) -> EpochOrder:
        """Return this order standing elsewhere; whoever goes through this one is not disturbed."""
        elsewhere = object.__new__(type(self))
        vars(elsewhere).update(vars(self), epoch=epoch, lap=lap, start=start)
        return elsewhere


class DealtOrder(EpochOrder):
    """The part of one process, in the order in which a DistributedSampler deals it out.

    Args:
        sampler: whose order is a function of its own seed and the epoch that it is told.
        seed: for what the data draw at random.
    """

    def __init__(self, sampler: DistributedSampler[Any], seed: int) -> None:
        super().__init__(sampler, sampler.shuffle, seed)
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        self.used = True
        self.sampler.set_epoch(self.epoch)
        return itertools.islice(iter(self.sampler), self.start, None)

    def batches(self, size: int, drop_last: bool) -> Iterator[Any]:
        """Return an iterator over the batches from here on, as lists."""
        return whole_lists(self.lists(size), size, drop_last)

    def indices(self, start: int, stop: int) -> list[int]:
        """Return the indices at positions of this process's part."""
        told = self.sampler.epoch
        self.sampler.set_epoch(self.epoch)
        dealt = list(itertools.islice(iter(self.sampler), start, stop))
        self.sampler.set_epoch(told)
        return dealt

    def positions(self, start: int, stop: int) -> range:
        """Return where in the epoch these are for all processes together: dealt out one to each in turn."""
        replicas, rank = self.sampler.num_replicas, self.sampler.rank
        return range(start * replicas + rank, stop * replicas + rank, replicas)


class SamplerOrder(EpochOrder):
    """The order of a sampler that trainkit does not know, which is gone through from the epoch's beginning.

    What it draws from torch's, numpy's and python's default sources is a function of the epoch: it has them to itself.

    Args:
        sampler: gives indices, or the batches themselves.
        seed: what its draws come from.
        sized: whether it surely gives as many as it says.
    """

    known = False

    def __init__(self, sampler: Any, seed: int, sized: bool = False) -> None:
        super().__init__(sampler, True, seed)
        self.sampler, self.sized = sampler, sized

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.lists(1))

    def lists(self, size: int) -> Iterator[list[Any]]:
        """Yield what the sampler gives in lists of so many, the last of which may be smaller."""
        self.used = True
        skipped, rest = divmod(self.start, size)
        assert not rest, "a batch begins at a multiple of its size"
        return itertools.islice(own_stream(self.epoch_seed(), self.sampler, size), skipped, None)

    def batches(self, size: int, drop_last: bool) -> Iterator[Any]:
        """Return an iterator over the batches from here on, as lists."""
        return whole_lists(self.lists(size), size, drop_last)

    def sliced(self, slices: Slices, drop_last: bool) -> Iterator[tuple[range, Any]]:
        """Yield one part's piece of each batch from here on; every part goes through all that the sampler gives."""
        self.used = True
        given = itertools.chain.from_iterable(own_stream(self.epoch_seed(), self.sampler, slices.size))
        items, begin = itertools.islice(given, self.start, None), self.start
        for batch in whole_lists(iter(lambda: list(itertools.islice(items, slices.size)), []), slices.size, drop_last):
            piece = slices.piece(begin, len(batch))
            yield piece, batch[piece.start - begin : piece.stop - begin]
            begin += len(batch)


def whole_lists(lists: Iterator[list[Any]], size: int, drop_last: bool) -> Iterator[list[Any]]:
    """Return the lists, without those that are smaller where they are not wanted."""
    return itertools.takewhile(lambda batch: len(batch) == size, lists) if drop_last else lists


class Placed(list[Any]):
    """The indices of a batch, with their places in the run, which what is drawn for each of them depends on.

    Args:
        indices: of the data set, or whatever the sampler gives.
        places: the position of each in the epoch.
        batch_idx: which batch of the epoch it is.
        epoch: for messages.
        seed: the epoch's.
    """

    __slots__ = ("batch_idx", "epoch", "places", "seed")

    def __init__(self, indices: list[Any], places: range, batch_idx: int, epoch: int, seed: int) -> None:
        super().__init__(indices)
        self.places, self.batch_idx, self.epoch, self.seed = places, batch_idx, epoch, seed

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return Placed, (self[:], self.places, self.batch_idx, self.epoch, self.seed)


class PlacedBatches(BatchSampler):
    """The batches of an order, each with its place in the run; of several processes, this one's pieces of them.

    Args:
        order: of indices, or with `whole_batches` of whole batches.
        slices: how many of them a batch takes, and which of these this process does.
        drop_last: leave out a last batch that is smaller.
        ahead: how many batches are asked for before one arrives.
        whole_batches: the order is one of batches, not of indices.
    """

    def __init__(
        self, order: EpochOrder, slices: Slices, drop_last: bool = False, ahead: int = 1, whole_batches: bool = False
    ) -> None:
        self.sampler, self.order, self.drop_last = order, order, drop_last
        self.slices, self.whole_batches = slices, whole_batches
        self.batch_size = slices.size
        self.asked: deque[Placed] = deque(maxlen=ahead)
        """The batches that were asked for last."""
        self.idle = False
        """Whether there is nothing to ask for yet."""
        self.seen = 0
        """Up to which batch of all processes the epoch was gone through."""
        self.piece = range(0)
        """The positions of what was asked for last, of several processes' batches."""

    def __len__(self) -> int:
        return self.slices.own_count(len(self.order), self.drop_last)

    @property
    def count(self) -> int:
        """How many batches an epoch has for all processes together; it may have one fewer for this one."""
        return self.slices.count(len(self.order), self.drop_last)

    def __iter__(self) -> Iterator[Placed]:
        self.asked.clear()
        if self.idle:
            return iter(())
        order = self.order.at(self.order.epoch, self.order.lap, self.order.start)  # where it stands now
        order.used = self.order.used = True
        if self.whole_batches:
            return self._whole_batches(order)
        return self._batches(order) if self.slices.whole else self._pieces(order)

    def whole(self) -> Iterator[Any]:
        """Iterate without the places: over tensors of indices where they are known, else over lists."""
        if self.slices.whole:
            return self.order.batches(self.slices.size, self.drop_last)
        return (indices for _, _, indices in self._own(self.order))

    def _batches(self, order: EpochOrder) -> Iterator[Placed]:
        size, position, seed, epoch = self.slices.size, order.start, order.epoch_seed(), order.epoch
        for batch_idx, batch in enumerate(order.lists(size), self.slices.batch_at(position)):
            stop = position + len(batch)
            if self.drop_last and len(batch) < size:
                return
            yield self._noted(Placed(batch, order.positions(position, stop), batch_idx, epoch, seed))
            position = stop

    def _pieces(self, order: EpochOrder) -> Iterator[Placed]:
        seed, epoch = order.epoch_seed(), order.epoch
        for batch_idx, piece, indices in self._own(order):
            batch = indices.tolist() if isinstance(indices, Tensor) else indices
            yield self._noted(Placed(batch, piece, batch_idx, epoch, seed))

    def _own(self, order: EpochOrder) -> Iterator[tuple[int, range, Any]]:
        """Go through the batches of all, and yield this process's pieces of them where it has one."""
        slices = self.slices
        for batch_idx, (piece, indices) in enumerate(
            order.sliced(slices, self.drop_last), slices.batch_at(order.start)
        ):
            self.seen, self.piece = batch_idx + 1, piece
            if piece:
                yield batch_idx, piece, indices

    def _whole_batches(self, order: EpochOrder) -> Iterator[Placed]:
        """Go through the batches that are skipped, too: how many samples they have says where the others are."""
        position, seed, epoch, start, slices = 0, order.epoch_seed(), order.epoch, order.start, self.slices
        batches: Iterator[Any] = iter(order.at(epoch, order.lap))
        for place, batch in enumerate(batches):
            indices = list(batch)
            stop = position + len(indices)
            batch_idx = slices.batch_at(place)
            if place >= start:
                self.seen = batch_idx + 1
                if place - slices.begin(batch_idx) == slices.part:
                    yield self._noted(Placed(indices, order.positions(position, stop), batch_idx, epoch, seed))
            position = stop

    def _noted(self, batch: Placed) -> Placed:
        self.asked.append(batch)
        return batch


class PlacedSamples(PlacedBatches):
    """The samples of an order one at a time, each with its place in the run: for a DataLoader without batches."""
