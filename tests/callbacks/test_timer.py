from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import Timer
from trainkit.errors import MisconfigurationException


class Tiny(Module):
    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.pause = pause

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.pause)
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(batches: int = 4) -> Any:
    return torch.utils.data.DataLoader(torch.ones(batches, 2))


@pytest.fixture
def trainer() -> Callable[..., Trainer]:
    def make(*callbacks: Callback, **settings: Any) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(callbacks=list(callbacks), **{**quiet, "enable_checkpointing": False, **settings})

    return make


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("00:00:01:30", 90.0), (timedelta(minutes=2), 120.0), ({"hours": 1}, 3600.0), (None, None)],
)
def test_a_duration_is_given_as_text_timedelta_dict_or_not_at_all(duration: Any, seconds: float | None) -> None:
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize("duration", ["1:30", 90, {"hour": 1}])
def test_a_duration_that_can_not_be_read_is_an_error_at_construction(duration: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="duration"):
        Timer(duration)


def test_an_unknown_interval_is_an_error_at_construction() -> None:
    with pytest.raises(MisconfigurationException, match="interval"):
        Timer(interval="batch")


def test_an_unknown_stage_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="train, sanity_check, validate, test, predict"):
        Timer().time_elapsed("training")


def test_training_stops_inside_an_epoch_when_the_time_is_over(trainer: Callable[..., Trainer]) -> None:
    run = trainer(Timer({"seconds": 0.1}, verbose=False), max_epochs=1)
    run.fit(Tiny(pause=0.02), loader(1000))
    assert 0 < run.global_step < 50


def test_with_interval_epoch_the_epoch_is_finished_first(trainer: Callable[..., Trainer]) -> None:
    run = trainer(Timer({"seconds": 0.01}, interval="epoch", verbose=False), max_epochs=100)
    run.fit(Tiny(pause=0.01), loader(3))
    assert (run.current_epoch, run.global_step) == (1, 3)


def test_without_a_duration_it_only_measures(trainer: Callable[..., Trainer]) -> None:
    timer = Timer()
    run = trainer(timer, max_epochs=2)
    run.fit(Tiny(), loader(), loader())
    run.test(run.module, loader(), verbose=False)
    assert run.global_step == 8
    for stage in ("train", "validate", "test"):
        began, ended = timer.start_time(stage), timer.end_time(stage)
        assert began is not None
        assert ended is not None
        assert timer.time_elapsed(stage) == ended - began > 0


def test_time_elapsed_grows_while_a_stage_runs_and_stands_still_afterwards(trainer: Callable[..., Trainer]) -> None:
    timer = Timer()
    seen: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(timer.time_elapsed())
            assert timer.end_time() is None

    trainer(timer, Watch(), max_epochs=1).fit(Tiny(), loader())
    assert seen == sorted(set(seen))
    assert timer.time_elapsed() == timer.time_elapsed() > seen[-1]


def test_before_a_run_nothing_has_elapsed() -> None:
    timer = Timer("00:00:00:10")
    assert (timer.start_time(), timer.end_time(), timer.time_elapsed(), timer.time_remaining()) == (None, None, 0, 10)


def test_verbose_says_once_that_the_time_is_over(
    trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(Timer("00:00:00:00"), max_epochs=5).fit(Tiny(), loader())
    assert capsys.readouterr().out == "Timer: 0:00:00 of training are over, stopping.\n"


def test_a_resumed_run_goes_on_counting_where_the_saved_one_was(trainer: Callable[..., Trainer]) -> None:
    first = Timer("00:01:00:00")
    run = trainer(first, max_epochs=1)
    run.fit(Tiny(pause=0.01), loader())
    run.save_checkpoint("a.ckpt")
    second = Timer("00:01:00:00")
    trainer(second, max_epochs=2).fit(Tiny(), loader(), ckpt_path="a.ckpt")
    ended, began = second.end_time(), second.start_time()
    assert ended is not None
    assert began is not None
    assert math.isclose(second.time_elapsed(), first.time_elapsed() + ended - began, abs_tol=0.01)


def test_a_run_resumed_after_its_time_is_over_does_not_train(trainer: Callable[..., Trainer]) -> None:
    run = trainer(Timer({"seconds": 0.03}, verbose=False), max_epochs=50)
    run.fit(Tiny(pause=0.02), loader())
    steps = run.global_step
    run.save_checkpoint("a.ckpt")
    again = trainer(Timer({"seconds": 0.03}, verbose=False), max_epochs=50)
    again.fit(Tiny(), loader(), ckpt_path="a.ckpt")
    assert again.global_step == steps


def test_a_second_fit_of_the_same_timer_counts_from_zero(trainer: Callable[..., Trainer]) -> None:
    timer = Timer(verbose=False)
    run = trainer(timer, max_epochs=1)
    run.fit(Tiny(pause=0.03), loader())
    first = timer.time_elapsed()
    run.fit(Tiny(), loader())
    assert first > 0.12 > timer.time_elapsed()


def test_max_time_of_the_trainer_is_a_timer(trainer: Callable[..., Trainer]) -> None:
    run = trainer(max_time={"seconds": 0.05}, max_epochs=-1)
    run.fit(Tiny(pause=0.01), loader())
    assert [type(callback) for callback in run.callbacks] == [Timer]
    assert run.global_step > 0
