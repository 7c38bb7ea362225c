"""Indexed: a DataLoader over data with indices, from any batch of any epoch on.

It goes through a shallow copy of the user's DataLoader, whose sampler, data set and collate_fn are replaced by ones
that know where in the run they are; the user's own objects are left as they are.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    MapDataPipe,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data._utils.pin_memory import pin_memory

from trainkit.data.distributed import UnrepeatedDistributedSampler, deals_itself
from trainkit.data.failure import Failure
from trainkit.data.fetch import Collate, Fetch
from trainkit.data.order import DealtOrder, EpochOrder, Placed, PlacedBatches, PlacedSamples, SamplerOrder
from trainkit.data.samplers import draws_nothing, length_of, sampler_of, set_epoch
from trainkit.data.served import Served
from trainkit.data.slices import Slices
from trainkit.data.stacking import is_default
from trainkit.data.stateful import has_state
from trainkit.data.whole import Whole, gather_of
from trainkit.data.workers import Crew
from trainkit.random import derived_seed

if TYPE_CHECKING:
    from trainkit.data.unchanged import Snapshot

ALONE = {
    "num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0, "worker_init_fn": None,
    "_DataLoader__multiprocessing_context": None,
}  # fmt: skip
PAGEABLE = {"pin_memory": False}
FOR_WORKERS = (
    "dataset", "collate_fn", "num_workers", "prefetch_factor", "pin_memory", "timeout", "multiprocessing_context",
    "worker_init_fn", "in_order", "drop_last", "batch_size", "persistent_workers",
)  # fmt: skip
"""What of a DataLoader its workers are made of."""


class Indexed:
    """The batches of one DataLoader, as functions of (seed, epoch, lap, index).

    Args:
        source: the user's DataLoader; its data set has indices.
        name: how messages call it.
        seed: what its order and its data's random numbers are drawn from.
        crew: its worker processes, None without.
        keep: keep the workers from one epoch to the next, and let them start early, where nobody can tell.
        pinned: bring batches into pinned memory, for a CUDA device, where that is free and nobody can tell.
        shard: which of several parts this process has, and how many there are.
        deal: it takes its part of each batch. A sampler that deals its samples out by itself is left alone.
        size: how many samples all parts take at once; None: what a batch of the DataLoader has, for each of them.
    """

    def __init__(
        self,
        source: DataLoader[Any],
        name: str,
        seed: int,
        crew: Crew | None,
        keep: bool = False,
        pinned: bool = False,
        shard: tuple[int, int] = (0, 1),
        deal: bool = True,
        size: int | None = None,
    ) -> None:
        self.source, self.name, self.crew = source, name, crew
        self.order = order_of(source, seed)
        part, parts = shard
        self._part = part
        if parts > 1 and (not deal or deals_itself(source)):
            self.order.part, self.order.parts = shard
            part, parts, size = 0, 1, None
        self.slices = Slices(part, parts, size or batch_size_of(source) * parts)
        """What of each batch this process takes."""
        self._moved: tuple[int, Slices] | None = None  # an epoch that goes on with batches of another size
        self.standard = is_standard(source)
        """Whether batches come as torch's own iteration gives them."""
        self.asked: PlacedBatches
        """What is asked of the data set."""
        self.fetch = Fetch(
            source.dataset,
            source.collate_fn,
            name,
            hand_over=self.standard,
            draws=not draws_nothing(source),
            pinned=pinned and crew is None,
        )
        self.keeps = keep and self.standard and crew is not None and not source.persistent_workers
        """Whether workers go on into the next epoch as long as the data are what they were, though nobody said so."""
        if source.worker_init_fn is not None or has_state(source.dataset):  # these are to see each epoch begin
            self.keeps = False
        self._known: Snapshot | None = None  # what the workers know of the data
        self.pinned = pinned and is_default(source.collate_fn)
        self._made_of = [getattr(source, name) for name in FOR_WORKERS]
        self._early: tuple[Any, Iterator[Any]] | None = None  # an epoch that workers load already
        self._idle = False  # whether the workers were started, and nothing was asked of them
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
            self.asked = attributes["sampler"] = PlacedSamples(order, self.slices, ahead=ahead)
        elif type(batches) is BatchSampler:
            self.asked = PlacedBatches(order, self.slices, batches.drop_last, ahead)
        else:
            self.asked = PlacedBatches(order, self.slices, ahead=ahead, whole_batches=True)
        if batches is not None:
            attributes["batch_sampler"] = self.asked
        if self.crew is not None or not self.standard:
            attributes["dataset"] = Served(source.dataset, self.fetch)
            attributes["collate_fn"] = Collate(source.collate_fn)
        if self.crew is not None and self.pinned and self.standard:
            attributes["pin_memory"] = True  # by a thread of torch's

    @property
    def promised(self) -> float:
        """How many batches an epoch that begins now gives for sure; 0 where the sampler's word is not known to hold."""
        return len(self.asked) if self.sure else 0

    @property
    def sure(self) -> bool:
        """Whether it gives as many batches as it says."""
        return self.standard and (self.order.known or self.order.sized)

    def slices_in(self, epoch: int, lap: int = 0) -> Slices:
        """Return what of each batch of an epoch this process takes."""
        return self._moved[1] if self._moved is not None and self.moved(epoch) and lap == 0 else self.slices

    def go_on(self, epoch: int, batch_idx: int, position: int) -> None:
        """Let a batch of an epoch begin at a position where no batch of this size would."""
        self._moved = epoch, replace(self.slices, first_batch=batch_idx, first=position)

    def moved(self, epoch: int) -> bool:
        """Whether an epoch goes on with batches of another size."""
        return self._moved is not None and self._moved[0] == epoch

    def take(self, slices: Slices) -> None:
        """Give another part of each batch."""
        self.slices, self._moved = slices, None

    def counts(self, epoch: int | None = None, lap: int = 0) -> tuple[float, float]:
        """Return how many batches an epoch has, any or this one, and in how many of them this process has a sample."""
        total, slices = length_of(self.order), self.slices if epoch is None else self.slices_in(epoch, lap)
        if total == math.inf:
            return total, total
        return slices.count(int(total), self.asked.drop_last), slices.own_count(int(total), self.asked.drop_last)

    def stand(self, epoch: int, lap: int, start: int) -> None:
        """Let the order stand at a batch of a lap of an epoch."""
        self.asked.slices = slices = self.slices_in(epoch, lap)
        self.order.epoch, self.order.lap, self.order.start = epoch, lap, slices.begin(start)

    def open(self, epoch: int, start: int, lap: int) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of a lap of an epoch."""
        order = self.order
        if not order.known:
            set_epoch(self.source, epoch)
        self.stand(epoch, lap, start)
        if self.crew is None and self.standard:
            return self._here(start)
        if self.crew is None:
            self._generator.manual_seed(self._worker_seed())
            return iter(self.loader)
        early, self._early = self._early, None
        if early is not None and early[0] == self._place() and self._up_to_date():
            return self._sent(self.crew, early[1], start, early=len(self.asked.asked))
        return self._sent(self.crew, self._begun(), start)

    def _worker_seed(self) -> int:
        """Return what torch seeds workers from: what they draw by themselves differs between processes, too."""
        seed = self.order.epoch_seed()
        return derived_seed(seed, "part", self._part) if self._part else seed

    def _here(self, start: int) -> Iterator[Any]:
        """Load batches in this process, without what torch's own iteration does around each."""
        asked: Any = self.loader.batch_sampler
        if asked is None:
            batches = map(self.fetch.here, iter(self.loader.sampler), itertools.repeat(True))
        elif gather_of(self.source.dataset, self.source.collate_fn) is not None and not self.asked.whole_batches:
            whole = Whole(self.source.dataset, self.source.collate_fn, start, self._one_by_one, self.pinned)
            batches = map(whole, asked.whole())
        else:
            batches = map(self.fetch.here, iter(asked))
        pin = pinning(self.source)
        return map(pin, batches) if pin is not None else batches

    def _one_by_one(self, indices: list[Any], batch_idx: int) -> Any:
        order, slices = self.order, self.asked.slices
        first = slices.begin(batch_idx)
        places = order.positions(first, first + len(indices)) if slices.whole else self.asked.piece
        return self.fetch.here(Placed(indices, places, batch_idx, order.epoch, order.epoch_seed()))

    # ------------------------------------------------------------------ workers
    def muster(self) -> None:
        """Start the workers: they have nothing to load yet."""
        self.asked.idle = True
        try:
            self._try_early(None)
        finally:
            self.asked.idle = False

    def prepare(self, epoch: int, start: int) -> None:
        """Start the workers, and let them load from batch `start` of an epoch on, which is about to begin."""
        if self.order.known and math.isfinite(start):
            self.stand(epoch, 0, start)
            self._try_early(self._place())

    def _try_early(self, place: Any) -> None:
        """Begin before it is time. What goes wrong goes wrong again when it is, and is told of then."""
        if not self.keeps:
            return
        try:
            early = self._begun()
            self._early = (place, early) if place is not None and self.keeps else None
        except Exception:
            self.dismiss()

    def _place(self) -> Any:
        order = self.order
        return order.epoch, order.lap, order.start, order.seed, len(order), self.asked.slices

    def _begun(self) -> Iterator[Any]:
        """Begin an epoch with the workers there are, if they have the data as they are now; else with new ones."""
        attributes = vars(self.loader)
        if self.keeps and not self._up_to_date():
            from trainkit.data.unchanged import Snapshot  # which nobody needs without workers

            self.dismiss()
            self._known = Snapshot(self.source.dataset, self.source.collate_fn)
            self.keeps = attributes["persistent_workers"] = self._known.whole
        if self._idle and not self.asked.idle:
            self._idle = False
            return self._set_going(attributes["_iterator"])
        self._generator.manual_seed(self._worker_seed())
        self._idle = self.asked.idle
        return iter(self.loader)

    def _set_going(self, running: Any) -> Iterator[Any]:
        """Ask workers that have been idle until now; torch would wait until all of them have started."""
        running._sampler_iter = iter(running._index_sampler)
        for _ in range(running._prefetch_factor * running._num_workers):
            running._try_put_index()
        batches: Iterator[Any] = running
        return batches

    def _up_to_date(self) -> bool:
        there = self._known is not None and self.crew is not None and self.crew.complete()
        return there and self._known is not None and self._known.same()

    def dismiss(self) -> None:
        """End the workers."""
        self._early, self._known, self._idle = None, None, False
        if self.crew is not None:
            self.crew.end()
        vars(self.loader)["_iterator"] = None

    def take_over(self, other: Indexed) -> None:
        """Take the workers that another one of the same DataLoader has mustered, if they are what these would be."""
        running: Any = vars(other.loader)["_iterator"]
        alike = all(map(is_, self._made_of, other._made_of))
        if self.keeps and self.crew is not None and running is not None and alike and other._up_to_date():
            self.crew, self._known, self._idle = other.crew, other._known, other._idle
            other.crew.serve(self.loader)  # type: ignore[union-attr]
            running._index_sampler = self.asked
            vars(self.loader).update(_iterator=running, persistent_workers=True)
            other.crew = None
        del running
        other.dismiss()

    def _sent(self, crew: Crew, batches: Iterator[Any], start: int, early: int = 0) -> Iterator[Any]:
        """Give what worker processes send, and raise the errors among it; `early` batches were asked for early."""
        for index in itertools.count(start):
            batch = crew.receive(batches, self.asked.asked, start)
            if type(batch) is Failure and index < start + early:  # what it needs may not have been there yet
                self.dismiss()
                early, start, self.order.start = 0, index, self.asked.slices.begin(index)
                batches = self._begun()
                batch = crew.receive(batches, self.asked.asked, start)
            if batch is batches:
                return
            if type(batch) is Failure:
                raise batch.error()
            yield batch
            del batch  # before the next one comes

    def alone(self, part: int | None = None) -> Indexed:
        """Return the same without workers, which gives the same batches, for one or two of them beside the run.

        Args:
            part: whose pieces it gives; None: this process's.
        """
        made = Indexed(alone(self.source, **PAGEABLE), self.name, self.order.seed, None)
        made.order.part, made.order.parts = self.order.part, self.order.parts
        other = {} if part is None else {"part": part}
        made.slices = made.asked.slices = replace(self.slices, **other)
        made._moved = None if self._moved is None else (self._moved[0], replace(self._moved[1], **other))
        return made

    def positions_of(self, epoch: int, batch_idx: int, lap: int) -> range:
        """Return where in the epoch the samples of a batch are; of whole batches, which of all these it is."""
        slices, total = self.slices_in(epoch, lap), length_of(self.order)
        return slices.piece(slices.begin(batch_idx), slices.length(batch_idx, total))

    def samples_of(self, epoch: int, batch_idx: int, lap: int) -> list[Any]:
        """Return the indices of the samples in a batch."""
        if self.order.known:
            positions = self.positions_of(epoch, batch_idx, lap)
            return self.order.at(epoch, lap).indices(positions.start, positions.stop)
        set_epoch(self.source, epoch)
        alone = self.alone()
        alone.stand(epoch, lap, batch_idx)
        batch = next(iter(alone.asked), None)
        return batch[:] if batch is not None and batch.batch_idx == batch_idx else []


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Return how many steps of a DataLoader's order make a batch: its samples, or one batch of a sampler of batches."""
    batches = loader.batch_sampler
    return batches.batch_size if type(batches) is BatchSampler else 1


def size_kept(loader: DataLoader[Any], parts: int, kept: Mapping[str, int] | None) -> int | None:
    """Return how many samples a batch of all processes has, if it stays as it was for another number of processes.

    Args:
        loader: of batches that can have any number of samples; what gives batches itself deals out whole ones.
        parts: how many processes there are now.
        kept: the `size` that it had, and the `batch_size` of the DataLoader then, which says whether somebody has
            changed that since.
    """
    if kept is None or kept["batch_size"] != batch_size_of(loader):
        return None
    plain = type(loader.batch_sampler) is BatchSampler
    return kept["size"] if plain or kept["size"] <= parts else None


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


def has_workers(source: Any) -> bool:
    """Whether what fit was given is a DataLoader whose batches worker processes load, by their indices."""
    if not isinstance(source, DataLoader) or has_state(source) or not source.num_workers or in_memory(source):
        return False
    return not isinstance(source.dataset, (IterableDataset, MapDataPipe))


def pinning(loader: DataLoader[Any]) -> Callable[[Any], Any] | None:
    """Return what brings a DataLoader's batches into pinned memory, None where that is not wanted or not possible."""
    if not loader.pin_memory:
        return None
    device = torch.accelerator.current_accelerator(check_available=True)
    return partial(pin_memory, device=device.type) if device is not None and device.type != "mps" else None
