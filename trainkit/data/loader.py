"""Loader: one epoch of batches at a time, from where the last one stopped.

It wraps what the user handed over, a DataLoader or any iterable, and adds what a run needs: a limit, looking ahead for
the last batch, and starting inside an epoch. Several of them make a `combined.Combination`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, MapDataPipe

from trainkit.data.batches import EMPTY as EMPTY
from trainkit.data.batches import Batches as Batches
from trainkit.data.distributed import deals_itself
from trainkit.data.failure import named
from trainkit.data.indexed import Indexed, alone, batch_size_of, in_memory, size_kept
from trainkit.data.samplers import can_do_without_state, length_of, sampler_of, set_epoch, without_state
from trainkit.data.seeding import kept
from trainkit.data.served import ByIndex
from trainkit.data.stateful import Begun, Remembered, has_state, stateful_sampler, tell_of_draws, tell_of_order
from trainkit.data.workers import Crew, WorkerStart
from trainkit.errors import CheckpointError, MisconfigurationException, warn
from trainkit.random import derived_seed, draw_seed


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
        keep: keep workers from one epoch to the next, where nobody can tell.
        mustered: has workers for this source already.
        pinned: bring batches into pinned memory, for a CUDA device, where that is free.
        shard: which of several parts this process has, and how many there are.
        deal: data with indices are dealt out: a batch is this process's part of one that all parts share.
        even: all parts give as many batches: `EMPTY` where this one has no sample.
        kept: where a run with another number of processes was, whose batches stay as large as they were.

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
        keep: bool = False,
        mustered: Indexed | None = None,
        pinned: bool = False,
        shard: tuple[int, int] = (0, 1),
        deal: bool = True,
        even: bool = True,
        kept: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(name)
        self.shard, self.deal, self.even, self.kept = shard, deal, even, kept
        samples = isinstance(source, Dataset) and not isinstance(source, Iterable)
        iterable = isinstance(source, Iterable) or hasattr(source, "__getitem__")
        if samples or isinstance(source, (str, type)) or not iterable:
            hint = " Wrap the data set: DataLoader(dataset, batch_size=...)." if samples else ""
            received = f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__
            raise TypeError(f"{name} must be an iterable of batches. Received: {received}.{hint}")
        self.source = source
        self.read_once = isinstance(source, Iterator)
        shared = shard[1] > 1 and deal and can_do_without_state(source) and not deals_itself(source)
        self.remembered: Remembered | None = Remembered(source) if has_state(source) and not shared else None
        self.begun: Begun | None = None
        self.seed = seed
        self.indexed: Indexed | None = None
        """What a DataLoader over data with indices is gone through by."""
        self._generator: torch.Generator | None = None  # the DataLoader's, seeded for each epoch
        self._crew: Crew | None = None  # its worker processes
        self._by_index: ByIndex | None = None  # the data set of a DataLoader that keeps its own order
        self.iterable: Any = source
        if isinstance(source, DataLoader) and self.remembered is None:  # StatefulDataLoader has an order of its own
            self.iterable = self._adapt(without_state(source) if shared else source, keep, mustered, pinned)
        elif isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
            self._by_index = ByIndex(source.dataset, name)
        self.claimed = length_of(self.iterable)
        if self.indexed is not None and self.sliced:
            self.claimed, _ = self.indexed.counts()
        self.looks_ahead = 1 if self.remembered is not None or self.begun is not None else 2
        self.limit_to = partial(limited, limit=limit, name=name, argument=argument, may_be_empty=may_be_empty)
        self.num_batches = self.limit_to(self.claimed)
        self._resumed = False
        self._dealt_evenly = (-1, 0)  # in this epoch so many batches are
        if mustered is not None:
            mustered.dismiss()

    @property
    def parts(self) -> list[Loader]:
        """This very loader."""
        return [self]

    @property
    def promised(self) -> float:
        """How many batches an epoch that begins now gives for sure."""
        if self.indexed is None or self.remembered is not None or self.begun is not None:
            return 0  # their states are a batch behind
        if self.sliced and self.even and self.indexed.sure:
            return math.inf  # no more are asked for than there are
        return self.indexed.promised

    @property
    def samples(self) -> int | float:
        """How many steps the order of an epoch has; infinity where nobody says."""
        return math.inf if self.indexed is None else length_of(self.indexed.order)

    @property
    def sliced(self) -> bool:
        """Whether this process takes its part of batches that all processes share."""
        return self.indexed is not None and self.indexed.slices.parts > 1

    def taken(self, epoch: int) -> int | float:
        """Return at which batch this process's epoch ends."""
        most = self.taken_by_all(epoch)
        if self.even or self.indexed is None or not (self.sliced or self.indexed.moved(epoch)):
            return most
        return min(self.indexed.counts(epoch)[1], most)

    def taken_by_all(self, epoch: int) -> int | float:
        """Return at which batch the epoch of the last process ends."""
        if self.indexed is None or not (self.sliced or self.indexed.moved(epoch)):
            return self.num_batches
        most, _ = self.indexed.counts(epoch)
        if not self.indexed.moved(epoch):
            most = min(most, self.num_batches)
        elif self.num_batches < self.claimed:
            slices = self.indexed.slices_in(epoch)
            left = max(0, self.num_batches * slices.size - slices.first)
            most = min(most, slices.first_batch + math.ceil(left / slices.size))
        return most

    def share(self, epoch: int, batch_idx: int, lap: int = 0) -> float:
        """Return by what a loss that is a mean over the samples of a batch counts among those of all processes."""
        if (epoch == self._dealt_evenly[0] and batch_idx < self._dealt_evenly[1]) or not self.sliced:
            return 1.0
        assert self.indexed is not None
        return self.indexed.slices_in(epoch, lap).share(batch_idx, self.samples)

    def lacking(self, epoch: int, batch_idx: int, lap: int = 0) -> bool:
        """Whether some process has no sample of a batch: all of them know it, and that one gets `EMPTY`."""
        if (epoch == self._dealt_evenly[0] and batch_idx < self._dealt_evenly[1]) or not self.sliced:
            return False
        assert self.indexed is not None
        slices = self.indexed.slices_in(epoch, lap)
        return slices.length(batch_idx, self.samples) < slices.parts

    def empty(self, epoch: int, batch_idx: int, lap: int = 0) -> bool:
        """Whether other processes have all samples of a batch."""
        if not self.sliced or self.indexed is None:
            return False
        most, own = self.indexed.counts(epoch, lap)
        return own <= batch_idx < most

    def stand_in(self, epoch: int, batch_idx: int, lap: int = 0) -> Any:
        """Return what the last process has of a batch that this one has no sample of."""
        assert self.indexed is not None
        length = self.indexed.slices_in(epoch, lap).length(batch_idx, self.samples)
        return next(iter(self.indexed.alone(length - 1).open(epoch, batch_idx, lap)))

    def _adapt(self, loader: DataLoader[Any], keep: bool, mustered: Indexed | None, pinned: bool) -> DataLoader[Any]:
        """Return a copy of the DataLoader that goes through it from any batch on, or as near to that as it can."""
        given = getattr(sampler_of(loader), "generator", None) or loader.generator
        if isinstance(given, torch.Generator) or self.seed is None:
            self.seed = draw_seed(given)
        workers = loader.num_workers > 0 and not in_memory(loader)
        if workers:
            self._crew = Crew(loader, self.name)
        elif has_state(loader.dataset):
            self.remembered = Remembered(loader.dataset)
        if not isinstance(loader.dataset, (IterableDataset, MapDataPipe)):
            source = loader if workers else alone(loader)
            kept = size_kept(source, self.shard[1], self.kept)
            self.indexed = Indexed(
                source, self.name, self.seed or 0, self._crew, keep, pinned, self.shard, self.deal, kept
            )
            if mustered is not None:
                self.indexed.take_over(mustered)
                self._crew = self.indexed.crew
            sampler = stateful_sampler(loader)
            self.begun = Begun(sampler) if sampler is not None else None
            return self.indexed.loader
        adapted = copy.copy(loader)
        vars(adapted)["_iterator"] = None  # DataLoader refuses assignment to most of these after its construction
        if loader.generator is None:
            vars(adapted)["generator"] = self._generator = torch.Generator()
        if self._crew is not None:
            self._crew.serve(adapted)
        return adapted

    def prepare(self, epoch: int, start: int = 0) -> None:
        """Let workers load what begins with batch `start` of an epoch, before anybody asks for it."""
        if self.indexed is not None and self.remembered is None and self.begun is None:
            self.indexed.prepare(epoch, start)

    def open(self, epoch: int, start: int = 0, lap: int = 0) -> Iterator[Any]:
        """Return an iterator that begins with batch `start` of a lap of an epoch."""
        inside = start > 0 or lap > 0
        if self._resumed or inside:
            self._tell_what_is_not_exact()
        if self.begun is not None:
            self.begun.begin(inside)
        if self.remembered is not None:
            begin = partial(self._opened, epoch, start, lap)
            batches = self.remembered.open(begin, start, inside, self.claimed)
        else:
            batches = self._opened(epoch, start, lap)
        if self.sliced and self.even:
            self._note_even_batches(epoch)
            batches = self._with_empty_ones(batches, start)
        return batches if self.begun is None else self.begun.to_its_end(batches, start, self.claimed)

    def _note_even_batches(self, epoch: int) -> None:
        assert self.indexed is not None
        slices, total = self.indexed.slices_in(epoch), self.samples
        known = slices.size % slices.parts == 0 and total < math.inf
        self._dealt_evenly = epoch, slices.count(int(total), drop_last=True) if known else 0

    def _with_empty_ones(self, batches: Iterator[Any], index: int) -> Iterator[Any]:
        for batch in batches:
            index += 1
            yield batch
            del batch
        if self.indexed is not None:
            yield from itertools.repeat(EMPTY, self.indexed.asked.seen - index)

    def _opened(self, epoch: int, start: int, lap: int, stands: bool = False) -> Iterator[Any]:
        """Return an iterator that begins with a batch; `stands`: a source with a state stands there already."""
        if self.indexed is not None:
            batches = self.indexed.open(epoch, start, lap)
            if self.indexed.standard:
                return batches
            first = list(itertools.islice(batches, 1))  # a subclass may have an order of its own: seen when it begins
            if self.indexed.order.used:
                return itertools.chain(first, batches)
            self.indexed = None
            if start == 0:
                return itertools.chain(first, batches)
        set_epoch(self.iterable, epoch)
        if isinstance(self.iterable, DataLoader):
            batches = self._seeded(epoch, start if stands else 0, lap)
        else:
            batches = iter(self.iterable)
        return batches if stands else self._fast_forward(batches, start)

    def _tell_what_is_not_exact(self) -> None:
        self._resumed = False
        if isinstance(self.source, DataLoader) and self.iterable is not self.source:
            if self.indexed is not None:
                tell_of_order(self.name, self.indexed.source)
            saved = self.remembered is not None
            tell_of_draws(self.name, self.source.dataset, self.source.num_workers, saved)

    def _iterator_of_source(self, epoch: int, seed: int) -> Iterator[Any]:
        """Begin with the user's own DataLoader, which for this moment has the data set and the worker start of ours."""
        source: Any = self.source
        attributes = vars(source)
        before = {name: attributes[name] for name in ("dataset", "worker_init_fn")}
        attributes["worker_init_fn"] = WorkerStart(source.worker_init_fn)
        if self._by_index is not None:
            self._by_index.begin(epoch, seed)
            attributes["dataset"] = self._by_index
        try:
            return iter(source)
        finally:
            attributes.update(before)

    def _seeded(self, epoch: int, first: int, lap: int) -> Iterator[Any]:
        """Load each batch with random sources that are a function of its index; the run keeps its own."""
        part = self.shard[0]  # what each process reads for itself has draws of its own
        own = derived_seed(self.seed or 0, "part", part) if part else self.seed or 0
        loader, seed = self.iterable, derived_seed(own, epoch, *[lap] * (lap > 0))
        if self._generator is not None:
            self._generator.manual_seed(seed)
        if loader is self.source:
            batches = kept(seed, self._iterator_of_source, epoch, seed)
        else:
            batches = kept(seed, iter, loader)
        receive = partial(next, batches, batches) if self._crew is None else partial(self._crew.receive, batches)
        return self._each_seeded(batches, receive, seed, epoch, first)

    def _each_seeded(
        self, batches: Iterator[Any], receive: Callable[[], Any], seed: int, epoch: int, first: int
    ) -> Iterator[Any]:
        for index in itertools.count(first):
            try:
                batch = kept(seed + 1 + index, receive)
            except Exception as error:
                failed = named(error, f"{self.name}: loading batch {index} of epoch {epoch} failed.")
                if failed is not error:
                    raise failed from error
                raise
            if batch is batches:
                return
            yield batch

    def samples_of(self, epoch: int, batch_idx: int, lap: int = 0) -> list[Any] | None:
        """Return the indices of the samples in a batch; `lap`: how often the data were gone through in the epoch."""
        if self.indexed is None:
            return None
        with self.begun.aside() if self.begun is not None else nullcontext():
            return self.indexed.samples_of(epoch, batch_idx, lap)

    def batch_at(self, epoch: int, batch_idx: int, lap: int = 0) -> Any:
        """Return one batch of an epoch; `lap`: how often the data were gone through before in it."""
        if self.empty(epoch, batch_idx, lap):
            return EMPTY
        opened = self.indexed.alone() if self.indexed is not None else self
        with self.begun.aside() if self.begun is not None else nullcontext():
            for batch in opened.open(epoch, batch_idx, lap):
                return batch
        raise IndexError(f"{self.name} has no batch {batch_idx} in epoch {epoch}.")

    def _fast_forward(self, batches: Iterator[Any], start: int) -> Iterator[Any]:
        if start:
            warn(
                f"{self.name} can't be repositioned, so its first {start} batches are read and thrown away. The run "
                "is exact only if it gives the same batches again. What makes it so: data with indices in a "
                "DataLoader; or state_dict and load_state_dict, of the data set with num_workers=0, or of the loader, "
                "as torchdata's StatefulDataLoader has them."
            )
            next(itertools.islice(batches, start - 1, start), None)
        return batches

    def close(self) -> None:
        """Stop persistent workers."""
        if self.indexed is not None:
            self.indexed.dismiss()
        elif self.iterable is not self.source:
            vars(self.iterable)["_iterator"] = None

    def standing(self, epoch: int, batch_idx: int) -> dict[str, int] | None:
        """Return where in the data all processes together are before a batch; None where each has its own."""
        if self.indexed is None or self.indexed.order.parts > 1:
            return None
        slices = self.indexed.slices_in(epoch)
        batch_size = batch_size_of(self.indexed.source)
        position = slices.begin(batch_idx) if batch_idx else 0
        return {"samples": position, "size": slices.size, "batch_size": batch_size, "parts": slices.parts}

    def go_on(self, epoch: int, batch_idx: int, saved: Mapping[str, int], multiple: int) -> int:
        """Go on where a run stood, with batches of the size that they have now; return the index of the next batch.

        Args:
            epoch: the running one.
            batch_idx: of the next batch, as it was counted there.
            saved: what `standing` returned there.
            multiple: the index is a multiple of it, unless the size has stayed: a new window begins.
        """
        indexed, position = self.indexed, saved["samples"]
        if indexed is None or indexed.slices.begin(batch_idx) == position:
            return batch_idx
        if saved["size"] != indexed.slices.size:
            if saved["parts"] == self.shard[1]:  # somebody has changed the DataLoader's batch size
                return batch_idx
            batch_idx = max(1, position // (indexed.slices.size * multiple)) * multiple
        if indexed.slices.begin(batch_idx) != position:
            indexed.go_on(epoch, batch_idx, position)
        return batch_idx

    def continue_order(self, before: Loader) -> None:
        """Draw the order from the seed of the loader that this one replaces."""
        self.reseed(before.seed)

    def reseed(self, seed: int | None) -> None:
        """Draw from another seed."""
        self.seed = seed
        if self.indexed is not None and seed is not None:
            self.indexed.order.seed = seed

    def state_dict(self) -> dict[str, Any]:
        """Return what the order is drawn from, and the position of a source that keeps its own."""
        state: dict[str, Any] = {"seed": self.seed}
        if self.remembered is not None:
            state["source"] = self.remembered.state_dict()
        if self.begun is not None:
            state["sampler"] = self.begun.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if "seed" not in state:
            raise CheckpointError(f"{self.name} is one loader, the checkpoint was written with several.")
        if state["seed"] is not None:
            self.reseed(state["seed"])
        if self.remembered is not None and "source" in state:
            self.remembered.load_state_dict(state["source"])
        if self.begun is not None and "sampler" in state:
            self.begun.load_state_dict(state["sampler"])
        self._resumed = True


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
