"""What watching a metric means: which value is better, and whether it is a new one."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import EarlyStopping, ModelCheckpoint
from trainkit.callbacks.monitor import Watch
from trainkit.checkpoint import policy
from trainkit.errors import MisconfigurationException


@given(value=st.floats(), than=st.floats(), mode=st.sampled_from(["min", "max"]))
def test_a_value_is_better_in_one_direction_only_and_nan_in_none(value: float, than: float, mode: str) -> None:
    watch = Watch("Mine", "x", mode)
    assert not (watch.better(value, than) and watch.better(than, value))
    assert not watch.better(value, value)
    assert not watch.better(math.nan, value)
    if math.isfinite(value) and math.isfinite(than):
        assert watch.better(value, than) == (policy.rank(value, mode) < policy.rank(than, mode))


@pytest.mark.parametrize(
    ("monitor", "news"),
    [
        # at each batch, validation and epoch of two epochs of two batches, validated after the second epoch only
        ("step", "b b e b b v e"),
        ("step_and_epoch_step", "b b e b b v e"),
        ("step_and_epoch_epoch", "e e"),
        ("epoch", "e e"),
        ("val", "v e"),
        ("nowhere", ""),
    ],
)
def test_a_value_is_new_where_something_gave_it(monitor: str, news: str) -> None:
    seen: list[str] = []

    class Mine(Callback):
        monitors = True
        watch = Watch("Mine", monitor, "min")

        def on_train_batch_end(
            self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen.extend("b" * self.watch.is_new(trainer, "batch"))

        def on_validation_end(self, trainer: Trainer, module: Module) -> None:
            self.watch.after_validation(trainer)
            seen.extend("v" * self.watch.is_new(trainer, "validation"))

        def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
            new = self.watch.is_new(trainer, "epoch")
            seen.extend("e" * new)
            if new:
                assert self.watch.read(trainer).device.type == "cpu"

    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.line(batch).mean()
            self.log("step", loss)
            self.log("step_and_epoch", loss, on_epoch=True)
            self.log("epoch", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 1.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    data: Any = DataLoader(torch.ones(2, 2))
    trainer = Trainer(
        accelerator="cpu", callbacks=[Mine()], max_epochs=2, check_val_every_n_epoch=2, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(), data, data)
    assert seen == news.split()


def test_a_mode_that_is_neither_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r'Mine\(mode=\.\.\.\) must be "min" .*Received: \'less\''):
        Watch("Mine", "x", "less")


@pytest.mark.parametrize("callback", [EarlyStopping, ModelCheckpoint])
def test_a_name_that_looks_misspelt_is_doubted_before_the_first_step(
    callback: Any, TinyModule: Any, TinyData: Any
) -> None:
    class Never(TinyModule):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise InterruptedError

    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    trainer = Trainer(accelerator="cpu", callbacks=callback(monitor="val/loss"), **settings)
    with pytest.raises(InterruptedError), pytest.warns(UserWarning, match="the sanity check logged 'val_loss'"):
        trainer.fit(Never(), datamodule=TinyData())
