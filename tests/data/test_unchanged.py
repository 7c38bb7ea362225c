"""Whether a data set is what it was: every change is seen, and what can't be seen into is said to be unknown."""

from __future__ import annotations

import functools
import random
import sqlite3
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset, default_collate

from trainkit.data.unchanged import MOST_BYTES, Snapshot

LIMIT, LEVELS = 3, {"x": 1}


class Crop:
    __slots__ = ("sizes",)

    def __init__(self) -> None:
        self.sizes = [3, 4]


class Rich(Dataset[Any]):
    """Made of all that data sets are made of."""

    scale = 1

    def __getitem__(self, index: int) -> Any:
        return [index * LEVELS["x"] for _ in range(LIMIT)]

    def __init__(self) -> None:
        level = [1]
        self.tensor, self.large = torch.zeros(5), torch.zeros(MOST_BYTES // 2)
        self.half = torch.zeros(3, dtype=torch.bfloat16)
        self.array, self.root, self.name, self.size = np.zeros(5), Path("a"), "b", (3, 4)
        self.samples = [(str(number), number) for number in range(1000)]
        self.crop, self.nested = Crop(), {"a": [{"b": Crop()}]}
        self.transform = functools.partial(sorted, key=lambda value: value * level[0])
        self.level, self.module = level, torch.nn.Sequential(torch.nn.Linear(2, 2))
        self.classes, self.queue, self.named = {"x"}, deque([1]), OrderedDict(a=1)
        self.bound = self.crop.__init__  # type: ignore[misc]
        self.itself = self

    def __len__(self) -> int:
        return 3


CHANGES: dict[str, Callable[[Rich], Any]] = {
    "an attribute": lambda data: setattr(data, "name", "c"),
    "another attribute": lambda data: setattr(data, "epoch", 3),
    "one less": lambda data: delattr(data, "name"),
    "a tensor": lambda data: data.tensor.add_(1),
    "a large tensor": lambda data: data.large.add_(1),
    "a tensor past its version": lambda data: data.tensor.data.add_(1),
    "a tensor through numpy": lambda data: data.tensor.numpy().fill(2),
    "a half tensor": lambda data: data.half.data.add_(1),
    "an array": lambda data: data.array.__setitem__(4, 1),
    "a sample": lambda data: data.samples.__setitem__(7, ("7", 8)),
    "a sample more": lambda data: data.samples.append(("c", 1)),
    "the order": lambda data: data.samples.reverse(),
    "a slot": lambda data: setattr(data.crop, "sizes", [3, 4]),
    "in a slot": lambda data: data.crop.sizes.append(5),
    "deep inside": lambda data: data.nested["a"][0]["b"].sizes.append(5),
    "a closure": lambda data: data.level.__setitem__(0, 2),
    "a transform": lambda data: data.transform.keywords.update(reverse=True),
    "a parameter": lambda data: torch.nn.init.ones_(data.module[0].weight),
    "the mode of a module": lambda data: data.module.eval(),
    "a class": lambda data: setattr(Rich, "scale", 2),
    "a global": lambda data: globals().update(LIMIT=4),
    "in a global": lambda data: LEVELS.update(y=2),
    "a set": lambda data: data.classes.add("y"),
    "a queue": lambda data: data.queue.append(2),
    "an ordered dict": lambda data: data.named.move_to_end("a") or data.named.update(b=2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_seen(change: str) -> None:
    data = Rich()
    snapshot = Snapshot(data, default_collate)
    assert snapshot.whole
    assert snapshot.same()
    try:
        CHANGES[change](data)
        assert not snapshot.same()
        assert Snapshot(data).same()
    finally:
        Rich.scale = 1
        globals().update(LIMIT=3)
        LEVELS.pop("y", None)


def test_looking_at_a_data_set_changes_nothing() -> None:
    data = Rich()
    snapshot = Snapshot(data)
    repr(data.samples[3]), data.tensor.sum(), data.crop.sizes[0], str(data.root)
    assert snapshot.same()


def test_a_tensor_that_moves_into_shared_memory_for_a_spawned_worker_is_the_same() -> None:
    data = Rich()
    snapshot = Snapshot(data)
    data.tensor.share_memory_()
    data.large.share_memory_()
    assert snapshot.same()
    data.large.add_(1)
    assert not snapshot.same()


def test_torchs_data_sets_are_seen_into() -> None:
    inner = Rich()
    for data in (Subset(inner, [1]), ConcatDataset([inner]), StackDataset(inner), StackDataset(a=inner)):  # type: ignore[arg-type]
        snapshot = Snapshot(data)
        assert snapshot.whole
        inner.samples.append(("d", 1))
        assert not snapshot.same()
    assert Snapshot(TensorDataset(torch.zeros(2))).same()
    assert Snapshot([torch.zeros(1)] * 100_000).same()


def ones() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    "part",
    [
        random.Random(),
        torch.Generator(),
        np.random.default_rng(),
        np.random.RandomState(),
        np.array([{}], dtype=object),
        np.zeros(MOST_BYTES + 1, np.uint8),
        [[number] for number in range(30_000)],
        iter([1]),
        ones(),
        bytearray(2),
        threading.Lock(),
        sqlite3.connect(":memory:"),
        torch.zeros(2).to_sparse(),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_can_not_be_seen_into_is_never_the_same(part: Any) -> None:
    data: Any = Rich()
    data.part = [{"deep": part}]
    snapshot = Snapshot(data)
    assert not snapshot.whole
    assert not snapshot.same()
