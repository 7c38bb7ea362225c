"""Loader: the user's batches, the last one marked, from any batch on, with nothing kept and nothing left running."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import multiprocessing
import pickle
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from trainkit import Callback, Module, Trainer
from trainkit.data.loader import Loader, limited
from trainkit.data.samplers import in_sequence, length_of
from trainkit.data.workers import WorkerStart
from trainkit.errors import MisconfigurationException


class Numbers(Dataset[int]):
    """The numbers from 0 on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """So many numbers, with or without saying how many; each worker takes its part."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        worker = torch.utils.data.get_worker_info()
        step, first = (worker.num_workers, worker.id) if worker else (1, 0)
        yield from range(first, self.size, step)


class SizedStream(Stream):
    def __init__(self, size: int, claims: int) -> None:
        super().__init__(size)
        self.claims = claims

    def __len__(self) -> int:
        return self.claims


class Claims:
    """An iterable that says it has so many batches, or nothing about it, and has another number."""

    def __init__(self, batches: int, claims: int | None = None) -> None:
        self.batches, self.claims = batches, claims

    def __len__(self) -> int:
        if self.claims is None:
            raise TypeError
        return self.claims

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.batches))


def wrapped(source: Any, **settings: Any) -> Loader:
    return Loader(source, **{"name": "train_dataloader", "argument": "limit_train_batches", **settings})


def plain(batch: Any) -> Any:
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def taken(loader: Loader, epoch: int = 0, start: int = 0) -> list[tuple[int, Any, bool]]:
    return [(index, plain(batch), is_last) for index, batch, is_last in loader.epoch(epoch, start)]


# ---------------------------------------------------------------- any position of any epoch
class Single(BatchSampler):
    """A kind of batch sampler that is not torch's own."""


LOADERS: dict[str, Callable[[int, int, bool], DataLoader[Any]]] = {
    "in order": lambda n, b, drop: DataLoader(Numbers(n), b, drop_last=drop),
    "shuffled": lambda n, b, drop: DataLoader(Numbers(n), b, drop_last=drop, shuffle=True),
    "with a generator": lambda n, b, drop: DataLoader(
        Numbers(n), b, drop_last=drop, shuffle=True, generator=torch.Generator().manual_seed(n)
    ),
    "single samples": lambda n, b, drop: DataLoader(Numbers(n), batch_size=None, shuffle=True),
    "with a sampler": lambda n, b, drop: DataLoader(Numbers(n), b, drop_last=drop, sampler=RandomSampler(Numbers(n))),
    "with a batch sampler": lambda n, b, drop: DataLoader(
        Numbers(n), batch_sampler=BatchSampler(RandomSampler(Numbers(n)), b, drop)
    ),
    "collated": lambda n, b, drop: DataLoader(Numbers(n), b, drop_last=drop, shuffle=True, collate_fn=list),
}


@given(
    st.sampled_from(list(LOADERS)), st.integers(1, 40), st.integers(1, 7), st.booleans(), st.integers(0, 9), st.data()
)
def test_starting_anywhere_gives_the_rest_of_the_epoch(
    kind: str, size: int, batch_size: int, drop_last: bool, epoch: int, data: st.DataObject
) -> None:
    size = max(size, batch_size)
    source = LOADERS[kind](size, batch_size, drop_last)
    loader = wrapped(source)
    whole = taken(loader, epoch)
    assert [index for index, _, _ in whole] == list(range(len(source)))
    assert [is_last for _, _, is_last in whole] == [False] * (len(source) - 1) + [True]
    start = data.draw(st.integers(0, len(source)))
    taken(loader, epoch + 1)
    assert taken(loader, epoch, start) == whole[start:]
    again = wrapped(source)  # as after a restart: another seed, until the state is loaded
    again.load_state_dict(copy.deepcopy(loader.state_dict()))
    assert taken(again, epoch, start) == whole[start:]
    seen = list(itertools.chain.from_iterable(b if isinstance(b, list) else [b] for _, b, _ in whole))
    assert len(seen) == len(set(seen)) == (size - size % batch_size if drop_last and kind != "single samples" else size)


def test_each_epoch_is_shuffled_anew_and_what_is_not_shuffled_never() -> None:
    shuffled, ordered = wrapped(LOADERS["shuffled"](20, 4, False)), wrapped(LOADERS["in order"](20, 4, False))
    epochs = [str(taken(shuffled, epoch)) for epoch in range(5)]
    assert len(set(epochs)) == 5
    assert taken(ordered, 0) == taken(ordered, 3)
    assert taken(ordered)[0] == (0, [0, 1, 2, 3], False)


def test_workers_change_neither_the_order_nor_what_a_restart_gives() -> None:
    seeded = {"batch_size": 3, "shuffle": True}
    whole = taken(wrapped(DataLoader(Numbers(14), generator=torch.Generator().manual_seed(5), **seeded)), epoch=2)
    with_workers = wrapped(DataLoader(Numbers(14), generator=torch.Generator().manual_seed(5), num_workers=2, **seeded))
    assert taken(with_workers, 2) == whole
    assert taken(with_workers, 2, start=3) == whole[3:]


def test_the_order_follows_the_generator_that_was_given() -> None:
    def order(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return taken(wrapped(DataLoader(Numbers(20), 4, shuffle=True, generator=generator)))

    assert order(1) == order(1) != order(2)


def test_the_order_follows_the_seed_of_the_run_where_none_was_given() -> None:
    def order(seed: int) -> Any:
        torch.manual_seed(seed)
        return taken(wrapped(DataLoader(Numbers(20), 4, shuffle=True)))

    assert order(1) == order(1) != order(2)


def test_a_sampler_over_other_data_decides_which_samples_there_are() -> None:
    for sampler in (RandomSampler(range(3)), SequentialSampler(range(3))):
        loader = wrapped(DataLoader(Numbers(10), batch_size=1, sampler=sampler))
        assert loader.num_batches == 3
        assert sorted(batch[0] for _, batch, _ in taken(loader)) == [0, 1, 2]


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(10), replacement=True),
        RandomSampler(range(10), replacement=True, num_samples=25),
        RandomSampler(range(10), num_samples=4),
        RandomSampler(range(10), num_samples=25),
        WeightedRandomSampler([0.0] * 9 + [1.0], 8),
        SubsetRandomSampler([2, 4, 6]),
        Subset(range(10), [3, 1, 2, 5]).indices,
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_other_samplers_keep_their_order_which_is_a_function_of_seed_and_epoch(sampler: Any) -> None:
    def loader(seed: int = 1) -> Loader:
        return wrapped(DataLoader(Numbers(10), batch_size=2, sampler=sampler), seed=seed)

    epoch = taken(loader(), 3)
    assert sum(len(batch) for _, batch, _ in epoch) == len(sampler)
    torch.manual_seed(3)
    assert taken(loader(), 3, start=1) == epoch[1:]
    if isinstance(sampler, RandomSampler):
        assert len({str(taken(loader(seed), epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_a_batch_sampler_of_another_kind_keeps_its_batches_on_a_restart_too() -> None:
    def loader() -> Loader:
        batches = Single(RandomSampler(range(10)), 4, False)
        return wrapped(DataLoader(Numbers(10), batch_sampler=batches), seed=5)

    epoch = taken(loader(), 1)
    with pytest.warns(UserWarning, match="may not be what it would have been: Single decides it"):
        assert taken(loader(), 1, start=2) == epoch[2:]


class Counts(Sampler[int]):
    """Note which epochs it was told about."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("where", ["sampler", "batch sampler's sampler", "iterable"])
def test_a_sampler_with_set_epoch_is_told_the_epoch(where: str) -> None:
    sampler = Counts()
    if where == "sampler":
        source: Any = DataLoader(Numbers(4), sampler=sampler)
    elif where == "iterable":
        source = Claims(3)
        source.sampler = sampler
    else:
        source = DataLoader(Numbers(4), batch_sampler=BatchSampler(sampler, 2, False))
    loader = wrapped(source)
    for epoch in (0, 1, 7):
        taken(loader, epoch)
    assert sorted(set(sampler.epochs)) == [0, 1, 7]


def test_what_can_not_be_repositioned_is_read_up_to_there_and_says_so() -> None:
    for source in (Claims(5, 5), Claims(5), DataLoader(Stream(5), batch_size=None)):
        loader = wrapped(source)
        with pytest.warns(UserWarning, match="train_dataloader can't be repositioned, so its first 3 batches are read"):
            assert taken(loader, 0, start=3) == [(3, 3, False), (4, 4, True)]
    with pytest.warns(UserWarning, match="can't be repositioned"):
        assert taken(wrapped(Claims(5)), 0, start=5) == []  # nothing is left of the epoch
    assert taken(wrapped(Claims(5, 5)), 0, start=5) == []


def test_in_sequence_takes_the_data_in_their_own_order() -> None:
    for sampler in (None, WeightedRandomSampler([1.0] * 6, 6), RandomSampler(range(6))):
        source = DataLoader(Numbers(6), 2, shuffle=None if sampler else True, sampler=sampler)
        loader = wrapped(in_sequence(source))
        assert [batch for _, batch, _ in taken(loader, 3)] == [[0, 1], [2, 3], [4, 5]]
        assert taken(loader, 3, start=1)[0] == (1, [2, 3], False)
        assert type(source.sampler) is not SequentialSampler  # the user's own is as it was
    for source in (DataLoader(SizedStream(6, 6), 2), DataLoader(Numbers(6), 2), [1, 2]):
        assert in_sequence(source) is source


# ---------------------------------------------------------------- loaders with ideas of their own
class Doubles(DataLoader[Any]):
    """Change what torch's own iteration gives."""

    def __iter__(self) -> Any:
        return (batch * 2 for batch in super().__iter__())


class OwnOrder(DataLoader[Any]):
    """Iterate without ever asking the sampler."""

    def __iter__(self) -> Any:
        return iter(torch.arange(len(self.dataset)).split(self.batch_size or 1))  # type: ignore[arg-type]


def test_a_subclass_that_iterates_over_torchs_iteration_starts_anywhere() -> None:
    loader = wrapped(Doubles(Numbers(10), 3, shuffle=True))
    whole = taken(loader, 1)
    assert sorted(itertools.chain.from_iterable(batch for _, batch, _ in whole)) == list(range(0, 20, 2))
    assert taken(loader, 1, start=2) == whole[2:]
    fresh = wrapped(Doubles(Numbers(10), 3, shuffle=True))
    fresh.load_state_dict(loader.state_dict())
    assert taken(fresh, 1, start=2) == whole[2:]


@pytest.mark.parametrize("first", [0, 2])
def test_a_subclass_that_has_an_order_of_its_own_keeps_it(first: int) -> None:
    loader = wrapped(OwnOrder(Numbers(10), 3, shuffle=True))
    expected = [(0, [0, 1, 2], False), (1, [3, 4, 5], False), (2, [6, 7, 8], False), (3, [9], True)]
    if first == 0:
        assert taken(loader) == expected
    with pytest.warns(UserWarning, match="can't be repositioned"):
        assert taken(loader, 0, start=2) == expected[2:]
    assert taken(loader) == expected
    loader.load_state_dict(loader.state_dict())


class Stateful(DataLoader[Any]):
    """Has a position of its own, as torchdata's StatefulDataLoader."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_loader_with_a_state_of_its_own_is_used_as_it_is() -> None:
    source = Stateful(Numbers(6), 2)
    loader = wrapped(source)
    assert loader.iterable is source
    assert taken(loader) == [(0, [0, 1], False), (1, [2, 3], False), (2, [4, 5], True)]
    with pytest.warns(UserWarning, match="can't be repositioned"):
        assert taken(loader, 0, start=2) == [(2, [4, 5], True)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_users_object_and_random_state_stay_as_they_are(shuffle: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.arange(10)
    source = DataLoader(numbers, 4, shuffle=shuffle, generator=generator, worker_init_fn=print)  # type: ignore[arg-type]
    before = dict(vars(source))
    loader = wrapped(source)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state()), generator.get_state()
    taken(loader, 0)
    taken(loader, 1, start=1)
    loader.close()
    assert vars(source) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == states[2]
    assert torch.equal(generator.get_state(), states[3])


# ---------------------------------------------------------------- limits and the last batch
@pytest.mark.parametrize(
    ("source", "limit", "num_batches", "batches"),
    [
        (lambda: Claims(5, 5), 1.0, 5, 5),
        (lambda: Claims(5, 5), 3, 3, 3),
        (lambda: Claims(5, 5), 8, 5, 5),
        (lambda: Claims(5, 5), 0.5, 2, 2),
        (lambda: Claims(5, 5), 0, 0, 0),
        (lambda: Claims(5, 5), 0.0, 0, 0),
        (lambda: Claims(5), 1.0, math.inf, 5),
        (lambda: Claims(5), 3, 3, 3),
        (lambda: Claims(5), 8, 8, 5),  # the limit is an upper bound here, and nothing was promised
        (lambda: Claims(5), 0, 0, 0),
        (lambda: Claims(5), 0.0, 0, 0),
        (lambda: Claims(8, 5), 1.0, 5, 5),
        (lambda: Claims(0, 0), 0, 0, 0),
        (lambda: Claims(1, 1), 1.0, 1, 1),
        (lambda: Claims(1), 1.0, math.inf, 1),
        (lambda: DataLoader(Stream(5), batch_size=None), 1.0, math.inf, 5),
        (lambda: DataLoader(Stream(5), batch_size=None), 2, 2, 2),
        (lambda: DataLoader(SizedStream(5, 5), batch_size=None), 0.4, 2, 2),
    ],
)
def test_as_many_batches_come_as_the_limit_says_and_the_last_is_marked(
    source: Callable[[], Any], limit: float, num_batches: float, batches: int
) -> None:
    loader = wrapped(source(), limit=limit)
    assert loader.num_batches == num_batches
    for epoch in range(2):
        assert taken(loader, epoch) == [(index, index, index == batches - 1) for index in range(batches)]
    if num_batches:
        two = loader.limited_to(2)
        assert len(taken(two)) == min(2, batches)
        assert loader.num_batches == num_batches


def test_a_loader_that_yields_less_than_it_claims_ends_there_and_says_so_once() -> None:
    loader = wrapped(Claims(3, 5))
    with pytest.warns(UserWarning, match="train_dataloader yielded 3 batches although its length is 5"):
        assert taken(loader) == [(0, 0, False), (1, 1, False), (2, 2, True)]
    assert len(taken(loader, 1)) == 3
    stream = wrapped(DataLoader(SizedStream(3, 5), batch_size=None))
    with pytest.warns(UserWarning, match="yielded 3 batches although its length is 5"):
        assert taken(stream)[-1] == (2, 2, True)


@pytest.mark.parametrize(
    ("source", "limit", "message"),
    [
        (lambda: Claims(0, 0), 1.0, "train_dataloader is empty: its length is 0.*limit_train_batches=0 leaves it out"),
        (lambda: DataLoader(Numbers(0)), 1.0, "is empty"),
        (lambda: DataLoader(Numbers(3), 4, drop_last=True), 1.0, "batches small enough for drop_last"),
        (lambda: Claims(5), 0.5, r"limit_train_batches=0\.5 is a fraction, but train_dataloader has no length"),
        (lambda: Claims(5, 5), 0.1, r"leaves no batch of the 5 in train_dataloader. Give at least 0\.2"),
    ],
)
def test_a_loader_that_gives_nothing_is_refused_when_it_is_wrapped(
    source: Callable[[], Any], limit: float, message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        wrapped(source(), limit=limit)


def test_a_loader_that_turns_out_to_be_empty_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="yielded no batch although its length is 4"):
        taken(wrapped(Claims(0, 4)))
    trainer = trainer_of(max_epochs=-1, max_steps=1)
    with pytest.raises(MisconfigurationException, match="no batch, and max_epochs=-1 would wait for it forever"):
        trainer.fit(Line(), Claims(0))


def test_a_stream_without_a_batch_ends_the_epoch_at_once_with_a_warning() -> None:
    trainer = trainer_of(max_epochs=2)
    with pytest.warns(UserWarning, match="train_dataloader yielded no batch: the epoch is over at once"):
        trainer.fit(Line(), Claims(0))
    assert (trainer.current_epoch, trainer.global_step) == (2, 0)


def test_a_generator_lasts_for_one_epoch_and_the_warning_says_so() -> None:
    loader = wrapped(batch for batch in range(3))
    assert [batch for _, batch, _ in taken(loader)] == [0, 1, 2]
    with pytest.warns(UserWarning, match="A generator can be read once only"):
        assert taken(loader, 1) == []


@pytest.mark.parametrize("source", [3, None, object(), Numbers, "batches"], ids=repr)
def test_what_is_no_iterable_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match=r"train_dataloader must be an iterable of batches\. Received: "):
        wrapped(source)


def test_a_data_set_in_the_place_of_a_loader_gets_the_hint() -> None:
    for dataset in (Numbers(3), TensorDataset(torch.ones(3)), Subset(Numbers(3), [0])):
        with pytest.raises(TypeError, match=r"Wrap the data set: DataLoader\(dataset, batch_size=\.\.\.\)"):
            wrapped(dataset)
    assert len(taken(wrapped(Stream(3)))) == 3  # this one is iterable: its items may be batches


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_a_fraction_is_rounded_down_and_never_to_nothing(length: int, fraction: float) -> None:
    if fraction == 0 or int(length * fraction):
        assert limited(length, fraction, "loader", "limit") == int(length * fraction) <= length
    else:
        with pytest.raises(MisconfigurationException, match="leaves no batch"):
            limited(length, fraction, "loader", "limit")


def test_a_length_is_infinite_where_there_is_none() -> None:
    assert length_of([1, 2]) == 2
    assert length_of(Claims(3)) == math.inf
    assert length_of(DataLoader(Stream(3))) == math.inf
    assert length_of(iter([1])) == math.inf


# ---------------------------------------------------------------- workers
def children() -> set[Any]:
    return set(multiprocessing.active_children())


class Line(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.line(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(**settings: Any) -> Trainer:
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**bare, **settings})


class Workers(Callback):
    """Note which processes there are in the middle of each epoch."""

    def __init__(self) -> None:
        self.seen: list[set[Any]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.seen.append(children())


def test_persistent_workers_serve_every_epoch_and_are_gone_after_the_run() -> None:
    source = DataLoader(Numbers(8), 2, shuffle=True, num_workers=1, persistent_workers=True)
    before, workers = children(), Workers()
    trainer_of(max_epochs=2, callbacks=workers).fit(Line(), source, DataLoader(Numbers(2), num_workers=1))
    assert len(workers.seen[0] - before) == 1
    assert workers.seen[0] <= workers.seen[1]
    assert children() <= before
    assert source._iterator is None


def test_workers_are_gone_after_an_error_too() -> None:
    class Fails(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise RuntimeError("in the step")
            return super().training_step(batch, batch_idx)

    before = children()
    with pytest.raises(RuntimeError, match="in the step"):
        trainer_of(max_epochs=1).fit(Fails(), DataLoader(Numbers(8), 2, num_workers=1, persistent_workers=True))
    assert children() <= before


def remember(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.size += 100 * (worker + 1)  # type: ignore[union-attr]


class Sizes(Numbers):
    def __getitem__(self, index: int) -> int:
        import signal

        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return self.size


def test_a_worker_runs_the_users_own_start_and_ignores_ctrl_c() -> None:
    loader = wrapped(DataLoader(Sizes(2), num_workers=1, worker_init_fn=remember))
    assert [batch for _, batch, _ in taken(loader)] == [[102], [102]]
    copied = pickle.loads(pickle.dumps(WorkerStart(remember)))  # as workers that are spawned get it
    assert copied.then is remember


# ---------------------------------------------------------------- memory
class Batches:
    """Make batches one at a time and remember, weakly, which are alive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.count):
            batch = torch.zeros(3)
            self.alive.add(batch)
            yield batch
            del batch


def test_only_the_current_batch_and_the_next_are_kept() -> None:
    class Looks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            alive.append(len(source.alive))

        def on_train_epoch_end(self, *_: Any) -> None:
            alive.append(len(source.alive))

        def on_train_end(self, *_: Any) -> None:
            alive.append(len(source.alive))

    class Logs(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_epoch=True)
            return loss

    alive: list[int] = []
    source = Batches(5)
    trainer = trainer_of(max_epochs=1, callbacks=Looks())
    trainer.fit(Logs(), source)
    assert alive[:4] == [2, 2, 2, 2]
    assert max(alive) == 2
    gc.collect()
    assert len(source.alive) == 0


def test_an_epoch_that_is_left_early_lets_go_of_everything() -> None:
    source = Batches(5)
    epoch = wrapped(source).epoch(0)
    next(epoch)
    assert len(source.alive) == 2
    epoch.close()
    del epoch
    assert len(source.alive) == 0


def test_no_warning_is_given_where_nothing_is_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in LOADERS.values():
            taken(wrapped(make(10, 3, True)))


# ---------------------------------------------------------------- a run that is taken up again
class Noisy(Dataset[Any]):
    """Draws from all three sources for each sample."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        noise = random.gauss(0, 1) + np.random.rand() + torch.rand(1)
        return torch.tensor([float(index)]) / 30 + noise, torch.tensor([1.0])


class Fits(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        losses = [(self.net(x) - y).square().mean() + 0.01 * random.random() for x, y in parts]
        self.seen.append([self.trainer.current_epoch, batch_idx, *(loss.item() for loss in losses), np.random.rand()])
        return sum(losses)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(["validation", self.trainer.global_step, float(batch[0].sum())])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def fitted(
    path: Path, workers: int, max_steps: int = -1, resume: bool = False, several: bool = False, **settings: Any
) -> Fits:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    module = Fits()
    kind = {"num_workers": workers, "persistent_workers": workers > 1, "shuffle": True}
    loader: Any = DataLoader(Noisy(), 4, **kind)
    if several:
        loader = {"a": loader, "b": DataLoader(Noisy(), 7, **kind)}
    trainer = trainer_of(max_epochs=3, max_steps=max_steps, val_check_interval=3, **settings)
    last = str(path / "last.ckpt")
    trainer.fit(
        module, loader, DataLoader(Noisy(), 10, num_workers=min(workers, 1)), ckpt_path=last if resume else None
    )
    if max_steps > 0:
        trainer.save_checkpoint(last)
    return module


@pytest.mark.parametrize("settings", [{}, {"several": True}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_run_that_is_taken_up_with_other_workers_is_the_same_to_the_last_bit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = fitted(tmp_path, 0, **settings)
    weights = [parameter.tolist() for parameter in whole.parameters()]
    for stop, before, after in ((2, 0, 2), (5, 2, 0), (9, 1, 2)):
        begun = fitted(tmp_path, before, stop, **settings)
        ended = fitted(tmp_path, after, resume=True, **settings)
        assert begun.seen + ended.seen == whole.seen
        assert [parameter.tolist() for parameter in ended.parameters()] == weights
