"""What a run tells about itself, from inside its hooks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainkit import Callback, Trainer, seed_everything
from trainkit.errors import MisconfigurationException
from trainkit.status import results_table

BARE = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
STAGES = ("training", "validating", "testing", "predicting", "evaluating", "sanity_checking")


class Asks(Callback):
    def __init__(self) -> None:
        self.stages: dict[str, list[str]] = {}

    def note(self, hook: str, trainer: Trainer) -> None:
        self.stages[hook] = [name for name in STAGES if getattr(trainer, name)]

    def on_sanity_check_start(self, trainer: Trainer, module: Any) -> None:
        self.note("sanity", trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("train", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.note("validation", trainer)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("test", trainer)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("predict", trainer)


def test_the_stage_flags(TinyModule: Any, TinyData: Any) -> None:
    asks, module, data = Asks(), TinyModule(), TinyData()
    trainer = Trainer(**BARE, max_epochs=1, callbacks=asks)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)
    assert asks.stages == {
        "sanity": ["evaluating", "sanity_checking"],
        "train": ["training"],
        "validation": ["validating", "evaluating"],
        "test": ["testing", "evaluating"],
        "predict": ["predicting"],
    }
    assert not any(getattr(trainer, name) for name in STAGES)


def test_the_module_knows_where_its_run_is(TinyModule: Any, TinyData: Any) -> None:
    seen = []

    class Looks(TinyModule):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append((self.current_epoch, self.global_step, self.trainer.is_last_batch, self.logger))
            return super().training_step(batch, batch_idx)

    trainer = Trainer(**BARE, max_epochs=2, limit_train_batches=2)
    trainer.fit(Looks(), datamodule=TinyData())
    assert seen == [(0, 0, False, None), (0, 1, True, None), (1, 2, False, None), (1, 3, True, None)]
    assert trainer.log_step == 4


def test_before_a_run_there_is_nothing_to_tell() -> None:
    trainer = Trainer(**BARE, max_epochs=1)
    assert (trainer.current_epoch, trainer.global_step, trainer.callback_metrics) == (0, 0, {})
    assert trainer.num_training_batches == math.inf
    assert trainer.train_dataloader is None
    assert trainer.log_dir == trainer.default_root_dir
    assert (trainer.global_rank, trainer.world_size, trainer.is_global_zero) == (0, 1, True)


def test_the_seed_is_what_seed_everything_was_given(monkeypatch: Any) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    trainer = Trainer(**BARE, max_epochs=1)
    assert trainer.seed is None
    seed_everything(7, verbose=False)
    assert trainer.seed == 7


def test_metrics_come_as_tensors_and_numbers(TinyModule: Any, TinyData: Any) -> None:
    class Shows(TinyModule):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("shown", loss, prog_bar=True)
            return loss

    trainer = Trainer(**{**BARE, "logger": True}, max_epochs=1, log_every_n_steps=4)
    trainer.fit(Shows(), datamodule=TinyData())
    assert set(trainer.callback_metrics) == {"train_loss", "shown", "val_loss"}
    assert set(trainer.logged_metrics) == {"train_loss", "shown", "val_loss"}
    assert torch.is_tensor(trainer.logged_metrics["shown"])
    assert trainer.progress_bar_metrics == {"shown": trainer.callback_metrics["shown"].item()}


def test_results_are_a_table_with_a_column_for_each_loader() -> None:
    assert results_table("test", [{}]) == "test: nothing was logged"
    assert results_table("test", [{"loss": 0.25, "accuracy": 1.0}]).splitlines() == [
        "Test metric   DataLoader 0",
        "accuracy                 1",
        "loss                  0.25",
    ]
    two = results_table("test", [{"a/dataloader_idx_0": 1.5}, {"a/dataloader_idx_1": 2.5}])
    assert [line.split() for line in two.splitlines()] == [
        ["Test", "metric", "DataLoader", "0", "DataLoader", "1"],
        ["a", "1.5", "2.5"],
    ]


def test_the_number_of_updates_is_known_from_fit_on() -> None:
    with pytest.raises(MisconfigurationException, match="known from fit on"):
        _ = Trainer(accelerator="cpu", logger=False).estimated_stepping_batches
