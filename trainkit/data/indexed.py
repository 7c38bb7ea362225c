"""Indexed: a DataLoader over data with indices, from any batch of any epoch on.

It goes through a shallow copy of the user's DataLoader, whose sampler, data set and collate_fn are replaced by ones
that know where in the run they are; the user's own objects are left as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trainkit.data.distributed import UnrepeatedDistributedSampler
from trainkit.data.failure import Failure
from trainkit.data.fetch import Collate, Fetch
from trainkit.data.order import DealtOrder, EpochOrder, PlacedBatches, PlacedSamples, SamplerOrder
from trainkit.data.samplers import draws_nothing, length_of, sampler_of, set_epoch
from trainkit.data.served import Served
from trainkit.data.workers import Crew

ALONE = {
    "num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0, "worker_init_fn": None,
    "_DataLoader__multiprocessing_context": None, "pin_memory": False,
}  # fmt: skip


class Indexed:
    """The batches of one DataLoader, as functions of (seed, epoch, lap, index).

    Args:
        source: the user's DataLoader; its data set has indices.
        name: how messages call it.
        seed: what its order and its data's random numbers are drawn from.
        crew: its worker processes, None without.
    """

    def __init__(self, source: DataLoader[Any], name: str, seed: int, crew: Crew | None) -> None:
        self.source, self.name, self.crew = source, name, crew
        self.order = order_of(source, seed)
        self.batch_size = 1
        """How many steps of the order make a batch."""
        self.standard = type(source).__iter__ is DataLoader.__iter__
        """Whether batches come as torch's own iteration gives them."""
        self.asked: PlacedBatches | None = None
        """What is asked of the data set; None where it is torch's own and needs no place in the run."""
        self._generator = torch.Generator()
        self.loader = copy.copy(source)
        self._replace(vars(self.loader))  # DataLoader refuses assignment to most of these after its construction

    def _replace(self, attributes: dict[str, Any]) -> None:
        source, order, batches = self.source, self.order, self.source.batch_sampler
        attributes.update(_iterator=None, generator=self._generator, sampler=order)
        if self.crew is not None:
            self.crew.serve(self.loader)
        plain = type(batches) is BatchSampler
        if isinstance(batches, BatchSampler) and plain:
            self.batch_size = batches.batch_size
        own = plain or batches is None
        draws = not draws_nothing(source)
        if order.known and own and not draws and self.crew is None:  # all of it torch's own: nothing is drawn, or fails
            if isinstance(batches, BatchSampler):
                attributes["batch_sampler"] = BatchSampler(order, batches.batch_size, batches.drop_last)
            return
        ahead = 1 + source.num_workers * (source.prefetch_factor or 0)
        if batches is None:
            self.asked = attributes["sampler"] = PlacedSamples(order, ahead)
        elif isinstance(batches, BatchSampler) and plain:
            self.asked = PlacedBatches(order, batches.batch_size, batches.drop_last, ahead)
        else:
            self.asked = PlacedBatches(order, None, ahead=ahead)
        if batches is not None:
            attributes["batch_sampler"] = self.asked
        fetch = Fetch(source.dataset, source.collate_fn, self.name, hand_over=self.standard, draws=draws)
        attributes["dataset"], attributes["collate_fn"] = Served(source.dataset, fetch), Collate(source.collate_fn)

    def open(self, epoch: int, start: int, lap: int) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of a lap of an epoch."""
        order = self.order
        if not order.known:
            set_epoch(self.source, epoch)
        order.epoch, order.lap, order.start = epoch, lap, start * self.batch_size
        self._generator.manual_seed(order.epoch_seed())
        batches = iter(self.loader)
        return batches if self.crew is None else self._sent(self.crew, batches, start)

    def _sent(self, crew: Crew, batches: Iterator[Any], start: int) -> Iterator[Any]:
        """Give what worker processes send, and raise the errors among it."""
        asked = self.asked.asked if self.asked is not None else ()
        while True:
            batch = crew.receive(batches, asked, start)
            if batch is batches:
                return
            if type(batch) is Failure:
                raise batch.error()
            yield batch

    def alone(self) -> Indexed:
        """Return the same without workers, which gives the same batches, for one or two of them beside the run."""
        source = copy.copy(self.source)
        vars(source).update(ALONE)
        return Indexed(source, self.name, self.order.seed, None)

    def samples_of(self, epoch: int, batch_idx: int, lap: int) -> list[Any]:
        """Return the indices of the samples in a batch."""
        if self.order.known:
            start = batch_idx * self.batch_size
            stop = min(start + self.batch_size, len(self.order))
            return self.order.at(epoch, lap).indices(start, stop)
        set_epoch(self.source, epoch)
        alone = self.alone()
        alone.order.epoch, alone.order.lap, alone.order.start = epoch, lap, batch_idx * self.batch_size
        for batch in alone.asked or ():
            return batch[:]
        return []


def order_of(loader: DataLoader[Any], seed: int) -> EpochOrder:
    """Return the order of a DataLoader's samples, or of its batches if their sampler is not torch's."""
    batches, sampler = loader.batch_sampler, sampler_of(loader)
    if type(batches) not in (BatchSampler, type(None)):
        return SamplerOrder(batches, seed)
    shuffled = (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == length_of(sampler.data_source)
    )
    if shuffled or type(sampler) is SequentialSampler:
        return EpochOrder(sampler.data_source, shuffled, seed)
    if type(sampler) in (DistributedSampler, UnrepeatedDistributedSampler):
        return DealtOrder(sampler, seed)
    if type(sampler) in (RandomSampler, WeightedRandomSampler, SubsetRandomSampler):
        sampler = copy.copy(sampler)
        sampler.generator = None  # the seed comes from it
    return SamplerOrder(sampler, seed)
