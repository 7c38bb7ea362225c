"""Fetch a batch of a data set with indices: each sample's random numbers its own, each error with the sample's name.

What a data set draws from torch's, numpy's and python's default sources while it loads a sample is a function of (seed,
epoch, position): neither which process loads it nor what was loaded before matters, and in the main process the run's
own random state is as it was. Seeding costs one to two microseconds a source, so only sources that are drawn from pay
it: the first samples show which these are. One that is drawn from later, once in a while, is noticed at the end of the
batch, which is loaded again. The same holds for a collate_fn of the user's own, with numbers for each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import default_collate, default_convert, get_worker_info

from trainkit.data.failure import Failure, from_signal, named
from trainkit.data.order import Placed
from trainkit.data.seeding import MASK, ODD, seed_all, sources
from trainkit.data.served import takes_batches
from trainkit.data.stacking import collate_of
from trainkit.data.standing import Standing, standing
from trainkit.data.whole import as_indices, gather_of

PROBED = 128
"""So many samples are loaded before a source that was not drawn from is no longer seeded for each."""


class Fetched:
    """What was fetched, on its way past the DataLoader's own collate_fn."""

    __slots__ = ("batch",)

    def __init__(self, batch: Any) -> None:
        self.batch = batch


class Collate:
    """The user's collate_fn, for whoever calls it with samples; what is fetched is collated already."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, data: Any) -> Any:
        return data.batch if type(data) is Fetched else self.collate_fn(data)


class Fetch:
    """Load the samples of a batch and put them together.

    Args:
        dataset: the user's.
        collate_fn: the user's.
        name: how messages call the loader.
        hand_over: give an error back as a `Failure`, which whoever receives the batch raises.
        draws: whether the data set may draw random numbers.
        pinned: put batches together in pinned memory where that is free; not in worker processes.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Any], Any],
        name: str,
        hand_over: bool = False,
        draws: bool = True,
        pinned: bool = False,
    ) -> None:
        self.pinned = pinned
        self.dataset, self.collate_fn, self.name, self.hand_over, self.draws = (
            dataset, collate_fn, name, hand_over, draws
        )  # fmt: skip
        self.by_batch = takes_batches(dataset)
        self.collate_draws = collate_fn is not default_collate and collate_fn is not default_convert
        self._forget()

    def _forget(self) -> None:
        self._probed = 0 if self.draws or self.collate_draws else PROBED
        self._in_loading: list[int] = []  # the sources that are drawn from while samples are loaded
        self._in_collating: list[int] = []  # and while they are put together
        self._sort()
        self._untouched = True  # whether nobody has seeded the sources, or drawn from them, for this batch
        self._samples: list[Any] | None = None  # of the batch that is being loaded; None while it is collated
        self._nothing: list[Any] = []  # the indices that the data set returned None for
        self._gather = gather_of(self.dataset, self.collate_fn)
        self._collate = collate_of(self.collate_fn, self.pinned)

    def _sort(self) -> None:
        """Work out which sources are seeded when, and which are watched: those that nobody has drawn from."""
        loading, collating = self._in_loading, self._in_collating
        may = self.draws or self.collate_draws
        self._seeds: list[Callable[[int], Any]] = [sources()[at].seed for at in loading]
        also = [at for at in collating if at not in loading]
        self._collate_seeds = [*self._seeds, *(sources()[at].seed for at in also)] if self.collate_draws else []
        self._watched_in_loading = also
        self._watched = [at for at in (0, 1, 2) if may and at not in loading and at not in collating]

    def __getstate__(self) -> dict[str, Any]:
        plain = {"dataset", "collate_fn", "name", "hand_over", "draws", "by_batch", "collate_draws", "pinned"}
        return {name: value for name, value in vars(self).items() if name in plain}  # sources lie in one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __call__(self, places: Placed, single: bool = False) -> Fetched:
        """Return the batch, or with `single` the one sample, at these places."""
        if get_worker_info() is None:
            return Fetched(self.here(places, single))
        try:
            return Fetched(self._batch(places, single, standing()))
        except BaseException as error:  # SystemExit, too: the main process would see a worker that is gone
            failed = self._named(error, places)
            if not self.hand_over:
                raise failed from failed.__cause__
            return Fetched(Failure(failed))

    def here(self, places: Placed, single: bool = False) -> Any:
        """Return the batch or the sample itself, loaded in this process, whose own random state stays as it is."""
        outside = standing() if self.draws or self.collate_draws else None
        self._untouched = False
        try:
            return self._batch(places, single, outside)
        except (Exception, GeneratorExit, SystemExit) as error:
            if isinstance(error, SystemExit) and from_signal(error):
                raise
            failed = self._named(error, places)
            if failed is error:
                raise
            raise failed from error
        finally:
            if outside is not None and not self._untouched:
                outside.give_back()

    def _batch(self, places: Placed, single: bool, outside: Standing | None) -> Any:
        if self._gather is not None:
            try:
                return self._gather(as_indices(places))
            except Exception:  # which one sample after the other will show
                self._gather = None
        if self._probed < PROBED:
            return self._probe(places, single)
        samples = self._load(places)
        if self._watched_in_loading and outside is not None and outside.moved(self._watched_in_loading):
            return self._probe(places, single)
        batch = self._put_together(samples, places, single)
        if self._watched and outside is not None and outside.moved(self._watched):
            return self._probe(places, single)
        self._untouched = not self._in_loading and not self._in_collating
        return batch

    def _put_together(self, samples: Any, places: Placed, single: bool) -> Any:
        self._samples = None
        for seed in self._collate_seeds:
            seed((places.seed + places.places.start * ODD + 1) & MASK)
        try:
            return self._collate(samples[0] if single else samples)
        except Exception:
            self._nothing = [i for i, sample in zip(places, samples, strict=False) if sample is None]
            raise

    # ------------------------------------------------------------------ loading
    def _load(self, places: Placed) -> Any:
        """Load the samples, each with the sources that are drawn from seeded for it."""
        dataset, seeds = self.dataset, self._seeds
        samples: list[Any] = []
        self._samples = samples
        if self.by_batch:
            own = (places.seed + places.places.start * ODD) & MASK
            for seed in seeds:
                seed(own)
            return dataset.__getitems__(places[:])
        if not seeds:
            for index in places:
                samples.append(dataset[index])
            return samples
        own, step = places.seed + places.places.start * ODD, places.places.step * ODD
        if len(seeds) == 1:
            seed = seeds[0]
            for index in places:
                seed(own & MASK)
                samples.append(dataset[index])
                own += step
        else:
            for index in places:
                for seed in seeds:
                    seed(own & MASK)
                samples.append(dataset[index])
                own += step
        return samples

    def _probe(self, places: Placed, single: bool) -> Any:
        """Load the batch with all sources seeded, and see which of them are drawn from."""
        samples: list[Any] = []
        self._samples = samples
        for index, place in zip(places, places.places, strict=True):
            seed_all((places.seed + place * ODD) & MASK)
            before = standing()
            if self.by_batch:
                samples = self.dataset.__getitems__(places[:])
            else:
                samples.append(self.dataset[index])
            self._in_loading += [at for at in before.moved((0, 1, 2)) if at not in self._in_loading]
            if self.by_batch:
                break
        if self.collate_draws:
            self._collate_seeds = [source.seed for source in sources()]
            seed_all((places.seed + places.places.start * ODD + 1) & MASK)
        before = standing()
        batch = self._put_together(samples, places, single)
        self._in_collating += [at for at in before.moved((0, 1, 2)) if at not in self._in_collating]
        self._probed += len(places)
        self._sort()
        return batch

    # ------------------------------------------------------------------ errors
    def _named(self, error: BaseException, places: Placed) -> BaseException:
        samples, positions = self._samples, places.places
        lies = f"of epoch {places.epoch} (batch {places.batch_idx})"
        if samples is not None and not self.by_batch and len(samples) < len(places):
            at = len(samples)
            where = f"loading the sample with index {places[at]!r} failed, at position {positions[at]} {lies}"
        else:
            doing = "loading" if samples is not None else "putting together"
            where = (
                f"{doing} the samples with the indices {places[:]} failed, from position {positions.start} on {lies}"
            )
            if samples is None and self._nothing:
                where += f". The data set returned None for {self._nothing}"
        return named(error, f"{self.name}: {where}.")
