from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit import Callback, Trainer
from trainkit.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from trainkit.errors import CheckpointError

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class Fail(Callback):
    """Raise when a batch begins, or somewhere else."""

    def __init__(self, step: int | None = None, hook: str = "", error: type[BaseException] = RuntimeError) -> None:
        self.step, self.error = step, error
        if hook:
            setattr(self, hook, self.fail)

    def fail(self, *_: Any) -> None:
        raise self.error("on purpose")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.fail()


class Look(Callback):
    """See from which update on a fit trains."""

    def __init__(self) -> None:
        self.begun: list[int] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.begun.append(trainer.global_step)


@pytest.fixture
def fit(TinyModule: Any, TinyData: Any) -> Any:
    def run(*callbacks: Callback, ckpt_path: str | None = None, **settings: Any) -> Any:
        trainer = Trainer(
            callbacks=[OnExceptionCheckpoint("here"), *callbacks], **{**QUIET, "max_epochs": 3, **settings}
        )
        module = TinyModule()
        trainer.fit(module, datamodule=TinyData(shuffle=True), ckpt_path=ckpt_path)
        return module, trainer

    return run


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_what_there_is_is_saved_when_training_is_cut_short(fit: Any, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fit(Fail(11, error=error))
    checkpoint = torch.load("here/on_exception.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 11)
    assert checkpoint["optimizer_states"]


def test_the_next_fit_goes_on_from_there_and_takes_the_file_away(fit: Any) -> None:
    torch.manual_seed(0)
    whole, _ = fit()
    torch.manual_seed(0)
    for step in (5, 11):
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(Fail(step))
        torch.manual_seed(1)
    module, trainer = fit()
    assert trainer.global_step == 24
    assert torch.equal(module.line.weight, whole.line.weight)
    assert not list(Path("here").iterdir())
    assert fit()[1].resume_path is None


def test_a_file_that_is_named_goes_before_it(fit: Any) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fail(11))
    Path("here/on_exception.ckpt").rename("other.ckpt")
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fail(2))
    look = Look()
    fit(look, ckpt_path="other.ckpt")
    assert look.begun == [11]


@pytest.mark.parametrize("newer", ["rescued", "regular"])
def test_the_newest_of_it_and_of_the_regular_checkpoints_is_taken(fit: Any, newer: str) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(ModelCheckpoint("regular", every_n_train_steps=10, save_top_k=-1), Fail(12))
    if newer == "regular":  # killed later on, without a chance to save
        Path("here/on_exception.ckpt").rename("12.ckpt")
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(Fail(3))
    look = Look()
    fit(ModelCheckpoint("regular", every_n_train_steps=10, save_top_k=-1), look)
    assert look.begun == [12 if newer == "rescued" else 10]


def test_what_fails_before_training_leaves_an_older_file_alone(fit: Any) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fail(11))
    for hook in ("setup", "on_fit_start"):
        with pytest.raises(RuntimeError, match="on purpose"):
            fit(Fail(hook=hook))
    assert torch.load("here/on_exception.ckpt", weights_only=True)["global_step"] == 11


def test_nothing_is_saved_where_nothing_is_trained(fit: Any, TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(callbacks=[OnExceptionCheckpoint("here"), Fail(hook="on_test_start")], **QUIET)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.test(TinyModule(), datamodule=TinyData())
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fail(0), fast_dev_run=True)
    assert not Path("here").exists()


def test_a_fit_without_an_error_writes_nothing(fit: Any) -> None:
    fit()
    assert not Path("here").exists()


def test_when_it_can_not_be_saved_the_first_error_is_the_one_that_is_raised(fit: Any) -> None:
    Path("here").write_text("a file is in the way")
    with pytest.raises(RuntimeError, match="on purpose") as raised:
        fit(Fail(3))
    assert "OnExceptionCheckpoint: nothing was saved" in raised.value.__notes__[0]


def test_a_damaged_file_is_an_error_and_stays(fit: Any) -> None:
    Path("here").mkdir()
    Path("here/on_exception.ckpt").write_text("no checkpoint")
    with pytest.raises(CheckpointError):
        fit()
    assert Path("here/on_exception.ckpt").read_text() == "no checkpoint"


def test_the_files_name_can_be_chosen_but_not_empty() -> None:
    assert OnExceptionCheckpoint(Path("there"), "rescue").ckpt_path == "there/rescue.ckpt"
    assert OnExceptionCheckpoint("there").ckpt_path == "there/on_exception.ckpt"
    with pytest.raises(ValueError, match="filename"):
        OnExceptionCheckpoint("there", "")
