from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from trainkit import Module, Trainer
from trainkit.callbacks import BaseFinetuning, EarlyStopping, LearningRateMonitor
from trainkit.errors import MisconfigurationException
from trainkit.loggers import CSVLogger

Configure = Callable[["Tiny"], Any]


class Tiny(Module):
    def __init__(self, configure: Configure) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        self.configure = configure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.body(batch)).mean()

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Several(Tiny):
    def __init__(self, configure: Configure) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.head(self.body(batch)).mean())
        for optimizer in self.optimizers():
            optimizer.step()


def fit(
    monitor: LearningRateMonitor, configure: Configure, module: type[Tiny] = Tiny, before: Any = (), **settings: Any
) -> Trainer:
    trainer = Trainer(
        callbacks=[*before, monitor],
        logger=CSVLogger("logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 2, "log_every_n_steps": 1, **settings},
    )
    trainer.fit(module(configure), torch.utils.data.DataLoader(torch.ones(4, 2)))
    return trainer


def logged(trainer: Trainer) -> list[tuple[int, dict[str, float]]]:
    with Path(trainer.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = [
        (int(row["step"]), {name: float(row[name]) for name in row if name.startswith("lr") and row[name]})
        for row in rows
    ]
    return [(step, rates) for step, rates in values if rates]


def one_adam(module: Tiny) -> Any:
    return Adam(module.parameters(), 0.1)


def adam_with(interval: str, **extra: Any) -> Configure:
    def configure(module: Tiny) -> Any:
        optimizer = Adam(module.parameters(), 0.1)
        schedule = {"scheduler": ExponentialLR(optimizer, 0.5), "interval": interval, **extra}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    return configure


def test_a_rate_is_logged_at_the_update_it_makes() -> None:
    trainer = fit(LearningRateMonitor(), adam_with("step"), max_epochs=1)
    assert logged(trainer) == [(step, {"lr-Adam": 0.1 * 0.5**step}) for step in range(4)]


def test_it_keeps_to_log_every_n_steps_like_every_step_metric() -> None:
    trainer = fit(LearningRateMonitor("step"), adam_with("step"), log_every_n_steps=3)
    assert [step for step, _ in logged(trainer)] == [2, 5]


def test_a_schedule_by_epoch_is_logged_once_an_epoch() -> None:
    monitor = LearningRateMonitor()
    assert logged(fit(monitor, adam_with("epoch"))) == [(0, {"lr-Adam": 0.1}), (4, {"lr-Adam": 0.05})]
    assert monitor.lrs == {"lr-Adam": [0.1, 0.05]}


def test_logging_interval_overrides_the_schedules_own() -> None:
    assert len(logged(fit(LearningRateMonitor("step"), adam_with("epoch")))) == 8
    assert len(logged(fit(LearningRateMonitor("epoch"), adam_with("step")))) == 2


def test_an_optimizer_without_a_scheduler_is_logged_too() -> None:
    monitor = LearningRateMonitor("step")
    fit(monitor, one_adam)
    assert monitor.lrs == {"lr-Adam": [0.1] * 8}


def test_log_every_n_steps_0_logs_no_steps() -> None:
    monitor = LearningRateMonitor("step")
    fit(monitor, one_adam, log_every_n_steps=0)
    assert monitor.lrs == {"lr-Adam": []}


def test_an_accumulation_window_is_logged_once() -> None:
    monitor = LearningRateMonitor("step")
    trainer = fit(monitor, one_adam, accumulate_grad_batches=2, max_epochs=1)
    assert [step for step, _ in logged(trainer)] == [0, 1]
    assert len(monitor.lrs["lr-Adam"]) == 2


def test_optimizers_of_one_class_are_numbered() -> None:
    def configure(module: Tiny) -> Any:
        return [Adam([module.body.weight], 0.1), SGD(module.head.parameters(), 0.2), Adam([module.body.bias], 0.3)]

    monitor = LearningRateMonitor("epoch")
    fit(monitor, configure, Several, max_epochs=1)
    assert monitor.lrs == {"lr-Adam": [0.1], "lr-SGD": [0.2], "lr-Adam-1": [0.3]}


def test_parameter_groups_are_numbered_from_1_or_go_by_their_names() -> None:
    def configure(module: Tiny) -> Any:
        groups = [{"params": module.body.parameters(), "name": "body"}, {"params": module.head.parameters(), "lr": 0.2}]
        optimizer = Adam(groups, 0.1)
        return [optimizer], [StepLR(optimizer, 1)]

    monitor = LearningRateMonitor("epoch")
    fit(monitor, configure, max_epochs=1)
    assert monitor.lrs == {"lr-Adam/body": [0.1], "lr-Adam/pg2": [0.2]}


def test_a_group_that_is_added_in_training_is_followed_from_then_on() -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.body)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.body, optimizer)

    monitor = LearningRateMonitor("epoch", log_momentum=True)
    trainer = fit(monitor, lambda module: SGD(module.head.parameters(), 0.1), before=[Unfreeze()], max_epochs=3)
    assert monitor.lrs == {"lr-SGD/pg1": [0.1, 0.1, 0.1], "lr-SGD/pg2": [0.01, 0.01]}
    assert {"lr-SGD/pg1", "lr-SGD/pg2-momentum"} <= trainer.callback_metrics.keys()


def test_a_group_whose_name_is_anothers_number_is_an_error() -> None:
    def configure(module: Tiny) -> Any:
        return Adam([{"params": module.body.parameters(), "name": "pg2"}, {"params": module.head.parameters()}], 0.1)

    with pytest.raises(MisconfigurationException, match="'pg2'"):
        fit(LearningRateMonitor(), configure)


def test_an_optimizer_without_momentum_has_none() -> None:
    monitor = LearningRateMonitor("epoch", log_momentum=True)
    with pytest.warns(RuntimeWarning, match="Adagrad has no momentum; 0 is logged"):
        fit(monitor, lambda module: torch.optim.Adagrad(module.parameters(), 0.1))
    assert monitor.last_momentum_values == {"lr-Adagrad-momentum": 0.0}


def test_what_is_not_asked_for_stays_none() -> None:
    monitor = LearningRateMonitor()
    fit(monitor, one_adam)
    assert monitor.last_momentum_values == {"lr-Adam-momentum": None}
    assert monitor.last_weight_decay_values == {"lr-Adam-weight_decay": None}


def test_the_name_of_a_scheduler_configuration_is_used() -> None:
    monitor = LearningRateMonitor()
    fit(monitor, adam_with("epoch", name="warmup"), max_epochs=1)
    assert monitor.lrs == {"warmup": [0.1]}


def test_groups_with_one_name_are_an_error() -> None:
    def configure(module: Tiny) -> Any:
        return Adam([{"params": part.parameters(), "name": "a"} for part in (module.body, module.head)], 0.1)

    with pytest.raises(MisconfigurationException, match=r"parameter groups of Adam apart.*'a'"):
        fit(LearningRateMonitor(), configure)


def test_momentum_and_weight_decay_are_logged_when_asked_for() -> None:
    monitor = LearningRateMonitor("epoch", log_momentum=True, log_weight_decay=True)
    fit(monitor, lambda module: Adam(module.parameters(), 0.1, betas=(0.8, 0.9), weight_decay=0.01))
    assert monitor.last_momentum_values == {"lr-Adam-momentum": 0.8}
    assert monitor.last_weight_decay_values == {"lr-Adam-weight_decay": 0.01}
    trainer = fit(monitor, lambda module: SGD(module.parameters(), 0.1, momentum=0.7))
    assert monitor.last_momentum_values == {"lr-SGD-momentum": 0.7}
    assert logged(trainer)[0] == (0, {"lr-SGD": 0.1, "lr-SGD-momentum": 0.7, "lr-SGD-weight_decay": 0.0})


def test_the_rates_are_callback_metrics() -> None:
    trainer = fit(LearningRateMonitor(), adam_with("epoch"))
    assert float(trainer.callback_metrics["lr-Adam"]) == pytest.approx(0.05)


def test_a_trainer_without_a_logger_is_an_error_before_the_first_step() -> None:
    trainer = Trainer(callbacks=[LearningRateMonitor()], logger=False, enable_progress_bar=False, max_epochs=1)
    with pytest.raises(MisconfigurationException, match="needs a logger"):
        trainer.fit(Tiny(one_adam), torch.utils.data.DataLoader(torch.ones(4, 2)))
    assert trainer.global_step == 0


def test_an_unknown_logging_interval_is_an_error_at_construction() -> None:
    with pytest.raises(MisconfigurationException, match="logging_interval"):
        LearningRateMonitor("batch")


def test_fast_dev_run_which_has_no_logger_is_no_error(TinyModule: Any, TinyData: Any) -> None:
    monitor = LearningRateMonitor()
    trainer = Trainer(
        accelerator="cpu", fast_dev_run=True, callbacks=monitor, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert trainer.global_step == 1


def test_early_stopping_can_watch_a_rate() -> None:
    monitor = LearningRateMonitor("epoch")
    stopping = EarlyStopping("lr-Adam", stopping_threshold=0.02, check_on_train_epoch_end=True)
    trainer = fit(monitor, adam_with("epoch"), before=[stopping], max_epochs=9)
    assert trainer.current_epoch == 4
    assert monitor.lrs["lr-Adam"] == [0.1, 0.05, 0.025, 0.0125]
