"""Indexed: a DataLoader over data with indices, from any batch of any epoch on.

It goes through a shallow copy of the user's DataLoader, whose sampler, data set and collate_fn are replaced by ones
that know where in the run they are; the user's own objects are left as they are.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
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
from torch.utils.data._utils.pin_memory import pin_memory

from trainkit.data.distributed import UnrepeatedDistributedSampler
from trainkit.data.failure import Failure
from trainkit.data.fetch import Collate, Fetch
from trainkit.data.order import DealtOrder, EpochOrder, Placed, PlacedBatches, PlacedSamples, SamplerOrder
from trainkit.data.samplers import draws_nothing, length_of, sampler_of, set_epoch
from trainkit.data.served import Served
from trainkit.data.whole import Whole, gather_of
from trainkit.data.workers import Crew

ALONE = {
    "num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0, "worker_init_fn": None,
    "_DataLoader__multiprocessing_context": None,
}  # fmt: skip
PAGEABLE = {"pin_memory": False}


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
        self.standard = is_standard(source)
        """Whether batches come as torch's own iteration gives them."""
        self.asked: PlacedBatches
        """What is asked of the data set."""
        self.fetch = Fetch(
            source.dataset, source.collate_fn, name, hand_over=self.standard, draws=not draws_nothing(source)
        )
        self._generator = torch.Generator()
        self.loader = copy.copy(source)
        self._replace(vars(self.loader))  # DataLoader refuses assignment to most of these after its construction

    def _replace(self, attributes: dict[str, Any]) -> None:
        source, order, batches = self.source, self.order, self.source.batch_sampler
        attributes.update(_iterator=None, generator=self._generator, sampler=order)
        if self.crew is not None:
            self.crew.serve(self.loader)
        ahead = 1 + source.num_workers * (source.prefetch_factor or 0)
        if batches is None:
            self.asked = attributes["sampler"] = PlacedSamples(order, ahead)
        elif type(batches) is BatchSampler:
            self.batch_size = batches.batch_size
            self.asked = PlacedBatches(order, batches.batch_size, batches.drop_last, ahead)
        else:
            self.asked = PlacedBatches(order, None, ahead=ahead)
        if batches is not None:
            attributes["batch_sampler"] = self.asked
        if self.crew is not None or not self.standard:
            attributes["dataset"] = Served(source.dataset, self.fetch)
            attributes["collate_fn"] = Collate(source.collate_fn)

    @property
    def promised(self) -> float:
        """How many batches an epoch that begins now gives for sure; 0 where the sampler's word is not known to hold."""
        return len(self.asked) if self.standard and (self.order.known or self.order.sized) else 0

    def open(self, epoch: int, start: int, lap: int) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of a lap of an epoch."""
        order = self.order
        if not order.known:
            set_epoch(self.source, epoch)
        order.epoch, order.lap, order.start = epoch, lap, start * self.batch_size
        if self.crew is None and self.standard:
            return self._here(start)
        self._generator.manual_seed(order.epoch_seed())
        batches = iter(self.loader)
        return batches if self.crew is None else self._sent(self.crew, batches, start)

    def _here(self, start: int) -> Iterator[Any]:
        """Load batches in this process, without what torch's own iteration does around each."""
        asked: Any = self.loader.batch_sampler
        if asked is None:
            batches = map(self.fetch.here, iter(self.loader.sampler), itertools.repeat(True))
        elif gather_of(self.source.dataset, self.source.collate_fn) is not None and self.asked.size is not None:
            whole = Whole(self.source.dataset, self.source.collate_fn, start, self._one_by_one)
            batches = map(whole, asked.whole())
        else:
            batches = map(self.fetch.here, iter(asked))
        pin = pinning(self.source)
        return map(pin, batches) if pin is not None else batches

    def _one_by_one(self, indices: list[Any], batch_idx: int) -> Any:
        order, first = self.order, batch_idx * self.batch_size
        places = order.positions(first, first + len(indices))
        return self.fetch.here(Placed(indices, places, batch_idx, order.epoch, order.epoch_seed()))

    def _sent(self, crew: Crew, batches: Iterator[Any], start: int) -> Iterator[Any]:
        """Give what worker processes send, and raise the errors among it."""
        while True:
            batch = crew.receive(batches, self.asked.asked, start)
            if batch is batches:
                return
            if type(batch) is Failure:
                raise batch.error()
            yield batch
            del batch  # before the next one comes

    def alone(self) -> Indexed:
        """Return the same without workers, which gives the same batches, for one or two of them beside the run."""
        return Indexed(alone(self.source, **PAGEABLE), self.name, self.order.seed, None)

    def samples_of(self, epoch: int, batch_idx: int, lap: int) -> list[Any]:
        """Return the indices of the samples in a batch."""
        if self.order.known:
            start = batch_idx * self.batch_size
            stop = min(start + self.batch_size, len(self.order))
            return self.order.at(epoch, lap).indices(start, stop)
        set_epoch(self.source, epoch)
        alone = self.alone()
        alone.order.epoch, alone.order.lap, alone.order.start = epoch, lap, batch_idx * self.batch_size
        for batch in alone.asked:
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
        return SamplerOrder(sampler, seed, sized=True)
    return SamplerOrder(sampler, seed)


def alone(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """Return a copy of a DataLoader that loads in this process; itself if it does so already."""
    if loader.num_workers == 0 and not attributes:
        return loader
    copied = copy.copy(loader)
    vars(copied).update(ALONE, **attributes)
    return copied


def is_standard(loader: DataLoader[Any]) -> bool:
    """Whether a DataLoader is gone through as torch's own is."""
    kind = type(loader)
    return kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator


def in_memory(loader: DataLoader[Any]) -> bool:
    """Whether batches are gathered faster than a worker could send them, and nobody is told of workers."""
    own = is_standard(loader) and type(loader.batch_sampler) is BatchSampler and loader.worker_init_fn is None
    return own and gather_of(loader.dataset, loader.collate_fn) is not None


def pinning(loader: DataLoader[Any]) -> Callable[[Any], Any] | None:
    """Return what brings a DataLoader's batches into pinned memory, None where that is not wanted or not possible."""
    if not loader.pin_memory:
        return None
    device = torch.accelerator.current_accelerator(check_available=True)
    return partial(pin_memory, device=device.type) if device is not None and device.type != "mps" else None
