"""Several processes go through one order: together they see what one process does, and each sample once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from trainkit.data.combined import Combination
from trainkit.data.loader import EMPTY, Batches, Loader


class Noisy(Dataset[Any]):
    """Gives an index with a random number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return index, random.random(), torch.rand(())


def data(kind: str, size: int) -> Any:
    return Noisy(size) if kind == "noisy" else TensorDataset(torch.arange(size))


def loader_of(source: DataLoader[Any], part: int, parts: int, **more: Any) -> Loader:
    return Loader(source, name="data", argument="limit", seed=5, shard=(part, parts), **more)


def whole(source: DataLoader[Any], **more: Any) -> Loader:
    return loader_of(source, 0, 1, **more)


def ids(batch: Any) -> list[int]:
    return [] if batch is EMPTY else batch[0].tolist()


def together(loaders: list[Any], epoch: int, start: int = 0) -> list[list[Any]]:
    """Return what all parts see, a list for each batch; all of them must take as many steps."""
    seen = [list(loader.epoch(epoch, start)) for loader in loaders]
    for each in zip(*seen, strict=True):
        assert len({(index, is_last) for index, _, is_last in each}) == 1
    for of_part in seen:
        assert [is_last for *_, is_last in of_part] == [False] * (len(of_part) - 1) + [True] * (len(of_part) > 0)
    return [[batch for _, batch, _ in each] for each in zip(*seen, strict=True)]


def joined(batches: list[list[Any]]) -> list[list[int]]:
    return [[number for batch in each for number in ids(batch)] for each in batches]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    parts=st.integers(1, 5),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    kind=st.sampled_from(["noisy", "tensors"]),
    limit=st.sampled_from([1.0, 0.5, 2]),
    epoch=st.integers(0, 2),
)
def test_the_parts_of_a_batch_are_the_batch_of_one_process(
    size: int, batch_size: int, parts: int, drop_last: bool, shuffle: bool, kind: str, limit: float, epoch: int
) -> None:
    more = {"shuffle": shuffle, "drop_last": drop_last}
    one = DataLoader(data(kind, size), batch_size * parts, **more)
    count = len(one)
    if count == 0 or (limit == 0.5 and count == 1):
        return
    loaders = [
        loader_of(DataLoader(data(kind, size), batch_size, **more), part, parts, limit=limit) for part in range(parts)
    ]
    expected = [batch for _, batch, _ in whole(one, limit=limit).epoch(epoch)]
    seen = together(loaders, epoch)
    assert joined(seen) == [ids(batch) for batch in expected]
    assert {loader.num_batches for loader in loaders} == {len(expected)}
    for k, (batch, each) in enumerate(zip(expected, seen, strict=True)):
        shares = [loader.share(epoch, k) for loader in loaders]
        assert sum(shares) == pytest.approx(parts)
        assert {loader.lacking(epoch, k) for loader in loaders} == {any(batch is EMPTY for batch in each)}
        means = [batch[0].float().mean() if batch is not EMPTY else torch.tensor(0.0) for batch in each]
        mean = sum(float(one) * share for one, share in zip(means, shares, strict=True)) / parts
        assert mean == pytest.approx(float(batch[0].float().mean()))
        assert [loader.samples_of(epoch, k) for loader in loaders] == [ids(batch) for batch in each]
        assert [ids(loader.batch_at(epoch, k)) for loader in loaders] == [ids(batch) for batch in each]
        if kind == "noisy":  # the draws are those of the position in the epoch
            assert [x for part in each if part is not EMPTY for x in part[1].tolist()] == batch[1].tolist()
            assert [x for part in each if part is not EMPTY for x in part[2].tolist()] == batch[2].tolist()


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 12), batch_size=st.integers(1, 3), parts=st.integers(1, 5), limit=st.sampled_from([1.0, 1, 2])
)
def test_an_evaluation_sees_each_sample_once_also_with_fewer_samples_than_parts(
    size: int, batch_size: int, parts: int, limit: float
) -> None:
    loaders = [
        loader_of(DataLoader(Noisy(size), batch_size), part, parts, limit=limit, even=False) for part in range(parts)
    ]
    seen = [list(loader.epoch(0)) for loader in loaders]
    expected = list(whole(DataLoader(Noisy(size), batch_size * parts), limit=limit).epoch(0))
    assert not any(batch is EMPTY for of_part in seen for _, batch, _ in of_part)
    assert sorted(number for of_part in seen for _, batch, _ in of_part for number in ids(batch)) == sorted(
        number for _, batch, _ in expected for number in ids(batch)
    )
    assert {loader.num_batches for loader in loaders} == {len(expected)}
    lengths = [len(of_part) for of_part in seen]
    assert lengths[0] == len(expected)
    assert lengths[0] - lengths[-1] <= 1
    for of_part in seen:
        assert [is_last for *_, is_last in of_part] == [False] * (len(of_part) - 1) + [True] * (len(of_part) > 0)


@pytest.mark.parametrize("kind", ["noisy", "tensors"])
def test_workers_change_nothing(kind: str) -> None:
    def seen(workers: int, even: bool) -> list[list[str]]:
        found = []
        for part in range(3):
            source = DataLoader(data(kind, 13), 2, shuffle=True, num_workers=workers)
            loader = loader_of(source, part, 3, even=even)
            found.append([str(batch) for _, batch, _ in loader.epoch(1, 1)])
            loader.close()
        return found

    assert seen(0, True) == seen(2, True)
    assert seen(0, False) == seen(1, False)
    assert [len(of_part) for of_part in seen(0, True)] == [2, 2, 2]
    assert [of_part[-1] == "EMPTY" for of_part in seen(0, True)] == [False, True, True]
    assert [len(of_part) for of_part in seen(0, False)] == [2, 1, 1]


def test_workers_that_start_early_load_this_part() -> None:
    loaders = [loader_of(DataLoader(Noisy(9), 2, shuffle=True, num_workers=1), part, 2, keep=True) for part in range(2)]
    for loader in loaders:
        loader.prepare(0, 0)
    for epoch in range(2):
        expected = whole(DataLoader(Noisy(9), 4, shuffle=True)).epoch(epoch)
        assert joined(together(loaders, epoch)) == [ids(batch) for _, batch, _ in expected]
    for loader in loaders:
        loader.close()


# ---------------------------------------------------------------- samplers of the user's
class Told(Sampler[int]):
    """Gives fewer than it says, and says nothing of its randomness."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(17).tolist())


class Sizes:
    """Batches of different sizes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(30).tolist()
        stops = [0, 3, 10, 14, 22, 30][: self.count + 1]
        return (order[start:stop] for start, stop in itertools.pairwise(stops))


SAMPLERS = {
    "weighted": lambda: WeightedRandomSampler(torch.arange(1.0, 31.0).tolist(), 41),
    "subset": lambda: SubsetRandomSampler(range(3, 20)),
    "with replacement": lambda: RandomSampler(range(30), True, 23),
    "a list": lambda: [5, 3, 9, 1, 1, 20, 7, 0, 2],
    "unknown": Told,
}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:data yielded:UserWarning", "ignore:the order of data:UserWarning")
def test_the_samplers_of_the_user_are_dealt_out_too(kind: str, workers: int) -> None:
    for parts in (2, 4):
        loaders = [
            loader_of(DataLoader(Noisy(30), 2, sampler=SAMPLERS[kind](), num_workers=workers), part, parts)
            for part in range(parts)
        ]
        expected = [batch for _, batch, _ in whole(DataLoader(Noisy(30), 2 * parts, sampler=SAMPLERS[kind]())).epoch(1)]
        seen = together(loaders, 1)
        assert joined(seen) == [ids(batch) for batch in expected]
        for batch, each in zip(expected, seen, strict=True):
            assert [x for part in each if part is not EMPTY for x in part[1].tolist()] == batch[1].tolist()
        assert joined(together(loaders, 1, 1)) == joined(seen)[1:]
        assert [loader.samples_of(1, 1) for loader in loaders] == [ids(batch) for batch in seen[1]]
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("count", [4, 5])
def test_batches_that_a_sampler_gives_go_to_the_parts_in_turn(count: int) -> None:
    for parts in (2, 3):
        loaders = [
            loader_of(DataLoader(Noisy(30), batch_sampler=Sizes(count)), part, parts)  # type: ignore[arg-type]
            for part in range(parts)
        ]
        alone = [batch for _, batch, _ in whole(DataLoader(Noisy(30), batch_sampler=Sizes(count))).epoch(2)]  # type: ignore[arg-type]
        seen = [batch for each in together(loaders, 2) for batch in each]
        assert [str(batch) for batch in seen if batch is not EMPTY] == [str(batch) for batch in alone]
        last = -(-count // parts) - 1
        left = count - last * parts
        shares = [loader.share(2, last) for loader in loaders]
        assert shares == [parts / left] * left + [0.0] * (parts - left)
        with pytest.warns(UserWarning, match="the order of data after this resume"):
            rest = [batch for each in together(loaders, 2, 1) for batch in each]
        assert str(rest) == str(seen[parts:])


def test_samples_without_batches_go_to_the_parts_in_turn() -> None:
    loaders = [loader_of(DataLoader(Noisy(7), None, shuffle=True), part, 3) for part in range(3)]
    alone = [sample for _, sample, _ in whole(DataLoader(Noisy(7), None, shuffle=True)).epoch(0)]
    seen = [sample for each in together(loaders, 0) for sample in each]
    assert str([sample for sample in seen if sample is not EMPTY]) == str(alone)
    assert len(seen) == 9


def test_who_deals_out_by_himself_is_left_alone_and_draws_do_not_collide() -> None:
    def numbers(source: Any, **more: Any) -> list[Any]:
        return [
            [x for _, batch, _ in loader_of(source(part), part, 2, **more).epoch(0) for x in batch[1].tolist()]
            for part in range(2)
        ]

    def own(part: int) -> DataLoader[Any]:
        return DataLoader(Noisy(8), 2, sampler=DistributedSampler(range(8), 2, part))  # type: ignore[arg-type]

    def inside(part: int) -> DataLoader[Any]:
        class Mine(BatchSampler):
            pass

        return DataLoader(Noisy(8), batch_sampler=Mine(DistributedSampler(range(8), 2, part), 2, False))  # type: ignore[arg-type]

    for drawn in (numbers(own), numbers(inside), numbers(lambda _: DataLoader(Noisy(4), 2), deal=False)):
        assert [len(of_part) for of_part in drawn] == [4, 4]
        assert not set(drawn[0]) & set(drawn[1])
    assert loader_of(own(1), 1, 2).share(0, 1) == 1.0


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 1])
def test_torchdatas_loader_is_dealt_out_too(workers: int) -> None:
    kind: Any = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    for more in ({"shuffle": True}, {}, {"sampler": [3, 1, 4, 1, 5]}):
        loaders = [loader_of(kind(Noisy(11), 2, num_workers=workers, **more), part, 2) for part in range(2)]
        for loader in loaders:
            loader.reseed(5)  # as processes agree to: torchdata makes generators of its own
        expected = [ids(batch) for _, batch, _ in whole(DataLoader(Noisy(11), 4, **more)).epoch(1)]  # type: ignore[arg-type]
        assert joined(together(loaders, 1)) == expected
        assert joined(together(loaders, 1, 1)) == expected[1:]
        for loader in loaders:
            loader.close()


# ---------------------------------------------------------------- several loaders at once
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_several_loaders_give_as_many_batches_on_each_part_and_a_step_can_work_with_each(mode: Any) -> None:
    for sizes, parts in (((5, 9), 3), ((1, 3), 2), ((2, 2), 3), ((7, 7), 2)):

        def combination(part: int, parts: int, each: int, sizes: tuple[int, ...] = sizes) -> Combination:
            loaders = [loader_of(DataLoader(Noisy(size), each), part, parts) for size in sizes]
            return Combination(loaders, [object(), object()], mode, "data")

        combined = [combination(part, parts, 1) for part in range(parts)]
        seen = together(combined, 0)
        expected = [batch for _, batch, _ in combination(0, 1, parts).epoch(0)]
        assert len(seen) == len(expected)
        for k, (each, batch) in enumerate(zip(seen, expected, strict=True)):
            assert sum(one.share(0, k) for one in combined) == pytest.approx(parts)
            assert [str(one.batch_at(0, k)) for one in combined] == list(map(str, each))
            assert {one.lacking(0, k) for one in combined} == {any(part is EMPTY for part in each)}
            for index, of_one in enumerate(batch):
                found = [part[index] for part in each if part is not EMPTY]
                if of_one is None:
                    assert found == [None] * len(found)
                    continue
                numbers = [number for part in found if part is not None for number in ids(part)]
                assert sorted(set(numbers)) == sorted(ids(of_one))
                if mode != "max_size":
                    assert all(part is not None for part in found)
        if sizes == (2, 2):
            assert seen[0][2] is EMPTY


def test_an_evaluation_of_several_loaders_ends_where_this_part_has_nothing() -> None:
    for part, length in ((0, 2), (1, 1)):
        loaders = [loader_of(DataLoader(Noisy(3), 1), part, 2) for _ in range(2)]
        combined = Combination(loaders, [object(), object()], "min_size", "data")
        combined.even = False
        assert len(list(combined.epoch(0))) == length


# ---------------------------------------------------------------- on another number of processes
def position_after(loaders: list[Any], epoch: int, batches: int) -> Any:
    assert len({str(loader.standing(epoch, batches)) for loader in loaders}) == 1
    return loaders[0].standing(epoch, batches)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_run_goes_on_at_every_position_with_another_number_of_parts_and_the_same_batches(drop_last: bool) -> None:
    def made(parts: int, kept: Any = None) -> list[Loader]:
        source = DataLoader(Noisy(27), 2, shuffle=True, drop_last=drop_last)
        return [loader_of(source, part, parts, kept=kept) for part in range(parts)]

    expected = [[*joined(together(made(4), epoch))] for epoch in range(2)]
    for start, second in itertools.product(range(len(expected[0])), (2, 3, 1, 8, 12)):
        stood = position_after(made(4), 0, start)
        assert stood == {"samples": 8 * start, "size": 8, "batch_size": 2, "parts": 4}
        going = made(second, stood)
        assert {loader.go_on(0, start, stood, 1) for loader in going} == {start}
        assert {loader.num_batches for loader in going} == {len(expected[0])}
        assert joined(together(going, 0, start)) == expected[0][start:]
        assert joined(together(going, 1)) == expected[1]
        again = position_after(going, 0, len(expected[0]) - 1)
        third = made(1, again)
        assert third[0].go_on(0, len(expected[0]) - 1, again, 1) == len(expected[0]) - 1
        assert joined(together(third, 0, len(expected[0]) - 1)) == expected[0][-1:]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    numbers=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    steps=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    window=st.integers(1, 3),
    kind=st.sampled_from(["noisy", "tensors"]),
    sampled=st.booleans(),
)
def test_with_each_process_batch_kept_no_sample_is_lost_or_repeated(
    size: int, batch_size: int, numbers: list[int], steps: list[int], window: int, kind: str, sampled: bool
) -> None:
    """From one number of parts to the next, some windows on each."""

    def made(parts: int) -> list[Loader]:
        how: Any = {"sampler": WeightedRandomSampler([1.0] * size, size)} if sampled else {"shuffle": True}
        return [loader_of(DataLoader(data(kind, size), batch_size, **how), part, parts) for part in range(parts)]

    expected = [number for batch in joined(together(made(1), 3)) for number in batch]
    seen: list[int] = []
    batch_idx, stood = 0, None
    for number, (parts, taken) in enumerate(itertools.zip_longest(numbers, steps[: len(numbers) - 1], fillvalue=99)):
        loaders = made(parts)
        if stood is not None:
            (batch_idx,) = {loader.go_on(3, batch_idx, stood, window) for loader in loaders}
            assert batch_idx % window == 0
            assert stood["samples"] == 0 or batch_idx > 0
        going = joined(together(loaders, 3, batch_idx))
        taken = min(taken * window, len(going)) if number < len(numbers) - 1 else len(going)
        if taken < len(going):  # else the epoch is over
            taken = taken // window * window
        seen += [number for batch in going[:taken] for number in batch]
        batch_idx += taken
        if taken == len(going):
            break
        stood = position_after(loaders, 3, batch_idx)
        assert stood is not None
        assert stood["samples"] == len(seen)
    assert seen == expected


def test_a_batch_size_that_somebody_has_changed_is_taken() -> None:
    stood = {"samples": 16, "size": 8, "batch_size": 2, "parts": 4}
    for parts, batch_size, begins in ((2, 4, 2), (2, 3, 2), (4, 3, None)):
        loader = loader_of(DataLoader(range(40), batch_size), 0, parts, kept=stood)  # type: ignore[arg-type]
        batch_idx = loader.go_on(0, 2, stood, 1)
        assert batch_idx == 2
        first = loader.samples_of(0, batch_idx)
        assert first is not None
        assert first[0] == (16 if begins is not None else 2 * parts * batch_size)


def test_whole_batches_go_on_at_the_batch_where_another_number_of_parts_was() -> None:
    def made(parts: int, kept: Any = None) -> list[Batches]:
        return [
            loader_of(DataLoader(Noisy(30), batch_sampler=Sizes(5)), part, parts, kept=kept)  # type: ignore[arg-type]
            for part in range(parts)
        ]

    expected = [batch for each in together(made(1), 0) for batch in each]
    stood: Any = made(2)[0].standing(0, 1)  # type: ignore[attr-defined]
    for parts in (1, 2, 3, 4):
        going: list[Any] = made(parts, stood)
        batch_idx = {loader.go_on(0, 1, stood, 1) for loader in going}
        with pytest.warns(UserWarning, match="the order of data after this resume"):
            seen = [batch for each in together(going, 0, batch_idx.pop()) for batch in each]
        assert str([batch for batch in seen if batch is not EMPTY]) == str(expected[2:])


class SeedOfWorker(Dataset[int]):
    """Gives the seed of the worker that loads it: what a user makes generators of a worker's own from."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return int(get_worker_info().seed)  # type: ignore[union-attr]


@pytest.mark.parametrize("sampler", [None, "own"])
def test_no_two_workers_of_all_processes_have_one_seed(sampler: str | None) -> None:
    order = [3, 1, 0, 2, 7, 6, 5, 4] if sampler else None
    seen = []
    for part in range(2):
        loader = loader_of(DataLoader(SeedOfWorker(), 1, num_workers=2, sampler=order), part, 2)
        epochs = [{int(batch) for _, batch, _ in loader.epoch(0)} for _ in range(2)]
        loader.close()
        assert epochs[0] == epochs[1]  # a resumed epoch has the seeds it had
        seen += list(epochs[0])
    assert len(seen) == len(set(seen)) == 4
