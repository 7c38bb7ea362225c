"""Each process's part of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from trainkit import Module, Trainer
from trainkit.data.distributed import (
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
    dealt,
    needs_dealing,
)
from trainkit.data.loader import Loader
from trainkit.errors import MisconfigurationException
from trainkit.strategies import Strategy


def numbers(size: int = 10, **settings: Any) -> DataLoader[Any]:
    return DataLoader(range(size), **settings)  # type: ignore[arg-type]


def parts(loader: DataLoader[Any], processes: int = 3, repeat: bool = True) -> list[list[int]]:
    return [
        [number for batch in dealt(loader, 1, repeat, num_replicas=processes, rank=rank) for number in batch.tolist()]
        for rank in range(processes)
    ]


def test_all_parts_together_are_the_data_and_equally_long() -> None:
    for shuffle in (False, True):
        given = parts(numbers(shuffle=shuffle))
        assert [len(part) for part in given] == [4, 4, 4]
        assert {number for part in given for number in part} == set(range(10))
    assert parts(numbers())[1] == [1, 4, 7, 0]


def test_predictions_are_of_every_sample_once() -> None:
    assert parts(numbers(), repeat=False) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    shuffled = UnrepeatedDistributedSampler(range(10), num_replicas=2, rank=0, shuffle=True, seed=1)
    shuffled.set_epoch(1)
    first = list(shuffled)
    assert len(shuffled) == len(set(first)) == 5
    shuffled.set_epoch(2)
    assert list(shuffled) != first
    with pytest.raises(MisconfigurationException, match=r"2 samples for 3 processes.*Use fewer processes"):
        UnrepeatedDistributedSampler(range(2), num_replicas=3, rank=2)


def test_a_sampler_of_another_kind_is_dealt_out() -> None:
    weighted = WeightedRandomSampler([0.0] * 5 + [1.0] * 5, 10)
    for repeat, kind in ((True, DistributedSamplerWrapper), (False, UnrepeatedDistributedSamplerWrapper)):
        part = dealt(numbers(sampler=weighted), 1, repeat, num_replicas=3, rank=0)
        assert type(part.sampler) is kind
        assert len(list(part)) == 4
        assert all(number >= 5 for number in part)


def test_a_batch_sampler_of_another_kind_keeps_its_kind() -> None:
    class Pairs(BatchSampler):
        pass

    loader = numbers(8, batch_sampler=Pairs(SequentialSampler(range(8)), 2, False))
    part = dealt(loader, 1, True, num_replicas=2, rank=1)
    assert type(part.batch_sampler) is Pairs
    assert [batch.tolist() for batch in part] == [[1, 3], [5, 7]]
    assert len(list(loader)) == 4  # the user's own is as it was
    with pytest.raises(TypeError, match=r"list has no attribute `sampler`.*use_distributed_sampler=False"):
        dealt(numbers(batch_sampler=[[0, 1]]), 1, True, num_replicas=2, rank=1)


def test_what_needs_no_dealing() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    own = DistributedSampler(range(10), num_replicas=2, rank=0)  # type: ignore[arg-type]
    assert needs_dealing(numbers())
    for loader in (
        numbers(sampler=own),
        numbers(batch_sampler=BatchSampler(own, 2, False)),
        DataLoader(Stream()),
        [1, 2],
    ):
        assert not needs_dealing(loader)


def test_a_part_starts_anywhere_without_reading_what_came_before() -> None:
    for sampler in (
        DistributedSampler(range(20), num_replicas=2, rank=1, seed=3),  # type: ignore[arg-type]
        UnrepeatedDistributedSampler(range(20), num_replicas=2, rank=1, seed=3),
    ):
        loader = Loader(numbers(20, batch_size=2, sampler=sampler), name="train_dataloader", argument="limit")
        epochs = [[batch.tolist() for _, batch, _ in loader.epoch(epoch)] for epoch in (0, 1)]
        assert epochs[0] != epochs[1]
        assert [batch.tolist() for _, batch, _ in loader.epoch(1, start=2)] == epochs[1][2:]


# ---------------------------------------------------------------- in a run
class SecondOfTwo(Strategy):
    """What one of two processes sees; nothing is exchanged."""

    world_size, global_rank = 2, 1


class Notes(Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += batch.tolist()
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen += batch.tolist()

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch.tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer_of(**settings: Any) -> Trainer:
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(strategy=SecondOfTwo(), **{**bare, "num_sanity_val_steps": 0, "max_epochs": 2, **settings})


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_is_on_this_process_part_and_shuffled_as_the_loader_was(shuffle: bool) -> None:
    module, trainer = Notes(), trainer_of()
    assert trainer.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 1}
    loader = numbers(9, shuffle=shuffle)
    trainer.fit(module, loader)
    sampler = trainer.train_dataloader.sampler
    assert (type(sampler), sampler.shuffle, sampler.rank) == (DistributedSampler, shuffle, 1)
    assert trainer.num_training_batches == 5
    if not shuffle:
        assert module.seen == [1, 3, 5, 7, 0] * 2
    else:
        assert module.seen[:5] != module.seen[5:]
    assert type(loader.sampler) is (RandomSampler if shuffle else SequentialSampler)


def test_every_loader_of_several_is_dealt_out() -> None:
    class Both(Notes):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(torch.cat(list(batch.values())), batch_idx)

    trainer, module = trainer_of(max_epochs=1), Both()
    trainer.fit(module, {"a": numbers(4), "b": numbers(2)})
    assert module.seen == [1, 1, 3, 1]


def test_overfitting_takes_the_first_of_this_process() -> None:
    module = Notes()
    with pytest.warns(UserWarning, match="shuffling of train_dataloader is turned off"):
        trainer_of(overfit_batches=2).fit(module, numbers(9, shuffle=True))
    assert module.seen == [1, 3] * 2


def test_evaluations_say_that_samples_are_repeated_and_predictions_repeat_none() -> None:
    module = Notes()
    with pytest.warns(UserWarning, match="deals the samples of val_dataloader out to 2 processes"):
        trainer_of().validate(module, numbers(5), verbose=False)
    assert module.seen == [1, 3, 0]
    assert trainer_of().predict(module, numbers(5)) == [[1], [3]]


def test_who_deals_out_by_himself_turns_it_off() -> None:
    module = Notes()
    trainer_of(use_distributed_sampler=False, max_epochs=1).fit(module, numbers(3))
    assert module.seen == [0, 1, 2]
