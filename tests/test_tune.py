"""The Tuner, as a user calls it: what it finds, what it sets, and that nothing else is another afterwards."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, DataModule, Module, Trainer
from trainkit.callbacks import BatchSizeFinder, LearningRateFinder
from trainkit.errors import MisconfigurationException
from trainkit.tune import Tuner

QUIET: dict[str, Any] = {
    "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1
}  # fmt: skip


class Net(Module):
    """A module with its own data, dropout and batch norm, and a batch that can be too large."""

    def __init__(self, batch_size: int = 4, lr: float = 0.05, limit: int = 10**9) -> None:
        super().__init__()
        self.save_hyperparameters("lr")
        self.batch_size, self.limit = batch_size, limit
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.sizes: list[int] = []

    def loss(self, batch: Any) -> torch.Tensor:
        self.sizes.append(len(batch[0]))
        if len(batch[0]) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def data(self, shuffle: bool = False) -> Any:
        x = torch.linspace(-1, 1, 300).reshape(100, 3)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), self.batch_size, shuffle=shuffle, drop_last=True)

    def train_dataloader(self) -> Any:
        return self.data(shuffle=True)

    def val_dataloader(self) -> Any:
        return self.data()

    test_dataloader = predict_dataloader = val_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Witness(Callback):
    """Write down every hook that is called."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        self.heard.append("setup")

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        self.heard.append("on_train_start")

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        self.heard.append("on_exception")

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        self.heard.append("teardown")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def draws() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("tune", ["lr", "power", "binsearch", "failing"])
def test_a_fit_after_tuning_is_the_fit_without_it(tune: str, tmp_path: Path) -> None:
    ends = []
    for tuned in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        module, witness = Net(), Witness()
        trainer = Trainer(max_epochs=2, callbacks=witness, default_root_dir=tmp_path / str(tuned), **QUIET)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        if tuned:
            tuner = Tuner(trainer)
            if tune == "lr":
                tuner.lr_find(module, update_attr=False, num_training=30)
            elif tune == "failing":
                module.limit = 0
                with pytest.raises(torch.OutOfMemoryError):
                    tuner.lr_find(module, num_training=30)
                module.limit = 10**9
            else:
                module.limit = 32
                tuner.scale_batch_size(module, mode=tune)
                module.batch_size, module.limit = 4, 10**9
            assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
            assert all(parameter.grad is None for parameter in module.parameters())
            assert (trainer.global_step, trainer.current_epoch, trainer.should_stop) == (0, 0, False)
            assert (trainer.max_epochs, trainer.max_steps, trainer.limit_val_batches) == (2, -1, 1.0)
            assert witness.heard == []
            assert files(tmp_path / "True") == []
        after = draws()
        trainer.fit(module)
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        ends.append((weights, after, draws(), dict(trainer.callback_metrics), files(tmp_path / str(tuned))))
    for one, other in zip(ends[0], ends[1], strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in one.items())
        elif isinstance(one, tuple):
            assert one == other
    assert len(ends[0][4]) == len(ends[1][4])


def test_loaders_that_were_handed_over_give_the_same_order_afterwards(TinyModule: Any, TinyData: Any) -> None:
    data = TinyData()
    orders = []
    for tuned in (False, True):
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(data.x, data.y), 4, shuffle=True, generator=generator)
        module = TinyModule()
        trainer = Trainer(max_epochs=1, enable_checkpointing=False, logger=False, **QUIET)
        if tuned:
            Tuner(trainer).lr_find(module, loader, update_attr=False, num_training=5)
        trainer.fit(module, loader)
        orders.append((module.state_dict(), generator.get_state()))
    assert all(torch.equal(value, orders[1][0][name]) for name, value in orders[0][0].items())
    assert torch.equal(orders[0][1], orders[1][1])


def test_a_search_looks_like_a_run_that_ended_well(TinyModule: Any, TinyData: Any) -> None:
    limits = []

    class Asks(TinyModule):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            limits.append((self.trainer.max_steps, self.trainer.fit_loop.max_steps))

    trainer = Trainer(max_epochs=1, max_steps=3, **QUIET)  # type: ignore[arg-type]
    Tuner(trainer).lr_find(Asks(), datamodule=TinyData(), num_training=12, early_stop_threshold=None)
    assert limits == [(12, 12)] * 12  # epochs and steps of the run itself do not cut the search
    assert trainer.state.finished
    assert (trainer.max_steps, trainer.global_step, trainer.current_epoch, trainer.stage) == (3, 0, 0, None)


def test_the_rate_that_was_found_is_set_and_the_search_repeats_itself(capsys: Any) -> None:
    module = Net()
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, logger=False, **QUIET)
    finders = [Tuner(trainer).lr_find(module, early_stop_threshold=None) for _ in range(2)]
    assert finders[0] is not None
    assert finders[1] is not None
    assert finders[0].results == finders[1].results
    assert module.hparams.lr == finders[0].suggestion()
    assert module.trainer is trainer
    assert capsys.readouterr().out.count("lr = ") == 2


@pytest.mark.parametrize("where", ["attribute", "hparams", "learning_rate", "named", "datamodule", "nested"])
def test_a_rate_is_set_where_it_is(where: str, TinyData: Any) -> None:
    class Somewhere(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Somewhere()
    del module.hparams["lr"]
    data, name = TinyData(), ""
    if where == "attribute":
        module.lr = None
    elif where == "hparams":
        module.hparams.lr = None
    elif where == "learning_rate":
        module.learning_rate = None
    elif where == "named":
        module.speed, name = None, "speed"
    elif where == "nested":
        module.hparams["optim"], name = {"lr": 1.0}, "optim.lr"
    else:
        data.lr = None
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, logger=False, **QUIET)
    finder = Tuner(trainer).lr_find(module, datamodule=data, attr_name=name, num_training=20)
    assert finder is not None
    found = {
        "attribute": lambda: module.lr, "hparams": lambda: module.hparams.lr, "named": lambda: module.speed,
        "learning_rate": lambda: module.learning_rate, "datamodule": lambda: data.lr,
        "nested": lambda: module.hparams["optim"]["lr"],
    }[where]()  # fmt: skip
    assert found == finder.suggestion()


@pytest.mark.parametrize("name", ["", "speed"])
def test_a_rate_without_a_place_is_an_error_before_anything_is_tried(name: str) -> None:
    module = Net()
    del module.hparams["lr"]
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    tuner = Tuner(Trainer(max_epochs=1, **QUIET))
    with pytest.raises(AttributeError, match=name or "'lr' or 'learning_rate'"):
        tuner.lr_find(module, attr_name=name)
    assert module.sizes == []


def test_too_few_updates_leave_the_rate_alone(caplog: Any) -> None:
    module = Net(lr=0.123)
    finder = Tuner(Trainer(max_epochs=1, logger=False, **QUIET)).lr_find(module, num_training=1)
    assert finder is not None
    assert finder.suggestion() is None
    assert module.hparams.lr == 0.123


@pytest.mark.parametrize(
    ("method", "mode", "found"),
    [
        ("fit", "power", 32),
        ("fit", "binsearch", 38),
        ("validate", "power", 32),
        ("test", "binsearch", 38),
        ("predict", "power", 32),
    ],
)
def test_the_largest_batch_that_fits_is_found_and_set(method: Any, mode: str, found: int, capsys: Any) -> None:
    module = Net(limit=40)
    trainer = Trainer(max_epochs=5, logger=False, enable_checkpointing=False, **QUIET)
    assert Tuner(trainer).scale_batch_size(module, method=method, mode=mode, steps_per_trial=2) == found
    assert module.batch_size == found
    kind = {"fit": "train_dataloader", "validate": "val_dataloaders"}.get(method, f"{method}_dataloaders")
    assert getattr(trainer, kind).batch_size == found
    assert module.sizes[:4] == [2, 2, 4, 4]
    assert 64 in module.sizes
    out = capsys.readouterr().out
    assert "batch_size = 32 fits\n" in out
    assert "batch_size = 64 does not fit into memory\n" in out


def test_where_memory_never_runs_out_the_data_set_or_max_val_is_the_end() -> None:
    module, trainer = Net(), Trainer(max_epochs=5, logger=False, enable_checkpointing=False, **QUIET)
    assert Tuner(trainer).scale_batch_size(module, init_val=16, max_val=50) == 50
    module.data = lambda shuffle=False: DataLoader(  # type: ignore[method-assign]
        TensorDataset(torch.ones(100, 3), torch.ones(100, 1)), module.batch_size
    )
    module.batch_size = 4
    assert Tuner(trainer).scale_batch_size(module, init_val=32) == 128
    assert max(module.sizes) == 100
    module.batch_size = 4
    assert Tuner(trainer).scale_batch_size(module, mode="binsearch", init_val=64, margin=0.5) == 64  # half of 128
    assert Tuner(trainer).scale_batch_size(module, max_trials=3) == 8


def test_errors_that_are_not_about_memory_are_raised_and_the_size_comes_back() -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) > 8:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    module, trainer = Broken(batch_size=3), Trainer(max_epochs=5, **QUIET)
    with pytest.raises(RuntimeError, match="broken"):
        Tuner(trainer).scale_batch_size(module)
    assert module.batch_size == 3
    assert trainer.callbacks
    assert os.listdir(".") == []
    with pytest.raises(RuntimeError, match="batch_size = 1 already"):
        Tuner(trainer).scale_batch_size(Net(limit=0))


def test_a_size_is_set_on_all_that_have_it(TinyModule: Any, TinyData: Any) -> None:
    module, data = TinyModule(), TinyData()
    module.batch_size = 7
    data.hparams["batch_size"] = 9
    trainer = Trainer(max_epochs=5, logger=False, **QUIET)
    assert Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2) == 4
    assert (module.batch_size, data.batch_size, data.hparams["batch_size"]) == (4, 4, 4)
    assert trainer.datamodule is data


def test_a_data_module_does_not_hear_of_an_exception() -> None:
    class Data(DataModule):
        heard: tuple[str, ...] = ()
        batch_size = 2

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.ones(8, 3), torch.ones(8, 1)), self.batch_size)

        def setup(self, stage: str) -> None:
            self.heard += ("setup",)

        def teardown(self, stage: str) -> None:
            self.heard += ("teardown",)

        def on_exception(self, exception: BaseException) -> None:
            self.heard += ("on_exception",)

    data = Data()
    Tuner(Trainer(max_epochs=1, logger=False, **QUIET)).lr_find(Net(), datamodule=data, num_training=5)
    assert data.heard == ("setup", "teardown")


def test_a_fast_dev_run_searches_nothing() -> None:
    module, tuner = Net(), Tuner(Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False))
    with pytest.warns(UserWarning, match="fast_dev_run"):
        assert tuner.lr_find(module) is None
    with pytest.warns(UserWarning, match="fast_dev_run"):
        assert tuner.scale_batch_size(module) is None
    assert module.sizes == []


def test_what_can_not_be_tuned_is_refused_with_the_reason() -> None:
    module, tuner = Net(), Tuner(Trainer(max_epochs=1, logger=False, **QUIET))
    loader = module.data()
    with pytest.raises(ValueError, match="method must be one of"):
        tuner.scale_batch_size(module, method="training")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be"):
        tuner.scale_batch_size(module, mode="triple")
    with pytest.raises(ValueError, match="margin must be"):
        tuner.scale_batch_size(module, margin=1.0)
    with pytest.raises(ValueError, match="mode must be"):
        tuner.lr_find(module, mode="cubic")
    with pytest.raises(MisconfigurationException, match="method='fit' only"):
        tuner.lr_find(module, method="test")
    with pytest.raises(MisconfigurationException, match="give train_dataloaders and val_dataloaders"):
        tuner.lr_find(module, dataloaders=loader)
    with pytest.raises(MisconfigurationException, match="give dataloaders"):
        tuner.scale_batch_size(module, train_dataloaders=loader, method="test")
    with pytest.raises(MisconfigurationException, match="handed to fit"):
        tuner.scale_batch_size(module, train_dataloaders=loader)
    with pytest.raises(MisconfigurationException, match="handed to predict"):
        tuner.scale_batch_size(module, dataloaders=loader, method="predict")
    with pytest.raises(MisconfigurationException, match="'size'"):
        tuner.scale_batch_size(module, batch_arg_name="size")
    module.test_dataloader = lambda: [loader, loader]  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="several test loaders"):
        tuner.scale_batch_size(module, method="test")
    for finder, call in ((LearningRateFinder, "lr_find"), (BatchSizeFinder, "scale_batch_size")):
        busy = Tuner(Trainer(max_epochs=1, logger=False, callbacks=finder(), **QUIET))
        with pytest.raises(ValueError, match=f"has a {finder.__name__}"):
            getattr(busy, call)(module)


def test_a_size_in_two_places_of_a_module_is_doubtful() -> None:
    module = Net()
    module.hparams["batch_size"] = 4
    tuner = Tuner(Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **QUIET))
    with pytest.warns(UserWarning, match="both will be set"):
        assert tuner.scale_batch_size(module, max_trials=1) == module.hparams.batch_size == 2
