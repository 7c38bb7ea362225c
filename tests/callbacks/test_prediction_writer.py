from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset

from trainkit import Module, Trainer
from trainkit.callbacks import BasePredictionWriter
from trainkit.errors import MisconfigurationException

DATA: Any = list(torch.arange(6.0))


class Echo(Module):
    """Predicts the samples themselves, so that they can be compared with the indices."""

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return batch * 1


class Writer(BasePredictionWriter):
    def __init__(self, write_interval: Any) -> None:
        super().__init__(write_interval)
        self.batches: list[tuple[Any, ...]] = []
        self.epochs: list[tuple[Any, Any]] = []

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Tensor, batch_indices: Any, batch: Tensor, batch_idx: int,
        dataloader_idx: int,
    ) -> None:  # fmt: skip
        assert prediction.tolist() == batch.tolist()
        self.batches.append((dataloader_idx, batch_idx, prediction.tolist(), batch_indices))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epochs.append((predictions, batch_indices))


def predict(writer: BasePredictionWriter, loader: Any, keep: bool = False, **settings: Any) -> Any:
    trainer = Trainer(logger=False, enable_progress_bar=False, callbacks=writer, accelerator="cpu", **settings)
    return trainer.predict(Echo(), loader, return_predictions=keep)


class TwoUneven(BatchSampler):
    def __init__(self) -> None:
        super().__init__(SequentialSampler(DATA), 2, False)

    def __iter__(self) -> Iterator[list[int]]:
        yield [3, 1]
        yield [0, 2, 4]

    def __len__(self) -> int:
        return 2


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(DATA)


class Twice(DataLoader[Any]):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield batch


LOADERS = {
    "in order": lambda: DataLoader(DATA, 4),
    "shuffled": lambda: DataLoader(DATA, 4, shuffle=True),
    "workers": lambda: DataLoader(DATA, 1, num_workers=2),
    "weighted": lambda: DataLoader(DATA, 2, sampler=torch.utils.data.WeightedRandomSampler([1.0] * 6, 4)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=TwoUneven()),
    "list as batch sampler": lambda: DataLoader(DATA, batch_sampler=[[5, 0], [2]]),  # type: ignore[arg-type]
    "no batches": lambda: DataLoader(DATA, batch_size=None),
}


@pytest.mark.filterwarnings("ignore:predict_dataloader shuffles its samples")
@pytest.mark.parametrize("name", LOADERS)
def test_each_batch_comes_with_the_indices_of_its_samples(name: str) -> None:
    writer = Writer("batch_and_epoch")
    predict(writer, LOADERS[name]())
    assert len(writer.batches) > 1
    for _, _, prediction, indices in writer.batches:
        assert indices == ([int(prediction)] if name == "no batches" else [int(value) for value in prediction])
    predictions, indices = writer.epochs[0]
    assert [prediction.tolist() for prediction in predictions] == [prediction for *_, prediction, _ in writer.batches]
    assert indices == [[indices for *_, indices in writer.batches]]


def test_indices_are_those_of_the_loaders_own_data_set() -> None:
    writer = Writer("batch")
    predict(writer, DataLoader(Subset(DATA, [5, 3]), 1))
    assert writer.batches == [(0, 0, [5.0], [0]), (0, 1, [3.0], [1])]


UNKNOWABLE = {
    "a stream": lambda: DataLoader(Stream(), 4),
    "no DataLoader": lambda: [torch.ones(1), torch.ones(1)][:1],
    "an __iter__ of its own": lambda: Twice(DATA, 4),
    "workers out of order": lambda: DataLoader(DATA, 4, num_workers=1, in_order=False),
}


@pytest.mark.parametrize("name", UNKNOWABLE)
@pytest.mark.filterwarnings("ignore:predict_dataloader yielded")
def test_indices_that_cannot_be_known_are_none_and_a_warning_says_so(name: str) -> None:
    writer = Writer("batch_and_epoch")
    with pytest.warns(UserWarning, match="Writer: which samples .* can't be known"):
        predict(writer, UNKNOWABLE[name]())
    assert {indices for *_, indices in writer.batches} == {None}
    assert writer.epochs[0][1] == [[None] * len(writer.batches)]


def test_several_loaders_have_indices_each() -> None:
    writer = Writer("batch_and_epoch")
    with pytest.warns(UserWarning, match="the batches of predict_dataloader 1"):
        predict(writer, [DataLoader(DATA, 4), DataLoader(Stream(), 6), DataLoader(DATA, 3)])
    assert [(loader, batch, indices) for loader, batch, _, indices in writer.batches] == [
        (0, 0, [0, 1, 2, 3]), (0, 1, [4, 5]), (1, 0, None), (2, 0, [0, 1, 2]), (2, 1, [3, 4, 5]),
    ]  # fmt: skip
    predictions, indices = writer.epochs[0]
    assert [len(each) for each in predictions] == [2, 1, 2]
    assert indices == [[[0, 1, 2, 3], [4, 5]], [None], [[0, 1, 2], [3, 4, 5]]]


def test_a_limit_ends_the_indices_too_and_a_second_predict_begins_anew() -> None:
    writer = Writer("epoch")
    loader = DataLoader(DATA, 2)
    trainer = Trainer(
        logger=False, enable_progress_bar=False, callbacks=writer, accelerator="cpu", limit_predict_batches=2
    )
    for _ in range(2):
        trainer.predict(Echo(), loader, return_predictions=False)
    assert [indices for _, indices in writer.epochs] == [[[[0, 1], [2, 3]]]] * 2
    assert type(loader.batch_sampler) is BatchSampler  # the user's loader is as it was


def test_the_interval_says_which_method_is_called_and_what_is_returned() -> None:
    for interval, batches, epochs in (("batch", 2, 0), ("epoch", 0, 1), ("batch_and_epoch", 2, 1)):
        writer = Writer(interval)
        assert predict(writer, DataLoader(DATA, 4)) is None
        assert (len(writer.batches), len(writer.epochs)) == (batches, epochs)
        assert (writer.interval.on_batch, writer.interval.on_epoch) == (bool(batches), bool(epochs))
    assert [prediction.tolist() for prediction in predict(Writer("batch"), DataLoader(DATA, 4), keep=True)] == [
        [0.0, 1.0, 2.0, 3.0], [4.0, 5.0],
    ]  # fmt: skip


def test_writing_batches_keeps_none_of_them() -> None:
    class Counting(Writer):
        alive: tuple[weakref.ref[Tensor], ...] = ()
        most = 0

        def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Tensor, *rest: Any) -> None:
            self.alive = (*(ref for ref in self.alive if ref() is not None), weakref.ref(prediction))
            self.most = max(self.most, len(self.alive))

    writer = Counting("batch")
    gc.disable()  # they must go by themselves
    try:
        predict(writer, DataLoader(DATA * 50, 1))
    finally:
        gc.enable()
    assert writer.most <= 2


def test_a_method_that_is_missing_is_an_error_before_anything_is_predicted() -> None:
    class Half(BasePredictionWriter):
        def write_on_epoch_end(self, *_: Any) -> None:
            raise AssertionError

    for writer, missing in ((Half("batch"), "batch"), (BasePredictionWriter("epoch"), "epoch")):
        with pytest.raises(NotImplementedError, match=f"needs write_on_{missing}_end"):
            predict(writer, DataLoader(DATA, 4))


@pytest.mark.parametrize("interval", ["something", None, 1])
def test_an_unknown_interval_is_an_error(interval: Any) -> None:
    with pytest.raises(MisconfigurationException, match='must be "batch", "epoch" or "batch_and_epoch"'):
        Writer(interval)
