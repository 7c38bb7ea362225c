"""Advice at the end of a fit: said where something is wrong, with its evidence, and not where all is well."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint

WAIT = 0.02
STEPS = 40


class Net(Module):
    def __init__(self, step: float = WAIT, validation: float = 0.0) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)
        self.step, self.validation = step, validation

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(self.step)
        return self.line(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(self.validation)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Samples(Dataset[Tensor]):
    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.wait)
        return torch.ones(3)


class Busy(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(WAIT / 2)


def advice(module: Module, wait: float = 0.0, validation: bool = False, **settings: Any) -> list[str]:
    given = {"enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, num_sanity_val_steps=0,
        **(given | settings),
    )  # fmt: skip
    trainer.fit(module, DataLoader(Samples(wait)), DataLoader(Samples()) if validation else None)
    return [str(each) for each in trainer.report_timing().advice]


def test_nothing_is_said_where_all_is_well() -> None:
    assert advice(Net()) == []


def test_nothing_is_said_of_a_few_steps() -> None:
    assert advice(Net(step=0.1), wait=0.1, limit_train_batches=10) == []


def test_waiting_for_data_names_the_share_the_wait_and_the_workers() -> None:
    (said,) = advice(Net(step=0.001), wait=WAIT)
    assert "of the time is waiting for data" in said
    assert "ms a step, with num_workers=0" in said
    share = int(said.split("%")[0])
    assert 50 <= share <= 100


@pytest.mark.parametrize("workers", [0, 2])
def test_who_waits_for_data_in_memory_is_not_told_of_workers_that_are_not_started(workers: int) -> None:
    class First(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step <= 1:  # the first step warms up and is not in the table
                self.until = time.monotonic() + 1
            self.trainer.should_stop = time.monotonic() > self.until
            return self.line(batch[0][:, :3]).square().mean()

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, enable_checkpointing=False,
        enable_progress_bar=False, max_epochs=-1,
    )  # fmt: skip
    trainer.fit(First(), DataLoader(TensorDataset(torch.ones(4096, 4096)), 2048, shuffle=True, num_workers=workers))
    (said,) = [str(each) for each in trainer.report_timing().advice]
    assert "of the time is waiting for data" in said
    assert "fewer bytes" in said
    assert "num_workers" not in said


def test_a_callback_that_takes_long_is_named_with_the_hook_it_does_it_in() -> None:
    (said,) = advice(Net(), callbacks=[Busy()])
    assert said.startswith("Busy takes ")
    assert "100% of it in on_train_batch_end" in said


def test_a_checkpoint_that_takes_long_should_be_written_less_often(tmp_path: Any) -> None:
    class Heavy(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            time.sleep(0.2)

    (said,) = advice(Heavy(), callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=10)], enable_checkpointing=True)
    assert said.startswith("ModelCheckpoint takes ")
    assert "every_n_epochs" in said


def test_validation_over_half_the_time_is_told() -> None:
    (said,) = advice(Net(validation=2 * WAIT), validation=True)
    assert said.startswith("validation takes ")
    assert "limit_val_batches" in said


def test_the_worst_comes_first() -> None:
    first, second = advice(Net(), wait=2 * WAIT, callbacks=[Busy()])
    assert "waiting for data" in first
    assert second.startswith("Busy")


def test_recompiles_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "recompiles", 7, raising=False)
    (said,) = advice(Net())
    assert "compiled again 7 times" in said


def test_the_end_of_a_run_shows_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    advice(Net(step=0.001), wait=2 * WAIT, enable_progress_bar=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("advice: ")]
