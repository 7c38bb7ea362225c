"""What a data set draws for a sample is the sample's, and what the run draws its own, wherever it is loaded."""

from __future__ import annotations

import importlib
import itertools
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset, Subset, default_collate, get_worker_info

from trainkit.data.fetch import PROBED, Fetch
from trainkit.data.loader import Loader
from trainkit.data.order import Placed
from trainkit.data.seeding import states
from trainkit.data.served import Served, takes_batches


class Noisy(Dataset[Any]):
    """Draws for each sample from all three sources, an odd number of normal numbers among it."""

    def __init__(self, size: int = 23) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        python, numpy = random.random() + random.gauss(0, 1), np.random.rand() + np.random.randn()
        return index, python, numpy, float(torch.rand(1) + torch.randn(1))


class Rarely(Noisy):
    """Draws from one source, for few samples, and the first time after all sources seemed to be left alone."""

    def __init__(self, source: str) -> None:
        super().__init__(PROBED + 200)
        self.source = source
        self.loads = 0

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        if index < PROBED + 10 or index % 7:
            return index, 0.0
        draw: Any = {"python": random.random, "numpy": np.random.randn, "torch": lambda: float(torch.rand(1))}
        return index, draw[self.source]()


class ByBatch(Noisy):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        return [self[index] for index in indices]


def mixed(samples: list[Any]) -> Any:
    return samples, random.random(), np.random.rand(), float(torch.rand(1))


def loader(data: Any, batch_size: int | None = 3, workers: int = 0, **settings: Any) -> Loader:
    settings = {"shuffle": True, "collate_fn": list if batch_size else None, **settings}
    source: Any = DataLoader(data, batch_size, num_workers=workers, **settings)
    return Loader(source, name="data", argument="limit", seed=5)


def samples(data: Loader, epoch: int = 0, start: int = 0) -> list[Any]:
    batches = [batch for _, batch, _ in data.epoch(epoch, start)]
    data.close()
    return list(itertools.chain.from_iterable(batches))


# ---------------------------------------------------------------- what is drawn
def test_what_a_sample_draws_depends_on_its_position_alone() -> None:
    whole = samples(loader(Noisy()), 2)
    assert len({sample[1] for sample in whole}) == 23
    for batch_size, workers in ((1, 0), (5, 0), (23, 0), (3, 1), (4, 2)):
        assert samples(loader(Noisy(), batch_size, workers), 2) == whole
    assert samples(loader(Noisy(), 4, 2, persistent_workers=True, prefetch_factor=4), 2) == whole
    assert samples(loader(Noisy()), 2, start=5) == whole[15:]
    singles = [batch for _, batch, _ in loader(Noisy(), None).epoch(2)]
    assert [tuple(single) for single in singles] == whole
    other = samples(loader(Noisy()), 3)
    assert not {sample[1] for sample in whole} & {sample[1] for sample in other}


@pytest.mark.parametrize("source", ["python", "numpy", "torch"])
def test_a_source_that_is_drawn_from_late_and_seldom_is_noticed(source: str) -> None:
    one = loader(Rarely(source), 1, shuffle=False)
    alone = samples(one)
    assert len({number for _, number in alone}) > 20
    for batch_size in (5, 64, 400):
        torch.rand(1), random.random(), np.random.randn()
        data = Rarely(source)
        assert samples(loader(data, batch_size, shuffle=False)) == alone
        assert data.loads <= len(data) + batch_size  # one batch was loaded twice
    assert samples(loader(Rarely(source), 5, 1, shuffle=False)) == alone


@pytest.mark.parametrize("collate", [list, mixed])
@pytest.mark.parametrize("data", [Noisy(), ByBatch(), Subset(Noisy(), range(20))], ids=lambda d: type(d).__name__)
def test_the_runs_own_random_state_stays_as_it_is(data: Any, collate: Any) -> None:
    np.random.randn(), random.gauss(0, 1), torch.randn(1)  # each has a normal number to spare
    before = states()
    opened = loader(data, 3, collate_fn=collate).epoch(0)
    for _ in opened:
        after = states()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]


def test_what_a_collate_fn_draws_depends_on_the_batch_alone() -> None:
    def batches(workers: int, start: int = 0) -> list[Any]:
        opened = loader(Noisy(), 4, workers, collate_fn=mixed)
        return [batch for _, batch, _ in opened.epoch(1, start)]

    assert batches(0) == batches(2)
    assert batches(1, start=3) == batches(0)[3:]
    assert len({batch[1] for batch in batches(0)}) == 6


def test_a_data_set_that_loads_batches_is_asked_for_batches_and_draws_for_each_anew() -> None:
    assert samples(loader(ByBatch(), 4)) == samples(loader(ByBatch(), 4, 2))
    assert samples(loader(ByBatch(), 4), start=2) == samples(loader(ByBatch(), 4))[8:]
    inside = Subset(Noisy(), range(20))
    assert takes_batches(ByBatch())
    assert takes_batches(Subset(ByBatch(), [1]))
    assert takes_batches(StackDataset(ByBatch()))
    for data in (Noisy(), inside, Subset(inside, [1]), ConcatDataset([Noisy()]), StackDataset(Noisy(), ByBatch())):
        assert not takes_batches(data)
    assert samples(loader(inside, 4)) == samples(loader(inside, 7))  # sample by sample, though a Subset takes batches


class Counted(Dataset[int]):
    """Draws nothing."""

    def __len__(self) -> int:
        return 4 * PROBED

    def __getitem__(self, index: int) -> int:
        return index


def test_a_data_set_that_draws_nothing_is_soon_left_alone() -> None:
    fetch = Fetch(Counted(), default_collate, "data")
    for start in range(0, 4 * PROBED, PROBED // 2):
        places = range(start, start + PROBED // 2)
        assert fetch(Placed(list(places), places, 0, 0, 7)).batch.tolist() == list(places)
    assert fetch._seeds == []
    assert len(fetch._watched) == 3


# ---------------------------------------------------------------- the user's own objects
class Knows(Noisy):
    """Looks at what a worker is told about its data set, and keeps a note on itself."""

    def __getitem__(self, index: int) -> Any:
        info: Any = get_worker_info()
        assert info is None or info.dataset is self
        self.last = index
        return index, type(info.dataset).__name__ if info else "here"


def test_the_users_data_set_is_used_itself_and_a_worker_is_told_of_it() -> None:
    data = Knows(6)
    assert {sample[1] for sample in samples(loader(data))} == {"here"}
    assert data.last in range(6)
    assert {sample[1] for sample in samples(loader(data, 3, 1))} == {"Knows"}


def test_what_stands_for_a_data_set_is_it_in_everything_else() -> None:
    data = Noisy(3)
    served: Any = Served(data, Fetch(data, list, "data"))
    assert isinstance(served, Noisy)
    assert (len(served), served.size, repr(served)) == (3, 3, repr(data))
    served.size = 5
    assert data.size == 5
    del served.size
    assert not hasattr(data, "size")
    with pytest.raises(AttributeError, match="missing"):
        served.missing  # noqa: B018
    data.size = 2
    assert served[1][0] == 1
    assert [sample[0] for sample in served.__getitems__([1, 0])] == [1, 0]


class Own(DataLoader[Any]):
    """Goes over its data set and its collate_fn by itself."""

    def __iter__(self) -> Any:
        data: Any = self.dataset
        for batch in self.batch_sampler or ():
            yield self.collate_fn([data[index] for index in batch])


def test_a_subclass_that_loads_its_samples_itself_gets_them() -> None:
    source = Own(Noisy(6), 3, collate_fn=lambda batch: [sample[0] for sample in batch])
    assert samples(Loader(source, name="data", argument="limit", seed=1)) == list(range(6))


NOISY = """
import random
import numpy as np
import torch

class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)
"""


def test_workers_that_are_not_forked_from_here_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy_of_its_own.py").write_text(NOISY)  # which they import by its name
    monkeypatch.syspath_prepend(tmp_path)
    data = importlib.import_module("noisy_of_its_own").Noisy()
    there, here = (
        [batch.tolist() for _, batch, _ in loader(data, 3, workers, collate_fn=torch.stack, **options).epoch(1)]
        for workers, options in ((1, {"multiprocessing_context": "forkserver"}), (0, {}))
    )
    assert there == here
    assert len({draw for batch in here for sample in batch for draw in sample[1:]}) == 21


# ---------------------------------------------------------------- errors
class Fails(Noisy):
    def __init__(self, error: Any) -> None:
        super().__init__(40)
        self.error = error

    def __getitem__(self, index: int) -> Any:
        if index == 23:
            if self.error is None:
                return None
            raise self.error
        return torch.zeros(2)


def batches_of(error: Any, workers: int, **settings: Any) -> Iterator[Any]:
    settings = {"collate_fn": None, "shuffle": False, **settings}
    return loader(Fails(error), 4, workers, **settings).epoch(2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_sample_its_position_and_its_epoch(workers: int) -> None:
    with pytest.raises(
        ValueError, match=r"^bad JPEG\ndata: loading the sample with index 23 failed, at position 23 of"
    ):
        list(batches_of(ValueError("bad JPEG"), workers))
    with pytest.raises(LookupError, match=r"of epoch 2 \(batch 5\)\.$"):
        list(batches_of(LookupError(), workers))


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (StopIteration(), 0),
        (StopIteration(), 1),
        (GeneratorExit(), 0),
        (SystemExit(3), 0),
        (SystemExit(3), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_an_epoch_never_ends_because_of_a_sample(error: BaseException, workers: int) -> None:
    batches = []
    with pytest.raises(RuntimeError, match=f"must not raise {type(error).__name__}.*\n.*index 23 failed"):
        batches.extend(batches_of(error, workers))
    assert len(batches) == 5


class Signalled(Fails):
    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return super().__getitem__(index)


def test_a_signal_that_ends_the_process_while_a_sample_is_loaded_is_no_error_of_the_sample() -> None:
    def leave(*_: Any) -> None:
        sys.exit(77)

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        with pytest.raises(SystemExit, match="77"):
            list(loader(Signalled(None), 4).epoch(0))
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_do_not_fit_together_are_named(workers: int) -> None:
    with pytest.raises(
        (TypeError, AttributeError), match=r"indices \[20, 21, 22, 23\] failed, from position 20 on of ep"
    ):
        list(batches_of(None, workers))
    with pytest.raises((TypeError, AttributeError), match=r"returned None for \[23\]"):
        list(batches_of(None, workers))
    kept = batches_of(None, workers, collate_fn=lambda batch: [s for s in batch if s is not None])
    assert [len(batch) for _, batch, _ in kept] == [4, 4, 4, 4, 4, 3, 4, 4, 4, 4]


def test_a_subclass_with_its_own_iteration_gets_the_error_as_torch_gives_it() -> None:
    class Doubled(DataLoader[Any]):
        def __iter__(self) -> Any:
            return (batch * 2 for batch in super().__iter__())

    for workers in (0, 1):
        opened = Loader(
            Doubled(Fails(ValueError("bad")), 4, num_workers=workers), name="data", argument="limit", seed=1
        )
        with pytest.raises(ValueError, match="the sample with index 23 failed"):
            list(opened.epoch(0))


def test_a_sample_that_fails_leaves_the_runs_random_state_alone() -> None:
    before = states()
    with pytest.raises(ValueError, match="bad"):
        list(batches_of(ValueError("bad"), 0))
    assert torch.equal(before[0], states()[0])
    assert before[1:] == states()[1:]
