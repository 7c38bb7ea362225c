from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from trainkit import Module, Trainer
from trainkit.accelerators import CPUAccelerator
from trainkit.callbacks import DeviceStatsMonitor
from trainkit.errors import MisconfigurationException
from trainkit.loggers import Logger


class Rows(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def at(self, hook: str) -> list[int | None]:
        """Give the x values of a hook's rows."""
        return [step for step, row in self.rows if f"DeviceStatsMonitor.{hook}/used" in row]


class Host(CPUAccelerator):
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {"used": 0.5}


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(torch.ones(3 * batches, 2), batch_size=3)  # type: ignore[arg-type]


def trainer_with(every: int = 1, cpu_stats: bool | None = None, **settings: Any) -> tuple[Trainer, Rows]:
    logger = Rows()
    options: dict[str, Any] = {"max_epochs": 1, "logger": logger, "accelerator": Host()} | settings
    return Trainer(
        log_every_n_steps=every, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=DeviceStatsMonitor(cpu_stats), **options,
    ), logger  # fmt: skip


def test_a_name_is_made_of_class_hook_and_statistic() -> None:
    trainer, logger = trainer_with(max_steps=1)
    trainer.fit(Net(), loader(2))
    assert logger.rows == [
        (0, {"DeviceStatsMonitor.on_train_batch_start/used": 0.5}),
        (0, {"DeviceStatsMonitor.on_train_batch_end/used": 0.5}),
    ]


@pytest.mark.parametrize(
    ("every", "accumulate", "train"), [(1, 1, [0, 1, 2, 3]), (2, 1, [1, 3]), (2, 2, [1, 1]), (0, 1, [])]
)
def test_both_ends_of_every_nth_update_have_its_x_value(every: int, accumulate: int, train: list[int]) -> None:
    trainer, logger = trainer_with(every, accumulate_grad_batches=accumulate)
    trainer.fit(Net(), loader(4))
    assert logger.at("on_train_batch_start") == logger.at("on_train_batch_end") == train


def test_evaluations_have_the_x_value_of_the_training_around_them() -> None:
    trainer, logger = trainer_with(2, num_sanity_val_steps=2)
    trainer.fit(Net(), loader(4), loader(3))
    trainer.test(Net(), loader(4), verbose=False)
    assert logger.at("on_validation_batch_start") == logger.at("on_validation_batch_end") == [0, 3]
    assert logger.at("on_test_batch_start") == logger.at("on_test_batch_end") == [4, 4]


def test_a_stop_logs_the_last_batch() -> None:
    class Stopping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.should_stop = batch_idx == 1
            return super().training_step(batch, batch_idx)

    trainer, logger = trainer_with(50)
    with pytest.warns(UserWarning, match="log_every_n_steps"):
        trainer.fit(Stopping(), loader(4))
    assert (logger.at("on_train_batch_start"), logger.at("on_train_batch_end")) == ([], [1])


def test_the_hosts_percentages_come_from_psutil() -> None:
    pytest.importorskip("psutil")
    trainer, logger = trainer_with(max_steps=1, accelerator="cpu")
    trainer.fit(Net(), loader(1))
    prefix = "DeviceStatsMonitor.on_train_batch_start/"
    row = logger.rows[0][1]
    assert list(row) == [f"{prefix}cpu_percent", f"{prefix}cpu_vm_percent", f"{prefix}cpu_swap_percent"]
    assert all(0 <= percent <= 100 for percent in row.values())
    assert row[f"{prefix}cpu_vm_percent"] > 0


@pytest.mark.parametrize("cpu_stats", [None, True])
def test_without_psutil_a_run_says_so_before_it_begins(monkeypatch: pytest.MonkeyPatch, cpu_stats: bool | None) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    trainer, logger = trainer_with(cpu_stats=cpu_stats, accelerator="cpu")
    with pytest.raises(ModuleNotFoundError, match="psutil"):
        trainer.fit(Net(), loader(1))
    assert logger.rows == []


def test_false_leaves_the_host_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    trainer, logger = trainer_with(cpu_stats=False, accelerator="cpu")
    trainer.fit(Net(), loader(1))
    assert logger.rows == []


def test_without_a_logger_fit_is_refused_and_a_fast_dev_run_is_not() -> None:
    trainer, _ = trainer_with(logger=False)
    with pytest.raises(MisconfigurationException, match="needs a logger"):
        trainer.fit(Net(), loader(1))
    trainer, logger = trainer_with(fast_dev_run=True)
    trainer.fit(Net(), loader(1))
    assert logger.rows == []
