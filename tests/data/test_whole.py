"""Batches that are gathered from tensors: to the last bit, stride and type what torch's own way gives."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import trainkit.data.stacking
from trainkit.data.combined import Combination
from trainkit.data.loader import Loader
from trainkit.data.whole import gather_of

X = torch.arange(30.0).reshape(30, 1).repeat(1, 5) + torch.arange(5) / 8
Y = torch.arange(30) * 3
PAIRS = TensorDataset(X, Y)


class Named(TensorDataset):
    """Has an idea of its own, though not of how a sample is loaded."""

    classes = ("a", "b")


def split(part: int) -> Any:
    return random_split(PAIRS, [20, 10], generator=torch.Generator().manual_seed(1))[part]


GATHERED: dict[str, Callable[[], Any]] = {
    "tensors": lambda: PAIRS,
    "one tensor": lambda: TensorDataset(X),
    "a subclass": lambda: Named(X, Y),
    "the tensor itself": lambda: X,
    "numbers": lambda: Y,
    "images": lambda: TensorDataset(torch.rand(30, 3, 4, 5), torch.rand(30, 1, 4, 4), torch.rand(30, 1, 1, 1)),
    "kinds of numbers": lambda: TensorDataset(X.half(), X.bfloat16(), Y.bool(), Y.to(torch.uint8), X.to(torch.cfloat)),
    "no numbers": lambda: TensorDataset(torch.empty(30, 0), torch.empty(30, 3, 0)),
    "a split": lambda: split(0),
    "a part of a part": lambda: Subset(split(0), range(15, 3, -1)),
    "a part by a tensor": lambda: Subset(PAIRS, torch.tensor([3, 1, 29, 3])),
    "a part by an array": lambda: Subset(PAIRS, np.array([3, 1, 29, 3])),
    "a part from behind": lambda: Subset(PAIRS, [-1, 3, -30, 5, 6]),
    "a part of a tensor": lambda: Subset(Y, (5, 4, 3, 9)),
    "parts again": lambda: ConcatDataset([split(0), TensorDataset(X + 100, Y), split(1)]),
    "parts of a tensor": lambda: ConcatDataset([X, X[:7]]),
    "named": lambda: StackDataset(image=PAIRS, label=Y, again=split_of_30()),
    "side by side": lambda: StackDataset(PAIRS, Y),
    "parts that are named": lambda: ConcatDataset([StackDataset(a=X, b=PAIRS), StackDataset(a=X + 1, b=PAIRS)]),
}


def split_of_30() -> Any:
    return Subset(X, torch.randperm(30, generator=torch.Generator().manual_seed(2)).tolist())


SAMPLED: dict[str, Callable[[], Any]] = {
    "learned": lambda: TensorDataset(X.clone().requires_grad_(), Y),
    "another kind of tensor": lambda: TensorDataset(torch.nn.Parameter(X, requires_grad=False)),
    "turned": lambda: TensorDataset(torch.arange(60.0).reshape(2, 30).t()),
    "channels last": lambda: TensorDataset(torch.rand(30, 3, 4, 5).to(memory_format=torch.channels_last)),
    "repeated": lambda: TensorDataset(torch.rand(1, 5).expand(30, 5)),
    "conjugated": lambda: TensorDataset(X.to(torch.cfloat).conj()),
    "of unequal kinds": lambda: ConcatDataset([TensorDataset(X), TensorDataset(X.double())]),
    "a part by floats": lambda: Subset(PAIRS, torch.arange(4, dtype=torch.int32)),
    "samples of its own": lambda: Shifted(X, Y),
    "batches of its own": lambda: ByBatch(X, Y),
    "a list beside it": lambda: StackDataset(X, list(range(30))),
}


class Shifted(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(tensor[index] + 1 for tensor in self.tensors)


class ByBatch(TensorDataset):
    def __getitems__(self, indices: list[int]) -> Any:
        return [tuple(tensor[index] - 1 for tensor in self.tensors) for index in indices]


def loader_of(data: Any, batch_size: int = 4, **settings: Any) -> Loader:
    return Loader(DataLoader(data, batch_size, **settings), name="data", argument="limit", seed=5)


def batches_of(loader: Loader, epoch: int = 0, start: int = 0) -> list[Any]:
    return [batch for _, batch, _ in loader.epoch(epoch, start)]


def look(batch: Any) -> Any:
    """Return all there is to see of a batch."""
    if isinstance(batch, torch.Tensor):
        grad = batch.requires_grad
        return type(batch), batch.dtype, batch.shape, batch.stride(), grad, batch.is_shared(), batch.tolist()
    if isinstance(batch, dict):
        return type(batch), {name: look(part) for name, part in batch.items()}
    return (type(batch), list(map(look, batch))) if isinstance(batch, (list, tuple)) else batch


def by_torch(loader: Loader, data: Any, epoch: int = 0) -> list[Any]:
    """Return the batches as torch fetches them, in the order that the loader says."""
    count = int(loader.num_batches)
    return [torchs_batch(data, loader.samples_of(epoch, index) or []) for index in range(count)]


def torchs_batch(data: Any, indices: list[int]) -> Any:
    return next(iter(DataLoader(data, batch_sampler=[indices])))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", [*GATHERED, *SAMPLED])
def test_a_batch_is_what_torchs_own_way_makes_of_its_samples(kind: str, shuffle: bool) -> None:
    data = {**GATHERED, **SAMPLED}[kind]()
    assert (gather_of(data, default_collate) is not None) == (kind in GATHERED)
    for settings in ({}, {"drop_last": True}):
        loader = loader_of(data, shuffle=shuffle, **settings)
        batches = batches_of(loader)
        assert len(batches) == loader.num_batches
        assert look(batches) == look(by_torch(loader, data))
        assert look(batches_of(loader, 0, 1)) == look(batches[1:])


@pytest.mark.parametrize("kind", GATHERED)
def test_a_batch_can_be_changed_and_the_data_stay_as_they_are(kind: str) -> None:
    def change(batch: Any) -> None:
        for part in batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list) else ():
            change(part)
        if isinstance(batch, torch.Tensor):
            batch.zero_()

    for shuffle in (True, False):
        data = GATHERED[kind]()
        loader = loader_of(data, batch_size=len(data), shuffle=shuffle)
        before = look(batches_of(loader))
        change(batches_of(loader)[0])
        assert look(batches_of(loader)) == before


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler([1.0] * 30, 50),
        RandomSampler(range(30), replacement=True, num_samples=41),
        [3, 1, 29, -1, 7],
        [np.int64(4), np.int64(2), 3, 3],
        [torch.tensor(4), torch.tensor(2), 3, 3],
    ],
    ids=range(5),
)
def test_any_sampler_is_followed(sampler: Any) -> None:
    loader = loader_of(PAIRS, sampler=sampler)
    batches, whole = batches_of(loader, 2), loader_of(Sampled(), sampler=sampler)
    assert look(batches) == look(batches_of(whole, 2))
    assert look(batches_of(loader_of(PAIRS, sampler=sampler, drop_last=True), 2)) == look(
        [batch for batch in batches if len(batch[0]) == 4]
    )
    batch_sampler: Any = BatchSampler(sampler, 3, False)
    loader = Loader(DataLoader(PAIRS, batch_sampler=batch_sampler), name="data", argument="limit", seed=5)
    assert len(batches_of(loader)) == len(batch_sampler)


class Sampled(Dataset[Any]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: Any) -> Any:
        return X[index], Y[index]


def test_workers_change_nothing_and_are_left_out_where_nobody_is_told_of_them() -> None:
    expected = look(batches_of(loader_of(PAIRS, shuffle=True), 1))
    before = set(multiprocessing.active_children())
    opened = loader_of(PAIRS, shuffle=True, num_workers=2, persistent_workers=True, timeout=5).epoch(1)
    batches = [next(opened)[1]]
    assert set(multiprocessing.active_children()) == before
    assert look(batches + [batch for _, batch, _ in opened]) == expected
    told = loader_of(PAIRS, shuffle=True, num_workers=1, worker_init_fn=noted)
    batches = batches_of(told, 1)
    told.close()
    assert [batch[0].tolist() for batch in batches] == [part[1][0][-1] for part in expected[1]]


def noted(worker: int) -> None:
    assert worker == 0


# ---------------------------------------------------------------- what changes on the way
def test_data_that_are_exchanged_or_changed_meanwhile_are_seen_at_once() -> None:
    data, part = TensorDataset(X.clone(), Y), [0, 1, 2, 3]
    opened = loader_of(Subset(data, part), 2).epoch(0)
    assert next(opened)[1][1].tolist() == [0, 3]
    part[2:] = [7, 8]
    data.tensors[0][7] = -1.0
    (x, y), last = next(opened)[1:]
    assert (x[0].tolist(), y.tolist(), last) == ([-1.0] * 5, [21, 24], True)

    opened = loader_of(data, 2).epoch(0)
    next(opened)
    data.tensors = (X * 2, X.t().reshape(30, 5), Y)
    assert look(next(opened)[1]) == look(torchs_batch(data, [2, 3]))
    data.tensors = (X.t().clone().t(), Y)
    assert look(next(opened)[1]) == look(torchs_batch(data, [4, 5]))
    data.tensors = (X, Y)
    assert look(next(opened)[1]) == look(torchs_batch(data, [6, 7]))

    parts = {"a": X, "b": Y}
    opened = loader_of(StackDataset(**parts), 2).epoch(0)  # type: ignore[arg-type]
    stack = StackDataset(**parts)  # type: ignore[arg-type]
    opened = loader_of(stack, 2).epoch(0)
    next(opened)
    stack.datasets["a"] = X + 1  # type: ignore[call-overload]
    assert next(opened)[1]["a"][0, 0] == 3


def test_another_way_to_put_tensors_together_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def added(batch: Any, *, collate_fn_map: Any = None) -> Any:
        return torch.stack(batch).sum(0)

    own = trainkit.data.stacking.default_collate_fn_map
    monkeypatch.setitem(own, torch.Tensor, added)
    assert gather_of(PAIRS, default_collate) is None
    assert [batch.item() for batch in batches_of(loader_of(torch.arange(6), 3))] == [3, 12]
    pairs = [(torch.tensor(1.0), 2), (torch.tensor(3.0), 4)]
    assert batches_of(loader_of(pairs, 2))[0][0] == 4  # type: ignore[arg-type]


def test_an_index_that_is_not_there_is_named() -> None:
    for data in (Subset(PAIRS, [1, 2, 30]), Subset(PAIRS, torch.tensor([1, 2, 30]))):
        with pytest.raises(IndexError, match=r"data: loading the sample.* index 2 failed, at position 2 of epoch 0"):
            batches_of(loader_of(data, 3))
    with pytest.raises(IndexError, match=r"sample with index 77 failed, at position 5 of epoch 3 \(batch 1\)"):
        batches_of(loader_of(PAIRS, sampler=[0, 1, 2, 3, 4, 77]), 3)


# ---------------------------------------------------------------- what it costs
def calls_in_data(loader: Loader) -> Counter[str]:
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).parent.name == "data":
            calls[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        for _ in loader.epoch(0):
            pass
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_of_tensors_takes_three_calls(shuffle: bool) -> None:
    few, many = (
        calls_in_data(loader_of(TensorDataset(torch.zeros(4 * count, 2), torch.zeros(4 * count)), shuffle=shuffle))
        for count in (1000, 3000)
    )
    assert (many - few).total() <= 3 * 2000 + 40


# ---------------------------------------------------------------- memory
class Weakly(Dataset[Any]):
    """Notes how many of the batches that were made of it are alive when a sample is loaded."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        self.most = max(self.most, len(self.alive))
        return torch.tensor([float(index)])

    def collate(self, samples: list[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(samples)
        self.alive.add(batch)
        return batch


@pytest.mark.parametrize("sampler", [None, WeightedRandomSampler([1.0] * 40, 40)], ids=["shuffled", "weighted"])
def test_a_batch_is_let_go_of_before_the_next_one_is_made(sampler: Any) -> None:
    data = Weakly()
    loader = loader_of(data, shuffle=sampler is None, sampler=sampler, collate_fn=data.collate)
    lasts = []
    for _, batch, is_last in loader.epoch(0):
        lasts.append(is_last)
        del batch
    assert lasts == [False] * 9 + [True]
    assert data.most == 0
    kept = list(itertools.islice(loader.epoch(1), 3))
    assert data.most == 2
    del kept
    gc.collect()
    assert len(data.alive) == 0


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_so_are_the_batches_of_several_loaders(mode: Any) -> None:
    several = [Weakly(), Weakly()]
    loaders = [loader_of(data, size, collate_fn=data.collate) for data, size in zip(several, (4, 9), strict=True)]
    together = Combination(loaders, {"a": [], "b": []}, mode, "data")
    lasts = []
    for _, batch, is_last in together.epoch(0):
        lasts.append(is_last)
        del batch
    assert lasts == [False] * (4 if mode == "min_size" else 9) + [True]
    assert [data.most for data in several] == [0, 0]


def test_a_data_set_that_grows_or_shrinks_between_epochs_is_gone_through_as_it_is() -> None:
    numbers = list(range(8))
    loader = loader_of(numbers, 2)
    assert len(batches_of(loader)) == 4
    numbers += [8, 9]
    assert [is_last for _, _, is_last in loader.epoch(1)] == [False] * 3 + [True]
    del numbers[4:]
    with pytest.warns(UserWarning, match="yielded 2 batches although its length is"):
        assert [is_last for _, _, is_last in loader.epoch(2)] == [False, True]
