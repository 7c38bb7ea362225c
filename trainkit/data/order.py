"""Which sample is at which position of an epoch: a pure function of (seed, epoch, lap, position)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from trainkit.random import derived_seed, seed_host


class EpochOrder(Sampler[int]):
    """The order of one data set's samples, epoch by epoch, from any position on.

    Args:
        data: the samples; only their number is looked at, each time an epoch begins.
        shuffle: draw a new order for each epoch; False keeps the data set's own.
        seed: what the orders are drawn from.
    """

    def __init__(self, data: Sized, shuffle: bool, seed: int) -> None:
        self.data, self.shuffle, self.seed = data, shuffle, seed
        self.epoch = 0
        self.lap = 0
        """How often the data were gone through before in this epoch: 0, unless they are cycled beside longer ones."""
        self.start = 0
        self.used = False
        """Whether anybody has iterated over it."""

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        self.used = True
        if not self.shuffle:
            return iter(range(self.start, len(self)))
        generator = torch.Generator().manual_seed(self.epoch_seed())
        return iter(torch.randperm(len(self), generator=generator)[self.start :].tolist())

    def epoch_seed(self) -> int:
        """Return the 63-bit seed of the epoch's lap."""
        return derived_seed(self.seed, self.epoch, *[self.lap] * (self.lap > 0))


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


def batch_seed(epoch_seed: int, batch_idx: int) -> int:
    """Return what the random sources begin with when a batch is loaded."""
    return epoch_seed + 1 + batch_idx


class SeededBatches(BatchSampler):
    """Batches of an order for worker processes: what a data set draws at random in there is a function of the batch."""

    def __init__(self, order: EpochOrder, batch_size: int, drop_last: bool) -> None:
        super().__init__(order, batch_size, drop_last)
        self.order = order

    def __iter__(self) -> Iterator[list[int]]:
        seed = batch_seed(self.order.epoch_seed(), self.order.start // self.batch_size)
        for number, indices in enumerate(super().__iter__()):
            yield SeededIndices(indices, seed + number)


class SeededIndices(list[int]):
    """The samples of a batch. Whoever goes through them in order to load them has fresh random sources.

    So a worker draws the same whichever of them it is and whatever it loaded before.
    """

    def __init__(self, indices: list[int], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        seed_host(self.seed)
        return super().__iter__()

    def __reduce__(self) -> tuple[type, tuple[list[int], int]]:
        return SeededIndices, (self[:], self.seed)  # a slice is plain, and is made without going through the samples
