"""Every hook of module, callback and datamodule, in the order in which a run calls it.

The written-down order is Lightning's (found by running both), with these differences, which docs/from_lightning.md
explains: `optimizer_zero_grad` comes first in a batch; `optimizer_step` comes where the update is, after backward, and
its closure computes only when it is called a second time; a resumed run skips the sanity check.

In the orders below `cb` is a callback, `pl` the module, `dm` the datamodule, and `both` a callback, then the module.
"""

from __future__ import annotations

from collections.abc import Callable as Function
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, DataModule, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.errors import MisconfigurationException

MODES = ("eval", "train")
LOOPS = [
    f"on_{stage}_{point}"
    for stage in ("validation", "test", "predict")
    for point in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
]
SHARED = [
    *LOOPS, "setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end",
    "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad",
    "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_save_checkpoint", "on_load_checkpoint",
]  # fmt: skip
HOOKS: dict[type, list[str]] = {
    Callback: [
        *SHARED, "on_sanity_check_start", "on_sanity_check_end", "on_exception", "load_state_dict",
    ],
    Module: [
        *SHARED, *(f"on_{stage}_model_{way}" for stage in ("validation", "test", "predict") for way in MODES),
        "on_validation_model_zero_grad", "prepare_data", "train_dataloader", "val_dataloader", "test_dataloader",
        "predict_dataloader", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
        "configure_callbacks", "configure_model", "configure_optimizers", "configure_gradient_clipping",
        "optimizer_step", "optimizer_zero_grad", "backward", "lr_scheduler_step", "manual_backward",
        "training_step", "validation_step", "test_step", "predict_step",
    ],
    DataModule: [
        "prepare_data", "setup", "teardown", "train_dataloader", "val_dataloader", "test_dataloader",
        "predict_dataloader", "state_dict", "load_state_dict", "on_exception",
    ],
}  # fmt: skip


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.line(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.line(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"},
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "epoch"},
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "loss"},
        ]


class FollowsTheFirst(Net):
    def configure_optimizers(self) -> Any:
        optimizers, schedulers = super().configure_optimizers()
        schedulers[2]["monitor"] = "loss/dataloader_idx_0"
        return optimizers, schedulers


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.lr_schedulers()[0].step()


class Breaks(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise MisconfigurationException("broken")


class Data(DataModule):
    def __init__(self, loaders: int = 1) -> None:
        super().__init__()
        self.data = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
        self.loaders = loaders

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=2)

    def val_dataloader(self) -> Any:
        loader = DataLoader(self.data, batch_size=8)
        return loader if self.loaders == 1 else [loader] * self.loaders

    test_dataloader = predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"place": 1}


class Remembers(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"count": 1}


def traced(cls: type, base: type, tag: str, calls: list[str]) -> type:
    """Return the class with every hook of `base` overridden: each notes its call and does what it did."""

    def hook(name: str) -> Function[..., Any]:
        inherited = getattr(cls, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(f"{tag}.{name}")
            return inherited(self, *args, **kwargs)

        return call

    return type(cls.__name__, (cls,), {name: hook(name) for name in HOOKS[base]})


class Run:
    """A trainer with traced parts, and the calls they got."""

    def __init__(
        self, module: type[Module] = Net, loaders: int = 1, extra: list[Callback] | None = None, **settings: Any
    ):
        self.calls: list[str] = []
        self.module = traced(module, Module, "pl", self.calls)()
        self.data = traced(Data, DataModule, "dm", self.calls)(loaders)
        callback = traced(Remembers, Callback, "cb", self.calls)()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": bool(extra),
        }
        self.trainer = Trainer(callbacks=[callback, *(extra or [])], **{**quiet, **defaults, **settings})

    def __call__(self, method: str, **arguments: Any) -> list[str]:
        getattr(self.trainer, method)(self.module, datamodule=self.data, **arguments)
        return self.calls


# ---------------------------------------------------------------- the orders
def lines(*parts: str) -> list[str]:
    """Return the calls in a text; `both.x` is the callback's, then the module's."""
    calls: list[str] = []
    for name in " ".join(parts).split():
        calls += [name.replace("both.", "cb."), name.replace("both.", "pl.")] if name.startswith("both.") else [name]
    return calls


BEGIN = "pl.configure_callbacks dm.prepare_data pl.prepare_data dm.setup both.setup pl.configure_model"
END = "dm.teardown both.teardown"
FIT_START = "pl.configure_optimizers both.on_fit_start"
LOAD = "dm.train_dataloader dm.val_dataloader"
TRANSFER = "pl.on_before_batch_transfer pl.transfer_batch_to_device pl.on_after_batch_transfer"
TRAIN_START = "both.on_train_start"
TRAIN_END = "both.on_train_end both.on_fit_end"
EPOCH_START, EPOCH_END = "both.on_train_epoch_start", "both.on_train_epoch_end"
BATCH_START, BATCH_END = f"{TRANSFER} both.on_train_batch_start", "both.on_train_batch_end"
ZERO_GRAD = "both.on_before_zero_grad pl.optimizer_zero_grad"
BACKWARD = "both.on_before_backward pl.backward both.on_after_backward"
STEP = "pl.optimizer_step both.on_before_optimizer_step pl.configure_gradient_clipping"
SCHEDULE = "pl.lr_scheduler_step"
UPDATE = f"{ZERO_GRAD} pl.training_step {BACKWARD} {STEP} {SCHEDULE}"
BATCH, LAST_BATCH = f"{BATCH_START} {UPDATE} {BATCH_END}", f"{BATCH_START} {UPDATE} {SCHEDULE} {BATCH_END}"
MANUAL_BATCH = f"""
    {BATCH_START} pl.training_step pl.manual_backward {BACKWARD} both.on_before_optimizer_step {BATCH_END}
"""


def evaluation(stage: str, step: str, batches: int = 1) -> str:
    """Return the order of one evaluation."""
    batch = f"{TRANSFER} both.on_{stage}_batch_start pl.{step} both.on_{stage}_batch_end "
    return f"""
        pl.on_{stage}_model_eval both.on_{stage}_start both.on_{stage}_epoch_start {batch * batches}
        both.on_{stage}_epoch_end both.on_{stage}_end pl.on_{stage}_model_train
    """


VALIDATION = "pl.on_validation_model_zero_grad " + evaluation("validation", "validation_step")


def compare(calls: list[str], *order: str) -> None:
    assert calls == lines(*order)


def test_fit_with_its_sanity_check() -> None:
    compare(
        Run(limit_train_batches=2, num_sanity_val_steps=1)("fit"), BEGIN, FIT_START,
        "cb.on_sanity_check_start dm.val_dataloader", evaluation("validation", "validation_step"),
        "cb.on_sanity_check_end dm.train_dataloader", TRAIN_START,
        EPOCH_START, BATCH, LAST_BATCH, VALIDATION, EPOCH_END, SCHEDULE, TRAIN_END, END,
    )  # fmt: skip


def test_accumulation_clears_before_a_window_and_steps_after_it() -> None:
    first = f"{BATCH_START} {ZERO_GRAD} pl.training_step {BACKWARD} {BATCH_END}"
    second = f"{BATCH_START} pl.training_step {BACKWARD} {STEP} {SCHEDULE}"
    compare(
        Run(accumulate_grad_batches=2, gradient_clip_val=1.0)("fit"), BEGIN, FIT_START, LOAD, TRAIN_START,
        EPOCH_START, first, second, BATCH_END, first, second, SCHEDULE, BATCH_END, VALIDATION, EPOCH_END, SCHEDULE,
        TRAIN_END, END,
    )  # fmt: skip


def test_manual_optimization() -> None:
    compare(
        Run(Manual, limit_train_batches=2)("fit"), BEGIN, FIT_START, LOAD, TRAIN_START,
        EPOCH_START, MANUAL_BATCH, MANUAL_BATCH, VALIDATION, EPOCH_END, TRAIN_END, END,
    )  # fmt: skip


def test_validation_inside_an_epoch() -> None:
    compare(
        Run(val_check_interval=2)("fit"), BEGIN, FIT_START, LOAD, TRAIN_START,
        EPOCH_START, BATCH, BATCH, VALIDATION, BATCH, LAST_BATCH, VALIDATION, EPOCH_END, SCHEDULE, TRAIN_END, END,
    )  # fmt: skip


def test_two_epochs_with_two_validation_loaders() -> None:
    validation = "pl.on_validation_model_zero_grad " + evaluation("validation", "validation_step", 2)
    run = Run(FollowsTheFirst, loaders=2, limit_train_batches=1, max_epochs=2, num_sanity_val_steps=-1)
    epoch = f"{EPOCH_START} {LAST_BATCH} {validation} {EPOCH_END} {SCHEDULE}"
    compare(
        run("fit"), BEGIN, FIT_START,
        "cb.on_sanity_check_start dm.val_dataloader", evaluation("validation", "validation_step", 2),
        "cb.on_sanity_check_end dm.train_dataloader", TRAIN_START, epoch, epoch, TRAIN_END, END,
    )  # fmt: skip


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize(
    ("method", "stage", "step", "loader"),
    [
        ("validate", "validation", "validation_step", "val_dataloader"),
        ("test", "test", "test_step", "test_dataloader"),
        ("predict", "predict", "predict_step", "predict_dataloader"),
    ],
)
def test_validate_test_and_predict(method: str, stage: str, step: str, loader: str, loaders: int) -> None:
    calls = Run(loaders=loaders)(method)
    compare(calls, BEGIN, f"dm.{loader}", evaluation(stage, step, loaders), END)


def test_an_error_is_told_and_everything_is_torn_down() -> None:
    run = Run(Breaks)
    with pytest.raises(MisconfigurationException, match="broken"):
        run("fit")
    compare(
        run.calls, BEGIN, FIT_START, LOAD, TRAIN_START, EPOCH_START, BATCH_START, ZERO_GRAD, "pl.training_step",
        "cb.on_exception dm.on_exception", END,
    )  # fmt: skip


def test_saving_and_resuming(tmp_path: Path) -> None:
    epoch = f"{EPOCH_START} {LAST_BATCH} {VALIDATION} {EPOCH_END} {SCHEDULE}"
    saves = Run(extra=[ModelCheckpoint(tmp_path, filename="whole")], limit_train_batches=1)
    compare(
        saves("fit"), BEGIN, FIT_START, LOAD, TRAIN_START, epoch,
        "dm.state_dict both.on_save_checkpoint", TRAIN_END, END,
    )  # fmt: skip
    resumes = Run(limit_train_batches=1, max_epochs=2, num_sanity_val_steps=2)
    compare(
        resumes("fit", ckpt_path=tmp_path / "whole.ckpt"), BEGIN, "pl.on_load_checkpoint dm.load_state_dict",
        "cb.on_load_checkpoint cb.load_state_dict", FIT_START, LOAD, TRAIN_START, epoch, TRAIN_END, END,
    )  # fmt: skip


def test_the_table_has_every_hook_there_is() -> None:
    """A new hook must get its place in an order above."""
    not_hooks = {"on_gpu", "on_save_point"}  # a fact; and trainkit's own, where all is quiet for a save
    in_the_module_instead = {"on_before_batch_transfer", "on_after_batch_transfer"}
    for base, names in HOOKS.items():
        hooks = {name for name in dir(base) if name.startswith("on_") or name in ("setup", "teardown")} - not_hooks
        if base is DataModule:
            hooks -= in_the_module_instead
        assert hooks <= {*names}, hooks - {*names}
