"""`log` and `log_dict` as modules and callbacks call them: where, with which options, and at what cost."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import trainkit
from trainkit import Callback, Module, Trainer
from trainkit.errors import MisconfigurationException


class Net(Module):
    def __init__(self, log: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.log_with = log

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.log_with is not None:
            self.log_with(self, batch)
        return self.line(batch[:, None]).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


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


def loader(count: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.arange(float(count)), batch_size=4)  # type: ignore[arg-type]


# ---------------------------------------------------------------- where
BATCH_METHODS = [
    "training_step", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "optimizer_zero_grad",
    "on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step",
    "configure_gradient_clipping", "clip_gradients",
]  # fmt: skip


@pytest.mark.parametrize("name", BATCH_METHODS)
def test_each_method_of_a_training_batch_logs_by_step_under_its_own_options(name: str) -> None:
    def method(self: Net, *args: Any, **kwargs: Any) -> Any:
        self.log("own", 2.0)
        if name != "training_step":
            self.log("shared", 1.0, on_epoch=True)  # what training_step logs is another metric of that name
        return getattr(Net, name)(self, *args, **kwargs)

    module = type("Logs", (Net,), {name: method})(lambda self, _: self.log("shared", 3.0, on_step=True))
    trainer = trainer_of(gradient_clip_val=1.0)
    trainer.fit(module, loader())
    assert trainer.callback_metrics["own"] == 2.0
    assert "own_step" not in trainer.callback_metrics


REFUSING = [
    "prepare_data", "setup", "configure_callbacks", "configure_model", "configure_optimizers", "on_fit_start",
    "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "lr_scheduler_step",
    "on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_model_train", "on_validation_end",
    "on_train_end", "on_fit_end", "teardown",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSING)
def test_where_nothing_can_be_logged_the_methods_of_a_module_are_refused(name: str) -> None:
    def method(self: Net, *args: Any, **kwargs: Any) -> Any:
        self.log("x", 1.0)

    with pytest.raises(MisconfigurationException, match=r"self.log\('x', ...\) can't be used"):
        trainer_of().fit(type("Logs", (Net,), {name: method})(), loader(), loader())


@pytest.mark.parametrize("event", ["start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end"])
def test_predict_logs_nothing(event: str) -> None:
    hook = f"on_predict_{event}"
    callback = type("Logs", (Callback,), {hook: lambda self, *_: self.log("x", 1.0)})()
    module = type("Predicts", (Net,), {"predict_step": lambda self, batch, batch_idx: batch})()
    with pytest.raises(MisconfigurationException, match=f"can't be used in {hook}: predict logs nothing"):
        trainer_of(callbacks=callback).predict(module, loader())


def test_after_the_run_nothing_can_be_logged() -> None:
    module, callback = Net(), Callback()
    trainer_of(callbacks=callback).fit(module, loader())
    for owner in (module, callback):
        with pytest.raises(MisconfigurationException, match="can't be used after the run"):
            owner.log("x", 1.0)


def test_without_a_run_a_value_is_checked_and_passed_over_with_a_warning() -> None:
    for owner in (Net(), Callback()):
        with pytest.warns(UserWarning, match="does nothing: this object is not attached to a Trainer"):
            owner.log("x", 1.0)
        with pytest.raises(ValueError, match="Received: str"):
            owner.log("x", "high")


# ---------------------------------------------------------------- callbacks
def test_a_callback_logs_as_the_module_does() -> None:
    class Logs(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.log("index", float(batch_idx), on_epoch=True, prog_bar=True)

        def on_validation_epoch_end(self, trainer: Trainer, module: Module) -> None:
            self.log_dict({"a": 1.0, "b": torch.tensor(2.0)}, prog_bar=True)

    trainer = trainer_of(callbacks=Logs())
    trainer.fit(Net(), loader(), loader())
    assert trainer.callback_metrics == {"index": 0.5, "index_step": 1.0, "index_epoch": 0.5, "a": 1.0, "b": 2.0}
    assert trainer.progress_bar_metrics == {"index_step": 1.0, "index_epoch": 0.5, "a": 1.0, "b": 2.0}


def test_a_callbacks_own_log_is_left_alone() -> None:
    class Own(Callback):
        def __init__(self) -> None:
            self.log = ["mine"]  # type: ignore[assignment, method-assign]

    callback = Own()
    trainer_of(callbacks=callback).fit(Net(), loader())
    assert callback.log == ["mine"]


def test_a_copy_is_not_a_part_of_the_run() -> None:
    class Copies(Callback):
        def on_train_start(self, trainer: Trainer, module: Module) -> None:
            copies.extend([copy.deepcopy(self), copy.deepcopy(module)])

    copies: list[Any] = []
    trainer_of(callbacks=Copies()).fit(Net(), loader())
    for owner in copies:
        with pytest.warns(UserWarning, match="not attached"):
            owner.log("x", 1.0)


# ---------------------------------------------------------------- options
def test_the_same_options_may_be_said_differently() -> None:
    def log(self: Module, batch: Tensor) -> None:
        self.log("x", 1.0)
        self.log("x", 2.0, on_step=True, on_epoch=False, reduce_fx=torch.mean, logger=True, batch_size=3)
        self.log("x", 3.0, sync_dist=True)

    trainer = trainer_of()
    trainer.fit(Net(log), loader())
    assert trainer.callback_metrics == {"x": 3.0}


def test_logger_true_without_a_logger_is_doubted() -> None:
    with pytest.warns(UserWarning, match=r"'x', ..., logger=True\): this Trainer has no logger"):
        trainer_of().fit(Net(lambda self, batch: self.log("x", 1.0, logger=True)), loader())


def test_barebones_logs_nothing_and_says_so_once() -> None:
    trainer = Trainer(accelerator="cpu", barebones=True, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Net(lambda self, batch: self.log("x", batch.mean(), prog_bar=True)), loader())
    about_log = [str(warning.message) for warning in caught if "self.log" in str(warning.message)]
    assert about_log == ["self.log does nothing in a Trainer(barebones=True), which measures the loop alone."]
    assert trainer.callback_metrics == trainer.logged_metrics == trainer.progress_bar_metrics == {}


def test_options_reach_each_value_of_a_dict() -> None:
    def log(self: Module, batch: Tensor) -> None:
        self.log_dict({"a": batch.sum(), "b": 1.0}, on_step=False, on_epoch=True, reduce_fx="max", prog_bar=True)

    trainer = trainer_of()
    trainer.fit(Net(log), loader())
    assert trainer.progress_bar_metrics == {"a": 22.0, "b": 1.0}


# ---------------------------------------------------------------- cost
FOLDER = str(Path(trainkit.__file__).parent)


def calls_of(log: Callable[..., Any]) -> list[int]:
    """Return how many Python calls in trainkit each call of `log` made, from the first batch on."""

    def counted(module: Module, batch: Tensor) -> None:
        calls = 0

        def count(frame: Any, event: str, _: Any) -> None:
            nonlocal calls
            calls += event == "call" and frame.f_code.co_filename.startswith(FOLDER)

        sys.setprofile(count)
        try:
            log(module, batch)
        finally:
            sys.setprofile(None)
        counts.append(calls)

    counts: list[int] = []
    trainer_of().fit(Net(counted), loader(20))
    return counts


@pytest.mark.parametrize(
    ("options", "most"), [({}, 3), ({"on_epoch": True}, 6), ({"on_epoch": True, "batch_size": 4}, 4)]
)
def test_options_are_checked_in_the_first_call_and_later_ones_are_short(options: dict[str, Any], most: int) -> None:
    first, *later = calls_of(lambda module, batch: module.log("x", batch.mean(), **options))
    assert max(later) <= most < first


def test_a_compiled_step_logs() -> None:
    module = Net(lambda self, batch: self.log("x", batch.mean(), on_step=True, on_epoch=True))
    module.training_step = torch.compile(module.training_step, backend="eager")  # type: ignore[method-assign]
    trainer = trainer_of()
    trainer.fit(module, loader())
    assert trainer.callback_metrics == {"x": 3.5, "x_step": 5.5, "x_epoch": 3.5}
