"""EarlyStopping in real runs: when it ends training, and what it says when it can't."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import EarlyStopping, ModelCheckpoint
from trainkit.callbacks.early_stopping import EarlyStoppingReason
from trainkit.errors import MisconfigurationException


class Scripted(Module):
    """Log the given values, one for each validation and one for each epoch of training."""

    def __init__(self, values: Sequence[float] = (), train_values: Sequence[float] = ()) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)
        self.values, self.train_values = list(values), train_values
        self.validations = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.train_values:
            self.log("train", self.train_values[self.current_epoch], on_step=False, on_epoch=True)
        return self.line(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            if self.values:
                self.log("val", self.values[min(self.validations, len(self.values) - 1)])
            self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(batches: int = 4) -> DataLoader[Tensor]:
    return DataLoader(torch.ones(batches, 2))  # type: ignore[arg-type]


def fit(module: Module, *callbacks: Callback, ckpt_path: Any = None, **settings: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    trainer = Trainer(callbacks=list(callbacks), **{**quiet, "max_epochs": 20, "num_sanity_val_steps": 0, **settings})
    trainer.fit(module, data(), data(1), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("values", "arguments", "epochs", "reason", "wait", "best"),
    [
        ([3, 2, 1, 1, 1, 1], {}, 6, "PATIENCE_EXHAUSTED", 3, 1),
        ([3, 2, 2, 1, 5, 6, 7], {"patience": 2}, 6, "PATIENCE_EXHAUSTED", 2, 1),
        ([3, 3], {"patience": 0}, 2, "PATIENCE_EXHAUSTED", 1, 3),
        ([1, 2, 3, 2, 3], {"mode": "max", "patience": 2}, 5, "PATIENCE_EXHAUSTED", 2, 3),
        ([5, 4.9, 4.8, 4.7], {"min_delta": 0.5}, 4, "PATIENCE_EXHAUSTED", 3, 5),
        ([5, 4, 3], {"min_delta": 0.5, "max_epochs": 3}, 3, "NOT_STOPPED", 0, 3),
        ([5, 5.4, 6.2, 6], {"min_delta": -0.5, "patience": 2}, 4, "PATIENCE_EXHAUSTED", 2, 5.4),
        ([5, 0.5], {"stopping_threshold": 1.0}, 2, "STOPPING_THRESHOLD", 0, 5),
        ([0.1, 0.99], {"mode": "max", "stopping_threshold": 0.98}, 2, "STOPPING_THRESHOLD", 0, 0.1),
        ([5, 101], {"divergence_threshold": 100.0}, 2, "DIVERGENCE_THRESHOLD", 0, 5),
        ([0.5, 0.05], {"mode": "max", "divergence_threshold": 0.1}, 2, "DIVERGENCE_THRESHOLD", 0, 0.5),
        ([2, math.nan], {}, 2, "NON_FINITE_METRIC", 0, 2),
        ([2, math.inf], {"mode": "max"}, 2, "NON_FINITE_METRIC", 0, 2),
        ([2, math.nan, 1, 3, 3, 3], {"check_finite": False}, 6, "PATIENCE_EXHAUSTED", 3, 1),
    ],
)
def test_training_ends_when_it_should(
    values: list[float], arguments: dict[str, Any], epochs: int, reason: str, wait: int, best: float
) -> None:
    settings = {"max_epochs": arguments.pop("max_epochs")} if "max_epochs" in arguments else {}
    stopping = EarlyStopping("val", **arguments)
    trainer = fit(Scripted(values), stopping, **settings)
    assert trainer.current_epoch == epochs
    assert stopping.stopping_reason is EarlyStoppingReason[reason]
    assert stopping.stopped_epoch == (epochs - 1 if reason != "NOT_STOPPED" else 0)
    assert (stopping.stopping_reason_message is None) == (reason == "NOT_STOPPED")
    assert stopping.wait_count == wait
    assert stopping.best_score == torch.tensor(best)


@given(
    values=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    patience=st.integers(0, 4),
    mode=st.sampled_from(["min", "max"]),
)
def test_it_counts_as_a_loop_by_hand_does(values: list[int], patience: int, mode: Any) -> None:
    best, wait, epochs = None, 0, 0
    for value in values:
        epochs += 1
        if best is None or (value < best if mode == "min" else value > best):
            best, wait = value, 0
        else:
            wait += 1
            if wait >= patience:
                break
    stopping = EarlyStopping("val", patience=patience, mode=mode)
    trainer = fit(Scripted(values), stopping, max_epochs=len(values))
    assert (trainer.current_epoch, stopping.wait_count, float(stopping.best_score)) == (epochs, wait, best)


@pytest.mark.parametrize(
    ("settings", "arguments", "looks"),
    [
        ({}, {}, 4),
        ({"val_check_interval": 0.5}, {}, 8),
        ({"check_val_every_n_epoch": 2}, {}, 2),
        ({"val_check_interval": 0.5}, {"check_on_train_epoch_end": True}, 4),
        ({"check_val_every_n_epoch": 2}, {"check_on_train_epoch_end": True}, 2),
    ],
)
def test_it_looks_once_at_each_new_value(settings: dict[str, Any], arguments: dict[str, Any], looks: int) -> None:
    stopping = EarlyStopping("val", patience=50, **arguments)
    fit(Scripted([1.0]), stopping, max_epochs=4, **settings)
    assert stopping.wait_count == looks - 1


def test_a_metric_of_training_is_looked_at_after_each_epoch_without_validation_too() -> None:
    stopping = EarlyStopping("train", patience=2)
    trainer = fit(Scripted(train_values=[3.0, 2.0, 2.0, 2.0, 1.0]), stopping, limit_val_batches=0)
    assert trainer.current_epoch == 4


def test_training_goes_on_until_the_least_number_of_epochs() -> None:
    trainer = fit(Scripted([1.0]), EarlyStopping("val", patience=1), min_epochs=6)
    assert trainer.current_epoch == 6


def test_an_epoch_that_a_limit_cuts_short_is_not_looked_at() -> None:
    stopping = EarlyStopping("train")
    fit(Scripted(train_values=[1.0, 2.0, 3.0]), stopping, max_steps=6, limit_val_batches=0)
    assert stopping.wait_count == 0


def test_fast_dev_run_and_the_sanity_check_are_not_looked_at() -> None:
    stopping = EarlyStopping("missing")
    fit(Scripted([1.0]), stopping, fast_dev_run=2)
    stopping = EarlyStopping("val")
    fit(Scripted([1.0]), stopping, max_epochs=1, num_sanity_val_steps=1)
    assert stopping.wait_count == 0


# ---- mistakes
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": ""}, r"EarlyStopping\(monitor=\.\.\.\) must be a metric's name"),
        ({"monitor": "val", "mode": "auto"}, r'EarlyStopping\(mode=\.\.\.\) must be "min"'),
        ({"monitor": "val", "patience": -1}, r"EarlyStopping\(patience=\.\.\.\) must be a whole number, 0 or more"),
        ({"monitor": "val", "patience": 2.5}, "must be a whole number"),
        ({"monitor": "val", "min_delta": math.nan}, "must be a finite number"),
    ],
)
def test_arguments_that_can_not_work_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        EarlyStopping(**arguments)


def test_a_missing_metric_is_an_error_that_says_what_there_is() -> None:
    message = r"EarlyStopping\(monitor='vall'\): there is no such metric .*Did you mean 'val'\? There is: val\."
    with pytest.raises(MisconfigurationException, match=message) as caught:
        fit(Scripted([1.0]), EarlyStopping("vall"), max_epochs=3)
    assert isinstance(caught.value, RuntimeError)


def test_a_missing_metric_is_a_warning_if_one_is_not_strict() -> None:
    with pytest.warns(RuntimeWarning, match="there is no such metric") as caught:
        trainer = fit(Scripted([1.0]), EarlyStopping("vall", strict=False), max_epochs=3)
    assert len(caught) == 1
    assert trainer.current_epoch == 3


def test_it_can_say_what_it_sees(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Scripted([2.0, 1.0, 1.0]), EarlyStopping("val", patience=1, verbose=True))
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "EarlyStopping: val = 2 is the best so far.",
        "EarlyStopping: val = 1 is the best so far, before 2.",
        "EarlyStopping: val has not got better 1 times in a row. The best was 1.",
    ]


# ---- resuming
class Terminate(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [3, 4, 9, 12, 14])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(step: int) -> None:
    values = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    whole = EarlyStopping("val")
    assert fit(Scripted(values), whole).current_epoch == 5
    with pytest.raises(SystemExit):
        fit(Scripted(values), Terminate(step), EarlyStopping("val"), ModelCheckpoint())
    resumed = EarlyStopping("val")
    left = values[(step - 1) // 4 :]  # at an epoch's end its validation is still due
    trainer = fit(Scripted(left), resumed, ModelCheckpoint(), ckpt_path="last")
    assert trainer.current_epoch == 5
    assert {**resumed.state_dict(), "best_score": float(resumed.best_score)} == {
        **whole.state_dict(),
        "best_score": float(whole.best_score),
    }


def test_a_run_that_was_stopped_stops_again_at_once_unless_it_is_given_more_patience() -> None:
    fit(Scripted([1.0]), EarlyStopping("val", patience=2), ModelCheckpoint(save_last=True))
    with pytest.warns(UserWarning, match="EarlyStopping had ended this run already: val has not got better 2 times"):
        trainer = fit(Scripted([1.0]), EarlyStopping("val", patience=2), ModelCheckpoint(), ckpt_path="last")
    assert trainer.current_epoch == 3
    trainer = fit(Scripted([1.0]), EarlyStopping("val", patience=4), ModelCheckpoint(), ckpt_path="last")
    assert trainer.current_epoch == 5


def test_a_second_run_with_the_same_object_counts_from_the_beginning() -> None:
    stopping = EarlyStopping("val", patience=2)
    for _ in range(2):
        assert fit(Scripted([1.0]), stopping).current_epoch == 3


def test_two_of_them_keep_their_states_apart() -> None:
    assert EarlyStopping("a").state_key == "EarlyStopping{'monitor': 'a', 'mode': 'min'}"
    assert EarlyStopping("a").state_key != EarlyStopping("a", mode="max").state_key


class Count(Callback):
    """Put a value among the callback metrics that nobody logs."""

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        trainer.callback_metrics["count"] = torch.tensor(float(trainer.current_epoch))


def test_what_a_callback_puts_among_the_metrics_is_watched_and_is_still_news_after_a_resume() -> None:
    def trainer(epochs: int) -> Trainer:
        watching = [Count(), EarlyStopping("count", patience=3, check_on_train_epoch_end=True), ModelCheckpoint()]
        quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(callbacks=watching, max_epochs=epochs, **quiet)

    whole, first, second = trainer(9), trainer(2), trainer(9)
    data: Any = DataLoader(torch.ones(2, 2))  # type: ignore[arg-type]
    whole.fit(Scripted(), data)
    assert whole.current_epoch == 4
    first.fit(Scripted(), data)
    second.fit(Scripted(), data, ckpt_path=first.checkpoint_callback.best_model_path)
    assert second.current_epoch == 4
