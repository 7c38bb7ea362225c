"""Samplers that deal samples out, and what one of two processes sees of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from trainkit import Module, Trainer
from trainkit.data.distributed import (
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
    deals_itself,
)
from trainkit.data.loader import Loader
from trainkit.errors import MisconfigurationException
from trainkit.strategies import Strategy


def numbers(size: int = 10, **settings: Any) -> DataLoader[Any]:
    return DataLoader(range(size), **settings)  # type: ignore[arg-type]


def test_the_samplers_under_lightnings_names_deal_every_sample_out_once() -> None:
    parts = [list(UnrepeatedDistributedSampler(range(10), num_replicas=3, rank=r, shuffle=False)) for r in range(3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    shuffled = UnrepeatedDistributedSampler(range(10), num_replicas=2, rank=0, shuffle=True, seed=1)
    shuffled.set_epoch(1)
    first = list(shuffled)
    assert len(shuffled) == len(set(first)) == 5
    shuffled.set_epoch(2)
    assert list(shuffled) != first
    with pytest.raises(MisconfigurationException, match=r"2 samples for 3 processes.*Use fewer processes"):
        UnrepeatedDistributedSampler(range(2), num_replicas=3, rank=2)


def test_they_deal_out_what_another_sampler_gives() -> None:
    weighted = WeightedRandomSampler([0.0] * 5 + [1.0] * 5, 10)
    for kind in (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper):
        part = list(kind(weighted, num_replicas=3, rank=0))
        assert len(part) == 4
        assert all(number >= 5 for number in part)


def test_what_deals_its_samples_out_by_itself() -> None:
    class Mine(Sampler[int]):
        num_replicas, rank = 2, 1

        def __iter__(self) -> Any:
            return iter([1, 3])

    own = DistributedSampler(range(10), num_replicas=2, rank=0)  # type: ignore[arg-type]
    assert not deals_itself(numbers())
    for loader in (
        numbers(sampler=own),
        numbers(batch_sampler=BatchSampler(own, 2, False)),
        numbers(sampler=Mine()),
        numbers(batch_sampler=Mine()),
    ):
        assert deals_itself(loader)


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
    loader = numbers(8, shuffle=shuffle)
    trainer.fit(module, loader)
    assert trainer.num_training_batches == 4
    if not shuffle:
        assert module.seen == [1, 3, 5, 7] * 2
    else:
        assert module.seen[:4] != module.seen[4:]
    assert type(loader.sampler) is (RandomSampler if shuffle else SequentialSampler)
    assert trainer.train_dataloader is loader


def test_every_loader_of_several_is_dealt_out() -> None:
    class Both(Notes):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(torch.cat(list(batch.values())), batch_idx)

    trainer, module = trainer_of(max_epochs=1), Both()
    trainer.fit(module, {"a": numbers(4), "b": numbers(2)})
    assert module.seen == [1, 1, 3, 1]


def test_overfitting_takes_the_first_batches_of_all_processes() -> None:
    module = Notes()
    with pytest.warns(UserWarning, match="shuffling of train_dataloader is turned off"):
        trainer_of(overfit_batches=2).fit(module, numbers(9, shuffle=True))
    assert module.seen == [1, 3] * 2


def test_evaluations_and_predictions_repeat_no_sample_and_say_nothing() -> None:
    module = Notes()
    trainer = trainer_of()
    trainer.validate(module, numbers(5), verbose=False)
    assert module.seen == [1, 3]
    assert trainer.num_val_batches == [3]  # those of all
    assert trainer_of().predict(module, numbers(5)) == [[1], [3]]


def test_who_deals_out_by_himself_turns_it_off() -> None:
    module = Notes()
    trainer_of(use_distributed_sampler=False, max_epochs=1).fit(module, numbers(3))
    assert module.seen == [0, 1, 2]
