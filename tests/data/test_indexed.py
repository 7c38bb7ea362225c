"""Any batch of any epoch, alone or from there on: the same samples, from the same draws, for any number of workers."""

from __future__ import annotations

import itertools
import random
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trainkit.data.combined import Combination
from trainkit.data.loader import Loader
from trainkit.data.seeding import states


class Noisy(Dataset[Any]):
    def __init__(self, size: int = 30) -> None:
        self.size = size
        self.loaded = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.loaded += 1
        return index, random.random(), np.random.rand(), float(torch.rand(1))


class Draws(Sampler[int]):
    """Draws from all three sources as it goes."""

    def __len__(self) -> int:
        return 30

    def __iter__(self) -> Iterator[int]:
        for _ in range(30):
            yield random.randrange(30) if np.random.rand() < 0.5 else int(torch.randint(30, ()))


class Growing:
    """Batches of different sizes; not a subclass of anything."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(30).tolist()
        return (order[start:stop] for start, stop in itertools.pairwise([0, 3, 10, 14, 22, 30]))


class Noted(Sampler[int]):
    """Keeps its epoch and its position, and an order of its own."""

    def __init__(self) -> None:
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return 30

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(30, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < 30:
            self.position += 1
            yield order[self.position - 1]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def given(size: int) -> torch.Generator:
    return torch.Generator().manual_seed(size)


KNOWN: dict[str, Callable[..., DataLoader[Any]]] = {
    "shuffled": lambda **more: DataLoader(Noisy(), 4, shuffle=True, **more),
    "in order, the last dropped": lambda **more: DataLoader(Noisy(), 4, drop_last=True, **more),
    "single samples": lambda **more: DataLoader(Noisy(), None, shuffle=True, **more),
    "a part": lambda **more: DataLoader(Subset(Noisy(), range(5, 28)), 4, shuffle=True, **more),
}
TORCHS: dict[str, Callable[..., DataLoader[Any]]] = {
    "weighted": lambda **more: DataLoader(
        Noisy(), 4, sampler=WeightedRandomSampler(torch.arange(1.0, 31.0).tolist(), 40, generator=given(1)), **more
    ),
    "with replacement": lambda **more: DataLoader(Noisy(), 4, sampler=RandomSampler(range(30), True, 70), **more),
    "subset": lambda **more: DataLoader(Noisy(), 4, sampler=SubsetRandomSampler(range(3, 20)), **more),
    "batches as samples": lambda **more: DataLoader(
        Listed(), None, sampler=BatchSampler(RandomSampler(range(30)), 4, False), **more
    ),
    "a list": lambda **more: DataLoader(Noisy(), 4, sampler=[5, 3, 9, 1, 1, 20, 7, *range(9)], **more),
}
OWN: dict[str, Callable[..., DataLoader[Any]]] = {
    "draws as it goes": lambda **more: DataLoader(Noisy(), 4, sampler=Draws(), **more),
    "batches of its own": lambda **more: DataLoader(Noisy(), batch_sampler=Growing(), **more),
}
ALL = {**KNOWN, **TORCHS, **OWN, "with a state": lambda **more: DataLoader(Noisy(), 4, sampler=Noted(), **more)}


class Listed(Noisy):
    """Takes a list of indices for an index."""

    def __getitem__(self, index: Any) -> Any:
        return [Noisy.__getitem__(self, one) for one in index]


def wrapped(kind: str, **more: Any) -> Loader:
    return Loader(ALL[kind](**more), name="data", argument="limit", seed=3)


def batches(loader: Loader, epoch: int, start: int = 0) -> list[str]:
    taken = [str(batch) for _, batch, _ in loader.epoch(epoch, start)]
    loader.close()
    return taken


@pytest.mark.parametrize("kind", ALL)
def test_an_epoch_goes_on_from_any_batch_with_any_number_of_workers(kind: str) -> None:
    loader = wrapped(kind)
    before = states()
    epochs = [batches(loader, epoch) for epoch in range(2)]
    assert torch.equal(before[0], states()[0])
    assert before[1:] == states()[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind in OWN else "error")
        for workers, start in ((0, 3), (2, 2), (1, 0)):
            state = None
            going = wrapped(kind, num_workers=workers)
            for epoch in range(2):
                if state is not None:
                    going.load_state_dict(state)
                opened = going.epoch(epoch)
                seen = [str(next(opened)[1]) for _ in range(start)]
                state = going.state_dict()
                del opened
                going = wrapped(kind, num_workers=2 - workers)  # as after a restart
                going.load_state_dict(state)
                seen += batches(going, epoch, start)
                state = going.state_dict()
                assert seen == epochs[epoch], (workers, start, epoch)


@pytest.mark.parametrize("kind", [*KNOWN, *TORCHS])
def test_the_batches_that_are_skipped_are_not_loaded(kind: str) -> None:
    source = ALL[kind]()
    loader = Loader(source, name="data", argument="limit", seed=3)
    count = len(batches(loader, 1))
    noisy: Any = getattr(source.dataset, "dataset", source.dataset)
    noisy.loaded = 0
    assert len(batches(loader, 1, count - 1)) == 1
    assert noisy.loaded <= 4


@pytest.mark.parametrize("kind", OWN)
def test_a_sampler_that_nothing_is_known_of_is_told_of_on_a_resume(kind: str) -> None:
    loader = wrapped(kind)
    assert len(batches(loader, 0)) > 0  # nothing is said before
    name = "Draws" if kind == "draws as it goes" else "Growing"
    with pytest.warns(UserWarning, match=f"the order of data after this resume may not .* {name} decides it"):
        batches(loader, 0, 1)


def test_a_sampler_that_is_told_the_epoch_is_taken_at_its_word() -> None:
    class Told(Draws):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(30, generator=given(self.epoch)).tolist())

    def loader() -> Loader:
        return Loader(DataLoader(Noisy(), 4, sampler=Told()), name="data", argument="limit", seed=1)

    assert batches(loader(), 4, 3) == batches(loader(), 4)[3:]
    assert batches(loader(), 4) != batches(loader(), 5)


# ---------------------------------------------------------------- one batch alone
@pytest.mark.parametrize("kind", ALL)
def test_a_batch_can_be_had_alone_while_somebody_goes_through_the_loader(kind: str) -> None:
    for workers in (0, 1):
        loader = wrapped(kind, num_workers=workers)
        seen: list[Any] = []
        for index, batch, _ in loader.epoch(1):
            seen.append(batch)
            if index == 2:
                before = states()
                assert str(loader.batch_at(1, 1)) == str(seen[1])
                assert torch.equal(before[0], states()[0])
        assert [str(batch) for batch in seen] == batches(wrapped(kind), 1)
        loader.close()
        with pytest.raises(IndexError, match=f"data has no batch {len(seen)} in epoch 1"):
            loader.batch_at(1, len(seen))


@pytest.mark.parametrize("kind", [*KNOWN, *OWN, "weighted", "with a state"])
def test_the_samples_of_a_batch_are_known(kind: str) -> None:
    loader = wrapped(kind)
    for index, batch, _ in loader.epoch(2):
        indices = batch[0].tolist() if isinstance(batch[0], torch.Tensor) else [batch[0]]
        offset = 5 * (kind == "a part")
        assert loader.samples_of(2, index) == [number - offset for number in indices]


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
def test_a_batch_of_several_loaders_can_be_had_alone(mode: Any) -> None:
    loaders = [
        Loader(DataLoader(Noisy(size), 4, shuffle=True), name=f"data {size}", argument="limit", seed=size)
        for size in (30, 9)
    ]
    several = Combination(loaders, [[], []], mode, "data")
    for index, batch, _ in several.epoch(1):
        assert str(several.batch_at(1, index)) == str(batch)
        samples = several.samples_of(1, index)
        assert samples == [part if part is None else part[0].tolist() for part in batch]
    with pytest.raises(IndexError, match="no batch 8"):
        several.batch_at(1, 8)


def test_what_has_no_indices_has_no_samples_to_name() -> None:
    stream = Loader([1, 2, 3], name="data", argument="limit")
    assert stream.samples_of(0, 1) is None
    with pytest.warns(UserWarning, match="can't be repositioned"):
        assert stream.batch_at(0, 1) == 2


# ---------------------------------------------------------------- large data
class Huge(Dataset[int]):
    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_huge_epoch_goes_on_from_its_middle_in_little_memory(shuffle: bool) -> None:
    loader = Loader(DataLoader(Huge(), 32, shuffle=shuffle), name="data", argument="limit", seed=1)
    assert loader.num_batches == 31_250_000
    next(loader.epoch(0, 5))
    tracemalloc.start()
    try:
        opened = loader.epoch(0, 1_000_000)
        index, batch, _ = next(opened)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (index, batch.tolist()) == (1_000_000, loader.samples_of(0, 1_000_000))
    assert most < 500_000
