"""Whose loaders a run uses, how they are limited, and when that makes validation due."""

from __future__ import annotations

import math
import multiprocessing
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainkit import Callback, DataModule, Module, Trainer
from trainkit.data.sources import Clock
from trainkit.errors import MisconfigurationException
from trainkit.loggers import Logger


class TrainsOnly(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
        self.seen: list[tuple[str, list[float]]] = []

    def note(self, step: str, batch: Any) -> Any:
        self.seen.append((step, batch.flatten().tolist()))
        return self.line(batch).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.note("train", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.001)


class Line(TrainsOnly):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note("val", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note("test", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.note("predict", batch)


def loader(first: float = 0.0, size: int = 8, **settings: Any) -> DataLoader[Any]:
    return DataLoader(torch.arange(first, first + size).reshape(-1, 1), **{"batch_size": 2, **settings})  # type: ignore[arg-type]


class Stream:
    """Batches without a length."""

    def __iter__(self) -> Any:
        return iter([torch.ones(2, 1)] * 8)


def trainer_of(**settings: Any) -> Trainer:
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(**{**bare, **settings})


class Everything(DataModule):
    def __init__(self, first: float = 100.0) -> None:
        self.first = first

    def train_dataloader(self) -> Any:
        return loader(self.first)

    def val_dataloader(self) -> Any:
        return loader(self.first + 10)

    def test_dataloader(self) -> Any:
        return loader(self.first + 20)

    def predict_dataloader(self) -> Any:
        return loader(self.first + 30)


class BringsItsOwn(Line):
    train_dataloader = Everything.train_dataloader
    val_dataloader = Everything.val_dataloader
    test_dataloader = Everything.test_dataloader
    predict_dataloader = Everything.predict_dataloader
    first = 500.0


def firsts(module: Any) -> dict[str, float]:
    """Return the first number that each kind of step saw."""
    found: dict[str, float] = {}
    for step, numbers in module.seen:
        found.setdefault(step, numbers[0])
    return found


# ---------------------------------------------------------------- whose loaders
def test_loaders_of_the_call_come_before_the_data_modules_and_those_before_the_modules() -> None:
    module = BringsItsOwn()
    trainer_of().fit(module)
    assert firsts(module) == {"train": 500.0, "val": 510.0}
    module = BringsItsOwn()
    trainer = trainer_of()
    trainer.fit(module, datamodule=Everything())
    trainer.test(module, datamodule=Everything(), verbose=False)
    trainer.predict(module, datamodule=Everything())
    assert firsts(module) == {"train": 100.0, "val": 110.0, "test": 120.0, "predict": 130.0}
    module = BringsItsOwn()
    trainer_of().fit(module, loader())
    assert firsts(module) == {"train": 0.0, "val": 510.0}


def test_the_trainer_shows_the_loaders_as_the_user_made_them() -> None:
    train, val = loader(), [loader(), loader()]
    trainer = trainer_of()
    trainer.fit(Line(), train, val)
    assert trainer.train_dataloader is train
    assert trainer.val_dataloaders is val
    assert trainer.num_training_batches == 4
    assert trainer.num_val_batches == [4, 4]


@pytest.mark.parametrize("several", [list, tuple, lambda loaders: dict(zip("ab", loaders, strict=True))])
def test_several_loaders_come_one_after_the_other(several: Any) -> None:
    module = Line()
    trainer_of().validate(module, several([loader(), loader(50.0)]), verbose=False)
    assert [numbers[0] for _, numbers in module.seen] == [0.0, 2.0, 4.0, 6.0, 50.0, 52.0, 54.0, 56.0]


# ---------------------------------------------------------------- what is missing or wrong
def test_missing_data_is_an_error_that_names_the_places_to_give_them() -> None:
    with pytest.raises(MisconfigurationException, match=r"fit needs training data: .*or Line\.train_dataloader"):
        trainer_of().fit(Line())
    for stage, kind in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        with pytest.raises(MisconfigurationException, match=f"{stage} needs data: .*{kind}_dataloader"):
            getattr(trainer_of(), stage)(Line())


def test_fit_without_validation_data_or_step_does_not_validate() -> None:
    for module, val in ((Line(), None), (TrainsOnly(), None)):
        trainer = trainer_of()
        trainer.fit(module, loader(), val)
        assert not trainer.enable_validation
        assert trainer.num_val_batches == []


def test_validation_loaders_without_a_step_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="validation loaders but no validation_step"):
        trainer_of().fit(TrainsOnly(), loader(), loader())


def test_no_validation_batches_turn_validation_off_whatever_the_loader() -> None:
    class Data(Everything):
        def val_dataloader(self) -> Any:
            raise AssertionError("nobody needs it")

    for limit in (0, 0.0):
        module = Line()
        trainer_of(limit_val_batches=limit).fit(module, datamodule=Data())
        assert firsts(module) == {"train": 100.0}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([loader(), 5], "train_dataloader 1 must be an iterable of batches. Received: int"),
        ({"a": loader(), "b": None}, "train_dataloader 1 must be an iterable of batches. Received: NoneType"),
        (5, "train_dataloader must be an iterable of batches. Received: int"),
        (torch.utils.data.TensorDataset(torch.ones(3)), "Wrap the data set"),
    ],
    ids=range(4),
)
def test_training_data_of_another_kind_are_refused(source: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        trainer_of().fit(Line(), source)


def test_one_of_several_loaders_is_named_by_its_number() -> None:
    with pytest.raises(MisconfigurationException, match="val_dataloader 1 is empty"):
        trainer_of().fit(Line(), loader(), [loader(), loader(size=0)])
    with pytest.raises(TypeError, match="test_dataloader must be an iterable"):
        trainer_of().test(Line(), 5)


def test_an_empty_loader_that_nobody_reads_is_no_error() -> None:
    trainer = trainer_of(limit_train_batches=0, limit_test_batches=0)
    trainer.fit(Line(), loader(size=0))
    trainer.test(Line(), loader(size=0), verbose=False)
    assert trainer.global_step == 0


# ---------------------------------------------------------------- limits
def test_each_limit_is_for_its_kind_and_for_each_loader() -> None:
    limits = {"limit_train_batches": 1, "limit_val_batches": 2, "limit_test_batches": 3, "limit_predict_batches": 0.25}
    trainer, module = trainer_of(**limits), Line()
    trainer.fit(module, loader(), [loader(), loader()])
    assert (trainer.num_training_batches, trainer.num_val_batches) == (1, [2, 2])
    trainer.test(module, loader(), verbose=False)
    assert trainer.num_test_batches == [3]
    trainer.predict(module, loader())
    assert trainer.num_predict_batches == [1]
    steps = [step for step, _ in module.seen]
    assert [steps.count(kind) for kind in ("train", "val", "test", "predict")] == [1, 4, 3, 1]


@pytest.mark.parametrize(("overfit", "batches"), [(2, 2), (0.5, 2), (1, 1)])
def test_overfitting_takes_the_same_batches_for_training_and_validation_each_time(overfit: float, batches: int) -> None:
    module = Line()
    trainer = trainer_of(overfit_batches=overfit, max_epochs=3, limit_train_batches=3, limit_val_batches=3)
    with pytest.warns(UserWarning, match="the shuffling of (train|val)_dataloader is turned off"):
        trainer.fit(module, loader(shuffle=True), loader(shuffle=True))
    expected = [[0.0, 1.0], [2.0, 3.0]][:batches]
    for kind in ("train", "val"):
        assert [numbers for step, numbers in module.seen if step == kind] == expected * 3


def test_validation_data_that_are_shuffled_are_shuffled() -> None:
    module = Line()
    with pytest.warns(UserWarning, match="val_dataloader shuffles its samples"):
        trainer_of().validate(module, loader(shuffle=True, size=64), verbose=False)
    numbers = [number for _, batch in module.seen for number in batch]
    assert numbers != sorted(numbers)
    assert sorted(numbers) == list(range(64))


# ---------------------------------------------------------------- when validation is due
@pytest.mark.parametrize(
    ("interval", "source", "every"),
    [
        (None, loader(), None),
        (1.0, loader(), None),
        (0.5, loader(), 2),
        (0.3, loader(), 1),
        (0.01, loader(), 1),
        (3, loader(), 3),
        (4, loader(), 4),
        (1.0, Stream(), None),
        (3, Stream(), 3),
        ("00:01:00:00", loader(), None),
    ],
)
def test_an_interval_becomes_a_number_of_batches(interval: Any, source: Any, every: int | None) -> None:
    trainer = trainer_of(val_check_interval=interval)
    trainer.fit(Line(), source, loader())
    assert trainer.sources.val_every == every


@pytest.mark.parametrize(
    ("interval", "source", "message"),
    [
        (5, loader(), "val_check_interval=5 is more than the 4 training batches.*check_val_every_n_epoch=None"),
        (0.5, Stream(), r"val_check_interval=0\.5 is a fraction, but train_dataloader has no length"),
    ],
)
def test_an_interval_that_would_never_come_is_refused(interval: Any, source: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer_of(val_check_interval=interval).fit(Line(), source, loader())


def test_batches_may_be_counted_across_epochs() -> None:
    module = Line()
    trainer_of(val_check_interval=6, check_val_every_n_epoch=None, max_epochs=3).fit(module, loader(), loader())
    steps = [step for step, _ in module.seen]
    assert [steps[: index + 1].count("train") for index in range(len(steps)) if steps[index] == "val"][::4] == [6, 12]


def test_a_clock_starts_again() -> None:
    clock = Clock()
    assert clock.passed(timedelta())
    assert not clock.passed(timedelta(minutes=1))
    clock.restart()
    assert not clock.passed(timedelta(minutes=1))


# ---------------------------------------------------------------- loaders that are asked for again
def test_reloading_asks_for_both_kinds_and_keeps_the_order_a_function_of_the_seed() -> None:
    class Data(DataModule):
        def __init__(self) -> None:
            self.asked: list[tuple[str, int]] = []

        def train_dataloader(self) -> Any:
            self.asked.append(("train", self.trainer.current_epoch))  # type: ignore[union-attr]
            return loader(shuffle=True)

        def val_dataloader(self) -> Any:
            self.asked.append(("val", self.trainer.current_epoch))  # type: ignore[union-attr]
            return loader()

    def orders(every: int) -> tuple[list[Any], Data]:
        torch.manual_seed(1)
        module, data = Line(), Data()
        trainer_of(reload_dataloaders_every_n_epochs=every, max_epochs=5).fit(module, datamodule=data)
        return [numbers for step, numbers in module.seen if step == "train"], data

    reloaded, data = orders(2)
    once, _ = orders(0)
    assert data.asked == [(kind, epoch) for epoch in (0, 2, 4) for kind in ("train", "val")]
    assert reloaded == once


@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_validation_loaders_from_before_the_first_validating_epoch_are_asked_for_again(sanity_steps: int) -> None:
    asked: list[int] = []

    class Data(Everything):
        def val_dataloader(self) -> Any:
            asked.append(self.trainer.current_epoch)  # type: ignore[union-attr]
            return loader()

    settings = {"reload_dataloaders_every_n_epochs": 2, "check_val_every_n_epoch": 2, "max_epochs": 6}
    trainer_of(**settings, num_sanity_val_steps=sanity_steps).fit(Line(), datamodule=Data())
    assert asked == [0, 1, 3, 5]


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_the_sanity_check_leaves_random_training_data_as_they_are(sanity_steps: int) -> None:
    class Draws(Everything):
        def train_dataloader(self) -> Any:
            return DataLoader(torch.randn(4, 1))  # type: ignore[arg-type]

        def val_dataloader(self) -> Any:
            return DataLoader(torch.randn(4, 1))  # type: ignore[arg-type]

    module = Line()
    torch.manual_seed(3)
    trainer_of(num_sanity_val_steps=sanity_steps).fit(module, datamodule=Draws())
    torch.manual_seed(3)
    expected = torch.randn(4).tolist()
    assert [numbers[0] for step, numbers in module.seen if step == "train"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("run", "name", "arguments"),
    [
        ("validate", "validation_step", "batch, batch_idx, loader_idx"),
        ("test", "on_test_batch_end", "outputs, batch, batch_idx, loader_idx"),
        ("predict", "predict_step", "batch, batch_idx, loader_idx"),
    ],
)
def test_a_method_that_wants_more_than_it_is_given_is_refused(run: str, name: str, arguments: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def method(self, {arguments}): ...", space)
    module = type("Wants", (Line,), {name: space["method"]})()
    with pytest.raises(TypeError, match=rf"Wants.{name} wants \({arguments}\), but with one"):
        getattr(trainer_of(), run)(module, loader())


def test_a_data_set_that_grows_is_sampled_as_a_whole_after_a_reload() -> None:
    class Grows(Dataset[torch.Tensor]):
        size = 2

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([float(index)])

    class Adds(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
            data.size += 2

    class Data(DataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(data, shuffle=True)

    data, module = Grows(), Line()
    trainer_of(reload_dataloaders_every_n_epochs=1, max_epochs=3, callbacks=Adds()).fit(module, datamodule=Data())
    assert len(module.seen) == 2 + 4 + 6
    assert {numbers[0] for _, numbers in module.seen[-6:]} == set(range(6))


# ---------------------------------------------------------------- hints
class Nowhere(Logger):
    """Record nothing."""


def test_a_log_interval_longer_than_an_epoch_is_a_warning_where_somebody_logs() -> None:
    with pytest.warns(UserWarning, match="log_every_n_steps=50 is more than the 4 updates of an epoch"):
        trainer_of(logger=Nowhere()).fit(Line(), loader())
    with pytest.warns(UserWarning, match="more than the 2 updates"):
        trainer_of(logger=Nowhere(), log_every_n_steps=3, accumulate_grad_batches=2).fit(Line(), loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="log_every_n_steps")
        trainer_of(logger=Nowhere(), log_every_n_steps=4).fit(Line(), loader())
        trainer_of(logger=Nowhere(), log_every_n_steps=0).fit(Line(), loader())
        trainer_of().fit(Line(), loader())


def test_a_stream_has_no_number_of_batches() -> None:
    trainer = trainer_of()
    trainer.fit(Line(), Stream())
    assert trainer.num_training_batches == math.inf
    assert trainer.global_step == 8


@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_an_error_ends_the_workers_of_the_epoch_it_came_in(where: str) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("mine")

    module = Line()
    setattr(module, where, fails)
    trainer = Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, logger=False, enable_checkpointing=False)
    with pytest.raises(KeyError, match="mine"):  # it keeps the frames of the loops
        trainer.fit(module, loader(num_workers=2), loader(num_workers=2))
    assert not multiprocessing.active_children()
