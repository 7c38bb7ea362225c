"""ModelCheckpoint in real runs: what it saves, when, under which name, and what it keeps."""

from __future__ import annotations

import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import EarlyStopping, ModelCheckpoint
from trainkit.checkpoint import store
from trainkit.checkpoint.io import CheckpointIO
from trainkit.errors import CheckpointError, MisconfigurationException


class Scripted(Module):
    """Train a line on noise, and log the given values, one for each validation."""

    def __init__(self, values: Sequence[float] = (), name: str = "val", **log: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.line = nn.Linear(2, 1)
        self.values, self.name, self.log_options = values, name, log
        self.validations = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.line(batch).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            if self.values:
                self.log(self.name, self.values[self.validations % len(self.values)], **self.log_options)
            self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train_data(batches: int = 4) -> DataLoader[Tensor]:
    return DataLoader(torch.arange(2.0 * batches).reshape(batches, 2) / batches)  # type: ignore[arg-type]


def val_data() -> DataLoader[Tensor]:
    return DataLoader(torch.ones(1, 2))  # type: ignore[arg-type]


def make_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), **{**quiet, "num_sanity_val_steps": 0, **settings})


def fit(module: Module, *callbacks: Callback, batches: int = 4, ckpt_path: Any = None, **settings: Any) -> Trainer:
    trainer = make_trainer(*callbacks, **settings)
    trainer.fit(module, train_data(batches), val_data(), ckpt_path=ckpt_path)
    return trainer


def saved(directory: str | Path = "checkpoints") -> list[str]:
    return sorted(os.listdir(directory))


def steps(directory: str | Path = "checkpoints") -> dict[str, int]:
    return {name: store.step_of(Path(directory, name)) for name in saved(directory)}


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class At(Callback):
    """Do something after the n-th update."""

    def __init__(self, step: int, act: Callable[[Trainer], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.act(trainer)


def terminate(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ---- what is kept
def test_by_default_the_newest_epoch_is_kept(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    fit(Scripted(), checkpoint, max_epochs=3)
    assert steps() == {"epoch=2-step=12.ckpt": 12}
    assert checkpoint.dirpath == str(tmp_path / "checkpoints")
    assert checkpoint.best_model_path == str(tmp_path / "checkpoints" / "epoch=2-step=12.ckpt")
    assert checkpoint.best_model_score is None


def test_a_trainer_without_one_brings_one() -> None:
    fit(Scripted(), max_epochs=1)
    assert saved() == ["epoch=0-step=4.ckpt"]


@pytest.mark.parametrize(
    ("mode", "values", "k", "kept"),
    [
        ("min", [3.0, 1.0, 2.0, 4.0], 1, [1]),
        ("min", [3.0, 1.0, 2.0, 4.0], 2, [1, 2]),
        ("max", [3.0, 1.0, 2.0, 4.0], 2, [0, 3]),
        ("min", [3.0, 1.0, 2.0, 4.0], -1, [0, 1, 2, 3]),
        ("min", [math.nan, 2.0, math.nan, 3.0], 1, [1]),
        ("max", [math.nan, 2.0, math.nan, 3.0], 2, [1, 3]),
        ("max", [1.0, math.inf, 2.0, 1.5], 1, [2]),
        ("min", [1.0, 1.0, 1.0, 1.0], 1, [0]),
    ],
)
def test_the_best_k_are_kept(mode: Any, values: list[float], k: int, kept: list[int]) -> None:
    checkpoint = ModelCheckpoint(monitor="val", mode=mode, save_top_k=k)
    fit(Scripted(values), checkpoint, max_epochs=4)
    assert saved() == [f"epoch={epoch}-step={4 * epoch + 4}.ckpt" for epoch in kept]
    assert [os.path.basename(path) for path in checkpoint.best_k_models] == saved()
    finite = [values[epoch] for epoch in kept if math.isfinite(values[epoch])]
    best = min(finite) if mode == "min" else max(finite)
    assert checkpoint.best_model_score == best
    assert checkpoint.best_k_models[checkpoint.best_model_path] == best
    assert checkpoint.current_score is not None
    if k > 0:
        assert checkpoint.kth_value == checkpoint.best_k_models[checkpoint.kth_best_model_path]


def test_last_is_the_newest_whether_it_is_among_the_best_or_not() -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_last=True)
    fit(Scripted([1.0, 2.0, 3.0]), checkpoint, max_epochs=3)
    assert steps() == {"epoch=0-step=4.ckpt": 4, "last.ckpt": 12}
    assert checkpoint.last_model_path.endswith("/last.ckpt")


def test_last_is_the_same_file_as_the_one_kept_and_costs_no_second_write() -> None:
    fit(Scripted([3.0, 2.0]), ModelCheckpoint(monitor="val", save_last=True), max_epochs=2)
    assert os.path.samefile("checkpoints/last.ckpt", "checkpoints/epoch=1-step=8.ckpt")
    assert not os.path.islink("checkpoints/last.ckpt")


def test_last_can_be_a_symbolic_link_where_its_file_is_kept() -> None:
    fit(Scripted([3.0, 2.0]), ModelCheckpoint(monitor="val", save_last="link"), max_epochs=2)
    assert os.readlink("checkpoints/last.ckpt") == "epoch=1-step=8.ckpt"
    fit(Scripted([3.0, 4.0]), ModelCheckpoint("worse", monitor="val", save_last="link"), max_epochs=2)
    assert not os.path.islink("worse/last.ckpt")
    assert steps("worse") == {"epoch=0-step=4.ckpt": 4, "last.ckpt": 8}


def test_without_any_best_only_last_is_kept() -> None:
    fit(Scripted([1.0]), ModelCheckpoint(monitor="val", save_top_k=0, save_last=True), max_epochs=2)
    assert steps() == {"last.ckpt": 8}
    fit(Scripted(), ModelCheckpoint("none", save_top_k=0), max_epochs=2)
    assert saved("none") == []


def test_the_old_best_is_removed_after_the_new_one_is_there() -> None:
    seen: list[list[str]] = []

    class Look(Callback):
        def on_save_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
            seen.append(saved())

    fit(Scripted([3.0, 2.0]), Look(), ModelCheckpoint(monitor="val"), max_epochs=2)
    assert seen == [[], ["epoch=0-step=4.ckpt"]]
    assert saved() == ["epoch=1-step=8.ckpt"]


def test_a_save_that_fails_leaves_the_old_best_and_what_is_known_about_it(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_last=True, on_save_error="stop")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(trainer: Trainer) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"epoch=1-step=8\.ckpt was not written"):
            fit(Scripted([3.0, 2.0]), At(6, fill_the_disk), checkpoint, max_epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps() == {"epoch=0-step=4.ckpt": 4, "last.ckpt": 4}
    assert checkpoint.best_model_path == str(tmp_path / "checkpoints" / "epoch=0-step=4.ckpt")
    assert checkpoint.best_model_score == 3.0


def test_only_weights_can_be_saved() -> None:
    fit(Scripted(), ModelCheckpoint(save_weights_only=True), max_epochs=1)
    state = store.load("checkpoints/epoch=0-step=4.ckpt")
    assert "state_dict" in state
    assert "optimizer_states" not in state


def test_what_is_kept_can_be_written_as_yaml() -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_top_k=2)
    fit(Scripted([3.0, 2.5]), checkpoint, max_epochs=2)
    checkpoint.to_yaml()
    written = yaml.safe_load(Path("checkpoints/best_k_models.yaml").read_text())
    assert written == {path: float(score) for path, score in checkpoint.best_k_models.items()}


def test_it_can_say_what_it_saves(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Scripted([3.0, 2.5]), ModelCheckpoint(monitor="val", verbose=True), max_epochs=2)
    assert "epoch 1, step 8, val = 2.5 (best 2.5): saved " in capsys.readouterr().out


# ---- when
def test_every_n_steps_counts_updates() -> None:
    fit(Scripted(), ModelCheckpoint(every_n_train_steps=3, save_top_k=-1), max_epochs=2)
    assert steps() == {"epoch=0-step=3.ckpt": 3, "epoch=1-step=6.ckpt": 6}


def test_an_epochs_last_step_is_saved_with_that_epochs_number() -> None:
    fit(Scripted(), ModelCheckpoint(every_n_train_steps=4, save_top_k=-1), max_epochs=2)
    assert steps() == {"epoch=0-step=4.ckpt": 4, "epoch=1-step=8.ckpt": 8}


def test_nothing_is_saved_while_gradients_are_pending() -> None:
    checkpoint = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    fit(Scripted(), checkpoint, batches=8, max_epochs=1, accumulate_grad_batches=3)
    where = [store.load(Path("checkpoints", name))["progress"] for name in saved()]
    assert [(progress["batch"], progress["step"]) for progress in where] == [(3, 1), (6, 2), (0, 3)]


def test_a_decision_inside_a_window_waits_for_its_end_and_is_named_for_what_is_saved() -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_top_k=-1, filename="{epoch}-{step}-{val}")
    fit(Scripted([5.0, 6.0]), checkpoint, batches=8, max_epochs=1, accumulate_grad_batches=3, val_check_interval=4)
    assert steps() == {"epoch=0-step=2-val=5.0.ckpt": 2, "epoch=0-step=3-val=6.0.ckpt": 3}


def test_every_n_epochs() -> None:
    fit(Scripted(), ModelCheckpoint(every_n_epochs=2, save_top_k=-1), max_epochs=5)
    assert steps() == {"epoch=1-step=8.ckpt": 8, "epoch=3-step=16.ckpt": 16}


@pytest.mark.parametrize("automatic", [True, False])
def test_a_time_interval_with_automatic_and_manual_optimization(
    automatic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Either(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not automatic:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(sys.modules[ModelCheckpoint.__module__], "time", clock)
    advance = [At(step, lambda _: setattr(clock, "now", clock.now + 40)) for step in range(1, 9)]
    fit(Either(), *advance, ModelCheckpoint(train_time_interval=timedelta(minutes=1), save_top_k=-1), max_epochs=2)
    assert list(steps().values()) == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({}, [4, 8, 12, 16]),
        ({"val_check_interval": 0.5}, [2, 4, 6, 8, 10, 12, 14, 16]),
        ({"check_val_every_n_epoch": 2}, [8, 16]),
        ({"limit_val_batches": 0}, [4, 8, 12, 16]),
        ({"limit_val_batches": 0, "check_val_every_n_epoch": 2}, [4, 8, 12, 16]),
    ],
)
def test_by_default_it_looks_when_there_is_something_new(settings: dict[str, Any], at: list[int]) -> None:
    fit(Scripted(), ModelCheckpoint(save_top_k=-1), max_epochs=4, **settings)
    assert sorted(steps().values()) == at


def test_a_metric_is_not_used_twice() -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Scripted([1.0, 2.0]), checkpoint, max_epochs=4, check_val_every_n_epoch=2)
    assert {os.path.basename(path): float(score) for path, score in checkpoint.best_k_models.items()} == {
        "epoch=1-step=8.ckpt": 1.0,
        "epoch=3-step=16.ckpt": 2.0,
    }


def test_with_steps_and_a_validation_metric_the_best_are_decided_when_it_is_new_and_last_at_once() -> None:
    seen: dict[int, list[str]] = {}
    look = At(4, lambda trainer: seen.update({4: saved()}))  # step 3 is saved, there was no validation yet
    checkpoint = ModelCheckpoint(monitor="val", every_n_train_steps=3, save_top_k=-1, save_last=True)
    fit(Scripted([1.0, 2.0]), look, checkpoint, batches=5, max_epochs=2)
    assert seen == {4: ["last.ckpt"]}
    assert steps() == {"epoch=0-step=5.ckpt": 5, "epoch=1-step=10.ckpt": 10, "last.ckpt": 10}
    assert [float(score) for score in checkpoint.best_k_models.values()] == [1.0, 2.0]


def test_with_steps_and_a_step_metric_of_training_it_is_decided_at_once() -> None:
    checkpoint = ModelCheckpoint(monitor="train_loss", every_n_train_steps=3, save_top_k=-1)
    fit(Scripted(), checkpoint, max_epochs=2)
    assert steps() == {"epoch=0-step=3.ckpt": 3, "epoch=1-step=6.ckpt": 6}


def test_validation_that_ends_with_the_step_is_used_for_it() -> None:
    checkpoint = ModelCheckpoint(monitor="val", every_n_train_steps=2, save_top_k=-1)
    fit(Scripted([1.0, 2.0, 3.0, 4.0]), checkpoint, max_epochs=2, val_check_interval=0.5)
    assert sorted(steps().values()) == [2, 4, 6, 8]
    assert [float(score) for score in checkpoint.best_k_models.values()] == [1.0, 2.0, 3.0, 4.0]


def test_a_run_that_stops_inside_an_epoch_saves_where_it_stopped() -> None:
    fit(Scripted(), ModelCheckpoint(), max_steps=6)
    assert steps() == {"epoch=1-step=6.ckpt": 6}


def test_fast_dev_run_and_the_sanity_check_save_nothing() -> None:
    fit(Scripted([1.0]), ModelCheckpoint(monitor="val", save_last=True), fast_dev_run=2)
    assert not os.path.exists("checkpoints")

    def nothing_yet(trainer: Trainer) -> None:
        assert saved() == []

    fit(Scripted([1.0]), At(1, nothing_yet), ModelCheckpoint(monitor="val"), max_epochs=1, num_sanity_val_steps=2)


def test_validate_alone_saves_nothing() -> None:
    make_trainer(ModelCheckpoint(save_last=True)).validate(Scripted([1.0]), val_data(), verbose=False)
    assert os.listdir(".") == []


# ---- names
def test_a_slash_in_a_metrics_name_makes_no_directory() -> None:
    checkpoint = ModelCheckpoint(monitor="val/acc", filename="{epoch:02d}-{val/acc:.2f}")
    fit(Scripted([0.97], name="val/acc"), checkpoint, max_epochs=1)
    assert saved() == ["epoch=00-val_acc=0.97.ckpt"]


def test_a_file_of_an_earlier_run_is_not_overwritten_unless_wanted() -> None:
    fit(Scripted(), ModelCheckpoint(filename="model", save_last=True), max_epochs=1)
    fit(Scripted(), ModelCheckpoint(filename="model", save_last=True), max_epochs=2)
    assert steps() == {"model.ckpt": 4, "last.ckpt": 4, "model-v1.ckpt": 8, "last-v1.ckpt": 8}
    fit(Scripted(), ModelCheckpoint(filename="model", enable_version_counter=False), max_epochs=3)
    assert steps()["model.ckpt"] == 12


def test_a_name_without_a_metric_is_used_again_for_the_new_best() -> None:
    checkpoint = ModelCheckpoint(monitor="val", filename="best")
    fit(Scripted([3.0, 2.0, 1.0, 4.0]), checkpoint, max_epochs=4)
    assert steps() == {"best.ckpt": 12}
    fit(
        Scripted([3.0, 2.0, 1.0, 4.0]),
        ModelCheckpoint("two", monitor="val", filename="best", save_top_k=2),
        max_epochs=4,
    )
    assert steps("two") == {"best-v1.ckpt": 8, "best.ckpt": 12}


def test_last_can_have_another_name() -> None:
    class Named(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "{epoch}-newest"

    fit(Scripted(), Named(save_top_k=0, save_last=True), max_epochs=3)
    assert steps() == {"epoch=2-newest.ckpt": 12}


def test_a_metric_that_is_not_there_is_zero_in_a_name_and_a_warning() -> None:
    with pytest.warns(UserWarning, match="the file name asks for 'vall', which is not there .did you mean 'val'"):
        fit(Scripted([1.0]), ModelCheckpoint(filename="{epoch}-{vall:.1f}"), max_epochs=2)
    assert saved() == ["epoch=1-vall=0.0.ckpt"]


def test_names_can_be_worked_out() -> None:
    checkpoint = ModelCheckpoint("there", filename="{epoch}-{val_loss:.2f}")
    name = checkpoint.format_checkpoint_name({"epoch": 1, "val_loss": torch.tensor(0.256)})
    assert name == os.path.abspath("there/epoch=1-val_loss=0.26.ckpt")
    assert checkpoint.format_checkpoint_name({"epoch": 1}, filename="{epoch}", ver=2).endswith("/epoch=1-v2.ckpt")
    bare = ModelCheckpoint(filename="e{epoch}", auto_insert_metric_name=False)
    assert bare.format_checkpoint_name({"epoch": 7}) == "e7.ckpt"


# ---- mistakes
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "best"}, r'mode=\.\.\.\) must be "min"'),
        ({"save_top_k": -2}, r"save_top_k=\.\.\.\) must be a whole number, -1 or more"),
        ({"save_top_k": 2}, "save_top_k=2. needs monitor="),
        ({"save_top_k": True}, "must be a whole number"),
        ({"monitor": 3}, "must be a metric's name"),
        ({"save_last": "copy"}, r"save_last=\.\.\.\) must be True, False or"),
        ({"every_n_train_steps": -1}, r"every_n_train_steps=\.\.\.\) must be a whole number, 0 or more"),
        ({"every_n_epochs": 0.5}, "must be a whole number"),
        (
            {"every_n_epochs": 1, "every_n_train_steps": 5},
            "takes one of .*Received: every_n_train_steps=5 and every_n_epochs=1",
        ),
        ({"train_time_interval": "00:00:01:00", "every_n_train_steps": 5}, "takes one of"),
        ({"train_time_interval": "soon"}, "train_time_interval"),
        ({"filename": "{epoch"}, "can't be used: expected '}'"),
        ({"filename": "../{epoch}"}, "below dirpath"),
        ({"keep_last": -1}, r"keep_last=\.\.\.\) must be a whole number, 0 or more"),
        ({"keep_every_n_steps": 2.0}, r"keep_every_n_steps=\.\.\.\) must be a whole number"),
        ({"on_save_error": "ignore"}, r'on_save_error=\.\.\.\) must be "continue" or "stop"'),
    ],
)
def test_arguments_that_can_not_work_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        ModelCheckpoint(**arguments)


def test_zero_turns_a_rhythm_off() -> None:
    fit(Scripted(), ModelCheckpoint(every_n_epochs=0, every_n_train_steps=3, save_top_k=-1), max_epochs=1)
    assert saved() == ["epoch=0-step=3.ckpt"]


def test_a_directory_that_can_not_be_written_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    Path("file").write_text("in the way")
    module = Scripted()
    module.training_step = lambda *_: pytest.fail("it trained")  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=rf"checkpoints can't be saved: .*{tmp_path}/file is a file"):
        fit(module, ModelCheckpoint("file/checkpoints"), max_epochs=1)


@pytest.mark.parametrize(
    ("monitor", "log", "settings", "message"),
    [
        ("vall", {}, {}, r"after validation\. Did you mean 'val'\? There is: train_loss, val\. Nothing logs it"),
        ("val", {"on_epoch": False, "on_step": True}, {}, "validation_step logs 'val' with on_epoch=False"),
        ("val_epoch", {}, {}, "validation_step logs 'val', but not with on_step=True and on_epoch=True: monitor 'val'"),
        ("val_step", {"on_step": True, "on_epoch": True}, {}, "only the mean over its batches: monitor 'val'"),
    ],
)
def test_a_metric_that_never_comes_is_an_error_that_says_why(
    monitor: str, log: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    checkpoint = ModelCheckpoint(monitor=monitor, save_on_train_epoch_end=False)
    with pytest.raises(MisconfigurationException, match=message):
        fit(Scripted([1.0], **log), checkpoint, max_epochs=3)


def test_a_metric_of_several_loaders_is_explained() -> None:
    class Two(Scripted):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    trainer = make_trainer(ModelCheckpoint(monitor="val"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="several loaders, so it is called 'val/dataloader_idx_0'"):
        trainer.fit(Two([1.0]), train_data(), [val_data(), val_data()])


def test_a_metric_that_only_training_logs_for_the_epoch_is_explained() -> None:
    class Epochs(Scripted):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.line(batch).pow(2).mean()
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    with pytest.raises(
        MisconfigurationException, match="training_step logs 'train_loss' for the epoch, so its value is"
    ):
        fit(Epochs(), ModelCheckpoint(monitor="train_loss"), max_epochs=2, val_check_interval=0.5)
    checkpoint = ModelCheckpoint("good", monitor="train_loss", save_on_train_epoch_end=True)
    fit(Epochs(), checkpoint, max_epochs=2, val_check_interval=0.5)
    assert checkpoint.best_model_score is not None


def test_without_validation_a_missing_metric_is_a_warning_after_the_first_epoch() -> None:
    with pytest.warns(UserWarning, match=r"of the epoch\. There is: train_loss\. This run does not .* kept") as caught:
        trainer = fit(Scripted(), ModelCheckpoint(monitor="val"), max_epochs=3, limit_val_batches=0)
    assert len(caught) == 1
    assert (trainer.current_epoch, saved()) == (3, [])


def test_before_validation_has_run_a_missing_metric_is_waited_for() -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_on_train_epoch_end=True)
    fit(Scripted([1.0]), checkpoint, max_epochs=2, check_val_every_n_epoch=2)
    assert steps() == {"epoch=1-step=8.ckpt": 8}


def test_a_run_that_ends_before_it_could_validate_says_that_nothing_was_kept() -> None:
    with pytest.warns(UserWarning, match="kept nothing: validation did not run"):
        fit(Scripted([1.0]), ModelCheckpoint(monitor="val"), max_steps=3)


# ---- several of them, and resuming
def test_two_with_different_metrics_share_a_directory_and_leave_each_other_alone() -> None:
    class Both(Scripted):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("loss", [3.0, 1.0, 2.0][self.validations])
            self.log("acc", [0.1, 0.2, 0.3][self.validations])
            self.validations += 1

    loss = ModelCheckpoint(monitor="loss", save_last=True)
    acc = ModelCheckpoint(monitor="acc", mode="max", save_last=True)
    assert loss.state_key != acc.state_key
    fit(Both(), loss, acc, max_epochs=3)
    assert steps() == {"epoch=1-step=8.ckpt": 8, "epoch=2-step=12.ckpt": 12, "last.ckpt": 12, "last-v1.ckpt": 12}
    for path in (loss.best_model_path, acc.best_model_path):
        states = store.load(path)["callbacks"]
        assert set(states) >= {loss.state_key, acc.state_key}
    # each file knows of both decisions of its moment, whichever of the two was written first
    states = store.load(loss.last_model_path)["callbacks"]
    assert states[acc.state_key]["best_model_path"] == acc.best_model_path
    assert states[loss.state_key]["best_model_path"] == loss.best_model_path


def test_two_at_the_same_moment_never_take_the_same_name() -> None:
    one, other = ModelCheckpoint(monitor="val"), ModelCheckpoint(monitor="val", mode="max")
    fit(Scripted([1.0]), one, other, max_epochs=1)
    assert saved() == ["epoch=0-step=4-v1.ckpt", "epoch=0-step=4.ckpt"]
    assert one.best_model_path != other.best_model_path
    assert store.load(one.best_model_path)["callbacks"][other.state_key]["best_model_path"] == other.best_model_path


def test_a_checkpoint_knows_itself() -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_top_k=2, save_last=True)
    fit(Scripted([3.0, 2.0]), checkpoint, max_epochs=2)
    state = store.load(checkpoint.last_model_path)["callbacks"][checkpoint.state_key]
    assert state["best_k_models"] == checkpoint.best_k_models
    assert state["best_model_path"] == checkpoint.best_model_path
    assert state["last_model_path"] == checkpoint.last_model_path
    assert torch.load(checkpoint.best_model_path, weights_only=True)["callbacks"]


def test_its_state_is_named_as_lightning_does() -> None:
    assert ModelCheckpoint(monitor="val_loss").state_key == (
        "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
        "'train_time_interval': None}"
    )


@pytest.mark.parametrize("resume", ["last", "checkpoints/epoch=1-step=8.ckpt"])
def test_a_resumed_run_goes_on_counting_the_best(resume: str) -> None:
    values = [3.0, 1.0, 4.0, 2.0]
    fit(Scripted(values), ModelCheckpoint(monitor="val", save_top_k=2, save_last=True), max_epochs=2)
    module, checkpoint = Scripted(values[2:]), ModelCheckpoint(monitor="val", save_top_k=2, save_last=True)
    fit(module, checkpoint, max_epochs=4, ckpt_path=resume)
    assert steps() == {"epoch=1-step=8.ckpt": 8, "epoch=3-step=16.ckpt": 16, "last.ckpt": 16}
    assert checkpoint.best_model_score == 1.0
    assert checkpoint.best_model_path.endswith("epoch=1-step=8.ckpt")


def test_a_directory_that_was_moved_is_still_the_same_one() -> None:
    fit(Scripted([3.0, 1.0]), ModelCheckpoint("here", monitor="val", save_last=True), max_epochs=2)
    os.rename("here", "there")
    checkpoint = ModelCheckpoint("there", monitor="val", save_last=True)
    fit(Scripted([2.0, 0.5]), checkpoint, max_epochs=4, ckpt_path="there/last.ckpt")
    assert steps("there") == {"epoch=3-step=16.ckpt": 16, "last.ckpt": 16}
    assert not os.path.exists("here")


@pytest.mark.parametrize("monitor", [None, "val"])
def test_another_directory_begins_anew_and_the_old_files_stay(monitor: str | None) -> None:
    fit(Scripted([1.0]), ModelCheckpoint("old", monitor=monitor), max_epochs=1)
    with pytest.warns(UserWarning, match="the files there stay, and the best 1 are counted anew"):
        fit(Scripted([2.0]), ModelCheckpoint("new", monitor=monitor), max_epochs=2, ckpt_path="old/epoch=0-step=4.ckpt")
    assert saved("old") == ["epoch=0-step=4.ckpt"]
    assert saved("new") == ["epoch=1-step=8.ckpt"]


def test_last_is_the_newest_of_all_folders_whichever_callback_saved_it() -> None:
    def callbacks() -> list[ModelCheckpoint]:
        return [ModelCheckpoint("best", monitor="val"), ModelCheckpoint("often", every_n_train_steps=1, save_last=True)]

    fit(Scripted([1.0, 2.0]), *callbacks(), max_steps=7)
    assert (steps("best"), steps("often")) == ({"epoch=0-step=4.ckpt": 4}, {"epoch=1-step=7.ckpt": 7, "last.ckpt": 7})
    resumed = Scripted([2.0, 3.0])
    best, often = callbacks()
    trainer = fit(resumed, best, often, max_steps=9, ckpt_path="last")
    assert Path(str(trainer.resume_path)).parent.name == "often"
    assert steps("often") == {"epoch=2-step=9.ckpt": 9, "last.ckpt": 9}


def test_a_best_file_that_is_gone_is_forgotten() -> None:
    fit(Scripted([1.0, 2.0]), ModelCheckpoint(monitor="val", save_last=True), max_epochs=2)
    os.unlink("checkpoints/epoch=0-step=4.ckpt")
    checkpoint = ModelCheckpoint(monitor="val", save_last=True)
    fit(Scripted([3.0]), checkpoint, max_epochs=3, ckpt_path="last")
    assert checkpoint.best_model_score == 3.0
    assert os.path.exists(checkpoint.best_model_path)


def test_a_second_run_with_the_same_object_knows_nothing_of_the_first() -> None:
    checkpoint = ModelCheckpoint(monitor="val")
    fit(Scripted([1.0]), checkpoint, max_epochs=1)
    shutil.rmtree("checkpoints")
    fit(Scripted([2.0]), checkpoint, max_epochs=1)
    assert checkpoint.best_model_score == 2.0
    assert os.path.exists(checkpoint.best_model_path)


def test_a_file_that_the_process_did_not_live_to_write_is_made_from_the_one_of_the_same_moment() -> None:
    def callbacks() -> list[ModelCheckpoint]:
        return [
            ModelCheckpoint(monitor="val", filename="low", save_last=True),
            ModelCheckpoint(monitor="val", mode="max", filename="high"),
        ]

    fit(Scripted([1.0]), *callbacks(), max_epochs=1)
    os.unlink("checkpoints/high.ckpt")
    os.unlink("checkpoints/last.ckpt")
    low, high = callbacks()
    fit(Scripted([0.5]), low, high, max_epochs=2, ckpt_path="checkpoints/low.ckpt")
    assert steps() == {"high.ckpt": 4, "last.ckpt": 8, "low.ckpt": 8}
    assert (high.best_model_score, low.best_model_score) == (1.0, 0.5)


# ---- interruptions
def test_a_signal_saves_the_step_as_last_and_the_resumed_run_is_the_uninterrupted_one() -> None:
    whole = Scripted()
    fit(whole, ModelCheckpoint("whole"), max_epochs=3)
    with pytest.raises(SystemExit) as ended:
        fit(Scripted(), At(6, terminate), ModelCheckpoint(), max_epochs=3)
    assert ended.value.code == 143
    assert steps() == {"epoch=0-step=4.ckpt": 4, "last.ckpt": 6}
    resumed = Scripted()
    fit(resumed, ModelCheckpoint(), max_epochs=3, ckpt_path="last")
    assert torch.equal(weights(resumed), weights(whole))


def test_a_step_that_is_saved_already_is_not_written_again_for_a_signal() -> None:
    with pytest.raises(SystemExit):
        fit(Scripted(), At(6, terminate), ModelCheckpoint(every_n_train_steps=2), max_epochs=3)
    assert steps() == {"epoch=1-step=6.ckpt": 6, "last.ckpt": 6}
    assert os.path.samefile("checkpoints/last.ckpt", "checkpoints/epoch=1-step=6.ckpt")


def test_a_run_interrupted_twice_has_one_last() -> None:
    for step, resume in ((3, None), (6, "last")):
        with pytest.raises(SystemExit):
            fit(Scripted(), At(step, terminate), ModelCheckpoint(save_top_k=-1), max_epochs=3, ckpt_path=resume)
    assert steps() == {"epoch=0-step=4.ckpt": 4, "last.ckpt": 6}


def test_for_a_signal_everything_is_saved_even_if_only_weights_are_wanted_and_only_once() -> None:
    weights_only = ModelCheckpoint("a", save_weights_only=True, save_last=True, every_n_train_steps=2)
    other = ModelCheckpoint("b", monitor="train_loss")
    with pytest.raises(SystemExit):
        fit(Scripted(), At(2, terminate), weights_only, other, max_epochs=3)
    assert "optimizer_states" in store.load("a/last.ckpt")
    assert "optimizer_states" not in store.load("a/epoch=0-step=2.ckpt")
    assert saved("b") == []


def test_whoever_wants_nothing_saved_gets_nothing_saved() -> None:
    with pytest.raises(SystemExit):
        fit(Scripted(), At(2, terminate), ModelCheckpoint(save_top_k=0), max_epochs=3)
    assert saved() == []


def test_an_exception_saves_what_there_is_if_that_is_wanted() -> None:
    def fail(trainer: Trainer) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fit(Scripted(), At(3, fail), ModelCheckpoint(), max_epochs=1)
    assert saved() == []
    with pytest.raises(ValueError, match="broken"):
        fit(Scripted(), At(3, fail), ModelCheckpoint(save_on_exception=True), max_epochs=1)
    assert steps() == {"epoch=0-step=3.ckpt": 3}
    checkpoint = ModelCheckpoint("more", "{step}", save_on_exception=True, save_last=True, every_n_train_steps=2)
    with pytest.raises(ValueError, match="broken"):
        fit(Scripted(), At(3, fail), checkpoint, max_epochs=1)
    assert steps("more") == {"step=2.ckpt": 2, "step=3.ckpt": 3, "last.ckpt": 3}
    assert checkpoint.best_model_path.endswith("step=2.ckpt")
    assert checkpoint.last_model_path.endswith("last.ckpt")


def test_last_is_there_at_the_end_if_nothing_was_saved_before() -> None:
    checkpoint = ModelCheckpoint(every_n_epochs=5, save_last=True)
    fit(Scripted(), checkpoint, max_epochs=2)
    assert steps() == {"last.ckpt": 8}
    assert (checkpoint.best_model_path, os.path.basename(checkpoint.last_model_path)) == ("", "last.ckpt")
    assert store.load(checkpoint.last_model_path)["optimizer_states"]


def test_the_file_a_run_was_resumed_from_stays(tmp_path: Path) -> None:
    fit(Scripted([2.0]), ModelCheckpoint(tmp_path, "{epoch}", monitor="val"), max_epochs=1)
    again = ModelCheckpoint(tmp_path, "{epoch}", monitor="val")
    fit(Scripted([9.0, 1.0, 0.5]), again, max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert saved(tmp_path) == ["epoch=0.ckpt", "epoch=2.ckpt"]
    assert [os.path.basename(path) for path in again.best_k_models] == ["epoch=2.ckpt"]


def test_of_equal_ones_the_earliest_goes_first() -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_top_k=2, filename="{epoch}")
    fit(Scripted([1.0, 1.0, 0.5]), checkpoint, max_epochs=3)
    assert saved() == ["epoch=1.ckpt", "epoch=2.ckpt"]


def test_the_score_and_the_worst_speak_of_what_is_kept() -> None:
    checkpoint = ModelCheckpoint(monitor="val", save_top_k=-1)
    fit(Scripted([1.0, 3.0, 2.0]), checkpoint, max_epochs=3)
    assert os.path.basename(checkpoint.kth_best_model_path) == "epoch=1-step=8.ckpt"
    assert (checkpoint.kth_value, checkpoint.current_score) == (3.0, 2.0)
    checkpoint = ModelCheckpoint("best", monitor="val")
    trainer = fit(Scripted([1.0, 3.0, 2.0]), checkpoint, max_epochs=3)
    assert checkpoint.current_score == 1.0
    asked = [None, torch.tensor(1.0), torch.tensor(0.9), torch.tensor(math.nan)]
    assert [checkpoint.check_monitor_top_k(trainer, score) for score in asked] == [False, False, True, False]


def test_a_slash_in_the_template_makes_directories_that_are_tidied_as_the_others() -> None:
    checkpoint = ModelCheckpoint(monitor="val", filename="e{epoch}/{step}")
    fit(Scripted([2.0, 1.0, 3.0]), checkpoint, max_epochs=3)
    files = [str(path.relative_to("checkpoints")) for path in Path("checkpoints").rglob("*.ckpt")]
    assert files == ["eepoch=1/step=8.ckpt"]
    assert checkpoint.best_model_path == os.path.realpath("checkpoints/eepoch=1/step=8.ckpt")


def test_files_are_removed_and_written_by_the_runs_checkpoint_io() -> None:
    class Counting(CheckpointIO):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            self.calls.append(f"save {os.path.basename(path)}")
            super().save_checkpoint(checkpoint, path, storage_options)

        def remove_checkpoint(self, path: Any) -> None:
            self.calls.append(f"remove {os.path.basename(path)}")
            super().remove_checkpoint(path)

    io = Counting()
    fit(Scripted(), ModelCheckpoint(filename="{epoch}", save_last=True), max_epochs=2, plugins=[io])
    assert io.calls == [
        "save epoch=0.ckpt", "save last.ckpt", "save epoch=1.ckpt", "save last.ckpt", "remove epoch=0.ckpt"
    ]  # fmt: skip
    assert saved() == ["epoch=1.ckpt", "last.ckpt"]


def test_names_are_made_with_the_characters_of_the_class() -> None:
    class Other(ModelCheckpoint):
        CHECKPOINT_JOIN_CHAR = "+"
        CHECKPOINT_EQUALS_CHAR = ":"
        FILE_EXTENSION = ".pt"

    assert Other().format_checkpoint_name({"epoch": 1, "step": 2}, ver=3, prefix="mine") == "mine+epoch:1+step:2+v3.pt"


# ---- what it costs
def test_a_step_without_a_save_costs_two_calls(tmp_path: Path) -> None:
    calls: list[str] = []

    def count(trainer: Trainer) -> None:
        checkpoint = trainer.callbacks[-1]

        def profile(frame: Any, event: str, _: Any) -> None:
            if event == "call":
                calls.append(frame.f_code.co_name)

        sys.setprofile(profile)
        checkpoint.on_train_batch_end(trainer, trainer.module, {}, None, 0)
        checkpoint.on_save_point(trainer, trainer.module)
        sys.setprofile(None)

    fit(Scripted([1.0]), At(2, count), EarlyStopping("val"), ModelCheckpoint(monitor="val"), max_epochs=1)
    assert calls == ["on_train_batch_end", "on_save_point", "interrupted"]


# ---- killed
KILLING = r"""
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from trainkit import Callback, Module, Trainer
from trainkit.callbacks import EarlyStopping, ModelCheckpoint
from trainkit.checkpoint import store
from trainkit.checkpoint.io import CheckpointIO

torch.set_num_threads(1)
warnings.simplefilter("error")


class Net(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        values = torch.Generator().manual_seed(self.global_step)
        self.log("loss", torch.rand((), generator=values))
        self.log("acc", torch.rand((), generator=values))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class DieAt(Callback):
    # die before the n-th file is written, when those before it are there

    def __init__(self, n):
        self.left = n

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def run(directory, resume, die_at=0):
    callbacks = [
        EarlyStopping("loss", patience=100),
        ModelCheckpoint(directory, monitor="loss", save_top_k=2, save_last=True, filename="loss-{step}"),
        ModelCheckpoint(directory, monitor="acc", mode="max", every_n_train_steps=3, filename="acc-{step}"),
        DieAt(die_at),
    ]
    trainer = Trainer(accelerator="cpu", max_epochs=int(sys.argv[3]), val_check_interval=5, num_sanity_val_steps=0,
                      callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False)
    module, data = Net(), torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(data, 2), DataLoader(data[:1]), ckpt_path=resume)
    best = [(os.path.basename(path), float(score)) for c in callbacks[1:3] for path, score in c.best_k_models.items()]
    return best, callbacks[0].wait_count, torch.cat([p.detach().flatten() for p in module.parameters()])


root, trials, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(4)
expected = run(root / "whole", None)
kills = 0
while kills < trials:
    die_at = draw.choice([0, 2, 3, 4, 5])  # 0: at any moment
    child = os.fork()
    if child == 0:
        run(root / "killed", "last" if list((root / "killed").glob("*.ckpt")) else None, die_at)
        os._exit(0)
    if die_at == 0:
        time.sleep(draw.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    kills += 1
    for path in (root / "killed").glob("*.ckpt"):
        store.load(path)
found = run(root / "killed", "last")
assert found[:2] == expected[:2], (found, expected)
assert torch.equal(found[2], expected[2])
print(f"kills {kills}")
"""


@pytest.mark.parametrize(("trials", "epochs"), [(8, 10), pytest.param(200, 60, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_keeps_the_same_best_as_the_one_that_was_not(
    trials: int, epochs: int, tmp_path: Path, checkout: Path
) -> None:
    command = [sys.executable, "-c", KILLING, str(tmp_path), str(trials), str(epochs)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[-1]) >= min(trials, epochs // 2)


@pytest.mark.parametrize(
    ("settings", "files", "best"),
    [
        ({"monitor": "epoch", "mode": "max", "filename": "{epoch}"}, ["epoch=1.ckpt", "epoch=2.ckpt"], 2),
        ({"monitor": "epoch", "mode": "min", "filename": "{epoch}"}, ["epoch=0.ckpt", "epoch=1.ckpt"], 0),
        (
            {"monitor": "step", "mode": "max", "every_n_train_steps": 3},
            ["epoch=2-step=12.ckpt", "epoch=2-step=9.ckpt"],
            12,
        ),
    ],
)
def test_the_counters_of_the_run_can_be_monitored(settings: Any, files: list[str], best: int) -> None:
    checkpoint = ModelCheckpoint(save_top_k=2, **settings)
    fit(Scripted(), checkpoint, max_epochs=3)
    assert saved() == files
    assert checkpoint.best_model_score == best


def test_a_metric_that_is_called_like_a_counter_comes_first() -> None:
    checkpoint = ModelCheckpoint(monitor="epoch", mode="max", filename="{step}")
    fit(Scripted([3.0, 5.0, 4.0], name="epoch"), checkpoint, max_epochs=3)
    assert checkpoint.best_model_score == 5.0
    assert saved() == ["step=8.ckpt"]


def test_how_many_are_kept_may_be_changed_before_the_run() -> None:
    checkpoint = ModelCheckpoint()
    checkpoint.save_top_k = -1
    fit(Scripted(), checkpoint, max_epochs=2)
    assert len(saved()) == 2


@pytest.mark.parametrize("make", [ModelCheckpoint, lambda: ModelCheckpoint(monitor="x"), lambda: EarlyStopping("x")])
def test_a_pickled_callback_is_like_the_first(make: Callable[[], Callback]) -> None:
    callback = make()
    assert vars(pickle.loads(pickle.dumps(callback))) == vars(callback)
