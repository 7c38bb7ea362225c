"""The Trainer: what it sets up, what it leaves behind, what it refuses, and how it ends."""

from __future__ import annotations

import copy
import csv
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Callback, Module, Trainer, seed_everything
from trainkit.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, Timer
from trainkit.errors import CheckpointError, MisconfigurationException
from trainkit.loggers import CSVLogger, TensorBoardLogger

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
BARE = {**QUIET, "logger": False, "enable_checkpointing": False}


def rows() -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 1))


# ---------------------------------------------------------------- the whole of it
def test_fit_validate_test_predict_with_a_data_module(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**QUIET, max_epochs=3, log_every_n_steps=2)
    module, data = TinyModule(), TinyData(shuffle=True)
    trainer.fit(module, datamodule=data)
    validated = trainer.validate(module, datamodule=data, verbose=False)
    tested = trainer.test(module, datamodule=data, verbose=False)
    predictions = trainer.predict(module, datamodule=data)
    assert list(validated[0]) == ["val_loss"]
    assert tested[0]["test_loss"] == pytest.approx(validated[0]["val_loss"])
    assert torch.cat(predictions).shape == (32, 1)
    run = Path(trainer.log_dir)
    assert run.name == "version_0"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["epoch=2-step=24.ckpt"]
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "hparams.yaml").read_text() == "lr: 0.05\n"


def test_a_data_module_may_be_given_in_the_place_of_the_loaders(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**BARE, max_epochs=1)
    trainer.fit(TinyModule(), TinyData())
    assert trainer.global_step == 8
    assert "val_loss" in trainer.callback_metrics


def test_hooks_of_the_data_module_come_in_order(TinyModule: Any, TinyData: Any) -> None:
    trace = []

    class Data(TinyData):  # type: ignore[misc, valid-type]
        def prepare_data(self) -> None:
            trace.append("prepare_data")

        def setup(self, stage: str) -> None:
            trace.append(f"setup {stage}")

        def train_dataloader(self) -> Any:
            trace.append("train_dataloader")
            return super().train_dataloader()

        def val_dataloader(self) -> Any:
            trace.append("val_dataloader")
            return super().val_dataloader()

        def teardown(self, stage: str) -> None:
            trace.append(f"teardown {stage}")

    Trainer(**BARE, max_epochs=2).fit(TinyModule(), datamodule=Data())
    assert trace == ["prepare_data", "setup fit", "val_dataloader", "train_dataloader", "teardown fit"]


def test_loaders_are_asked_for_again_every_n_epochs(TinyModule: Any, TinyData: Any) -> None:
    asked = []

    class Data(TinyData):  # type: ignore[misc, valid-type]
        def train_dataloader(self) -> Any:
            asked.append(self.trainer.current_epoch)
            return super().train_dataloader()

    Trainer(**BARE, max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(TinyModule(), datamodule=Data())
    assert asked == [0, 2, 4]


def test_two_fits_in_one_process_leave_nothing_behind(TinyModule: Any, TinyData: Any) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    results = []
    for _ in range(2):
        trainer = Trainer(**BARE, max_epochs=1)
        module = TinyModule()
        trainer.fit(module, datamodule=TinyData())
        results.append(module.line.weight.tolist())
    assert results[0] == results[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert trainer.stage is None


def test_the_same_trainer_goes_on_with_more_epochs(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**BARE, max_epochs=1)
    module = TinyModule()
    trainer.fit(module, datamodule=TinyData())
    trainer.max_epochs = 3
    trainer.fit(module, datamodule=TinyData())
    assert (trainer.current_epoch, trainer.global_step) == (3, 24)


def test_fast_dev_run_runs_every_loop_and_writes_nothing(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    trainer = Trainer(
        **QUIET, fast_dev_run=2, callbacks=[EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss")]
    )
    module, data = TinyModule(), TinyData()
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    assert trainer.global_step == 2
    assert (trainer.num_val_batches, trainer.num_test_batches) == ([2], [2])  # fit's stay
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "batches"), [(3, 3), (0.5, 4), (1.0, 8), (100, 8)])
def test_limits_shorten_every_loop(TinyModule: Any, TinyData: Any, limit: float, batches: int) -> None:
    trainer = Trainer(
        **BARE, max_epochs=1, limit_train_batches=limit, limit_val_batches=limit, limit_test_batches=limit,
        limit_predict_batches=limit,
    )  # fmt: skip
    module, data = TinyModule(), TinyData()
    trainer.fit(module, datamodule=data)
    assert (trainer.num_training_batches, trainer.num_val_batches) == (batches, [batches])
    assert trainer.global_step == batches
    trainer.test(module, datamodule=data, verbose=False)
    assert trainer.num_test_batches == [batches]
    assert len(trainer.predict(module, datamodule=data)) == batches


def test_overfit_batches_gives_the_same_batches_in_the_same_order(TinyModule: Any, TinyData: Any) -> None:
    seen: list[list[float]] = []

    class Sees(TinyModule):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch[0].flatten().tolist())
            return super().training_step(batch, batch_idx)

    trainer = Trainer(**BARE, max_epochs=2, overfit_batches=2)
    with pytest.warns(UserWarning, match="the shuffling of train_dataloader is turned off"):
        trainer.fit(Sees(), datamodule=TinyData(shuffle=True))
    assert len(seen) == 4
    assert seen[:2] == seen[2:]
    assert trainer.num_val_batches == [2]


def test_the_sanity_check_leaves_no_trace(TinyModule: Any, TinyData: Any) -> None:
    seen = []

    class Draws(TinyModule):  # type: ignore[misc, valid-type]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(3)
            self.log("val_loss", 1.0)
            seen.append((self.trainer.sanity_checking, batch_idx))

        def on_train_start(self) -> None:
            draws.append(torch.rand(1).item())
            assert self.trainer.callback_metrics == {}

    draws: list[float] = []
    for steps in (0, 2):
        seed_everything(1, verbose=False)
        Trainer(**BARE, max_epochs=1, num_sanity_val_steps=steps, limit_val_batches=3).fit(
            Draws(), datamodule=TinyData()
        )
    assert draws[0] == draws[1]
    assert seen[3:5] == [(True, 0), (True, 1)]


# ---------------------------------------------------------------- errors and their tidying up
def test_teardown_and_on_exception_run_after_an_error(TinyModule: Any, TinyData: Any) -> None:
    trace = []

    class Fails(TinyModule):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("on purpose")

        def teardown(self, stage: str) -> None:
            trace.append("module")

    class Tidies(Callback):
        def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
            trace.append(str(exception))

        def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
            trace.append("callback")
            raise ValueError("one more")

    class Data(TinyData):  # type: ignore[misc, valid-type]
        def on_exception(self, exception: BaseException) -> None:
            trace.append("data hears")

        def teardown(self, stage: str) -> None:
            trace.append("data")

    with pytest.raises(RuntimeError, match="on purpose") as raised:
        Trainer(**BARE, max_epochs=1, callbacks=Tidies()).fit(Fails(), datamodule=Data())
    assert trace[:4] == ["on purpose", "data hears", "data", "callback"]
    assert any("ValueError: one more" in note for note in raised.value.__notes__)


def test_wrong_models_and_data_are_refused(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**BARE, max_epochs=1)
    with pytest.raises(TypeError, match=r"fit needs a trainkit.Module. Received: Linear. Derive it"):
        trainer.fit(nn.Linear(1, 1), datamodule=TinyData())  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"received loaders \(train\) and a datamodule"):
        trainer.fit(TinyModule(), TinyData().train_dataloader(), datamodule=TinyData())
    with pytest.raises(TypeError, match=r"datamodule must be a trainkit.DataModule. Received: int"):
        trainer.fit(TinyModule(), datamodule=3)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="Module has no validation_step, which validate calls"):
        trainer.validate(Module(), TinyData().val_dataloader())


def test_a_callback_with_a_wrong_signature_is_refused_before_anything_runs(TinyModule: Any, TinyData: Any) -> None:
    class Wrong(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Module, batch: Any) -> None: ...  # type: ignore[override]

    with pytest.raises(
        TypeError, match=r"Wrong.on_train_batch_end takes \(trainer, module, batch\) but is called with"
    ):
        Trainer(**BARE, max_epochs=1, callbacks=Wrong()).fit(TinyModule(), datamodule=TinyData())


@pytest.mark.parametrize("settings", [{}, {"logger": False}])
def test_a_run_directory_that_cannot_be_written_is_refused(
    TinyModule: Any, TinyData: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("in the way")

    class Never(TinyModule):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("a step was taken")

    with pytest.raises((MisconfigurationException, CheckpointError), match="file"):
        Trainer(**QUIET, **settings, max_epochs=1, default_root_dir=tmp_path / "file").fit(
            Never(), datamodule=TinyData()
        )


def test_two_callbacks_with_one_state_key_are_refused(TinyModule: Any, TinyData: Any) -> None:
    class Counts(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

    with pytest.raises(MisconfigurationException, match="two callbacks keep their state under"):
        Trainer(**BARE, max_epochs=1, callbacks=[Counts(), Counts()]).fit(TinyModule(), datamodule=TinyData())


# ---------------------------------------------------------------- components
def test_the_default_components() -> None:
    trainer = Trainer(accelerator="cpu", max_epochs=1)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names == ["RichProgressBar", "ModelSummary", "ModelCheckpoint"]
    assert isinstance(trainer.logger, TensorBoardLogger)
    assert Trainer(**BARE, max_epochs=1).callbacks == []
    assert Trainer(**BARE, max_steps=5).max_epochs == -1


def test_callbacks_that_save_come_last_and_the_others_as_listed() -> None:
    class First(Callback): ...

    checkpoint, first, timer = ModelCheckpoint(), First(), Timer("00:01:00:00")
    trainer = Trainer(**QUIET, logger=False, max_epochs=1, callbacks=[checkpoint, first, timer])
    assert trainer.callbacks == [first, timer, checkpoint]
    assert trainer.checkpoint_callback is checkpoint


def test_max_time_adds_a_timer() -> None:
    trainer = Trainer(**BARE, max_time={"minutes": 1})
    assert [type(callback) for callback in trainer.callbacks] == [Timer]
    assert trainer.max_epochs == -1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_progress_bar": False, "callbacks": RichProgressBar()}, "enable_progress_bar=False, but"),
        ({"enable_checkpointing": False, "callbacks": ModelCheckpoint()}, "enable_checkpointing=False, but"),
        ({"callbacks": [RichProgressBar(), RichProgressBar()]}, "2 progress bars"),
        ({"callbacks": [ModelCheckpoint]}, "Did you forget the brackets"),
        ({"callbacks": 3}, "callbacks must be Callback objects. Received: 3"),
        ({"logger": "tensorboard"}, "logger must be True, False, or Logger objects"),
        ({"strategy": "ddpp"}, "strategy must be"),
        ({"precision": "8-true"}, "precision must be one of '32-true'"),
    ],
)
def test_components_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Trainer(accelerator="cpu", **settings)


def test_loggers_of_one_root_share_the_run_directory(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="run"), CSVLogger(tmp_path, name="run")]
    trainer = Trainer(**QUIET, max_epochs=1, log_every_n_steps=2, logger=loggers)
    trainer.fit(TinyModule(), datamodule=TinyData())
    run = tmp_path / "run" / "version_0"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["version_0"]
    assert (run / "metrics.csv").exists()
    assert len(list(run.glob("events.*"))) == 1


def test_configure_callbacks_replaces_those_of_the_same_type(TinyModule: Any, TinyData: Any) -> None:
    class Brings(TinyModule):  # type: ignore[misc, valid-type]
        def configure_callbacks(self) -> Any:
            return EarlyStopping("val_loss", patience=7)

    trainer = Trainer(**BARE, max_epochs=1, callbacks=[EarlyStopping("val_loss", patience=3)])
    trainer.fit(Brings(), datamodule=TinyData())
    assert [callback.patience for callback in trainer.callbacks] == [7]  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains(TinyModule: Any, TinyData: Any, precision: str) -> None:
    trainer = Trainer(**BARE, max_epochs=3, precision=precision)
    module = TinyModule()
    trainer.fit(module, datamodule=TinyData())
    assert trainer.validate(module, datamodule=TinyData(), verbose=False)[0]["val_loss"] < 3
    assert math.isfinite(float(trainer.callback_metrics["val_loss"]))


# ---------------------------------------------------------------- going on from a checkpoint
def test_last_goes_on_in_the_run_directory(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    def run(epochs: int, **fit: Any) -> Trainer:
        trainer = Trainer(**QUIET, max_epochs=epochs, log_every_n_steps=2, logger=CSVLogger(tmp_path, name="run"))
        trainer.fit(TinyModule(), datamodule=TinyData(), **fit)
        return trainer

    run(2)
    trainer = run(3, ckpt_path="last")
    assert (trainer.current_epoch, trainer.global_step) == (3, 24)
    assert Path(trainer.log_dir).name == "version_0"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["version_0"]
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]
    assert Path(run(3).log_dir).name == "version_1"  # without ckpt_path: a run of its own


def test_last_without_a_checkpoint_starts_from_zero_and_says_so(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**QUIET, max_epochs=1, log_every_n_steps=2)
    with pytest.warns(UserWarning, match="there is no checkpoint yet"):
        trainer.fit(TinyModule(), datamodule=TinyData(), ckpt_path="last")
    assert trainer.global_step == 8


def test_best_is_found_by_another_process_too(TinyModule: Any, TinyData: Any) -> None:
    def trainer() -> Trainer:
        checkpoint = ModelCheckpoint(monitor="val_loss", mode="max", save_last=True)
        return Trainer(**QUIET, max_epochs=3, log_every_n_steps=2, callbacks=checkpoint)

    first = trainer()
    first.fit(TinyModule(), datamodule=TinyData())
    second = trainer()
    second.validate(TinyModule(), datamodule=TinyData(), ckpt_path="best", verbose=False)
    assert second.resume_path == first.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert "epoch=0" in second.resume_path


def test_a_missing_checkpoint_is_an_error_that_names_it(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**BARE, max_epochs=1)
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt"):
        trainer.fit(TinyModule(), datamodule=TinyData(), ckpt_path="nowhere.ckpt")
    with pytest.raises(CheckpointError, match="has not saved a best checkpoint"):
        trainer.fit(TinyModule(), datamodule=TinyData(), ckpt_path="best")


def test_evaluation_without_a_module_takes_the_best_one(TinyModule: Any, TinyData: Any) -> None:
    class Worsens(TinyModule):  # type: ignore[misc, valid-type]
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                torch.nn.init.constant_(self.line.weight, 50.0)

    checkpoint = ModelCheckpoint(monitor="val_loss")
    trainer = Trainer(**QUIET, max_epochs=3, log_every_n_steps=2, callbacks=checkpoint)
    module = Worsens()
    trainer.fit(module, datamodule=TinyData())
    assert trainer.ckpt_path is None
    with pytest.warns(UserWarning, match="the best checkpoint of the last fit, is loaded"):
        best = trainer.validate(datamodule=TinyData(), verbose=False)[0]["val_loss"]
    assert best == pytest.approx(float(checkpoint.best_model_score))
    assert best < 20
    assert trainer.ckpt_path == checkpoint.best_model_path
    trainer.validate(module, datamodule=TinyData(), verbose=False)
    assert trainer.ckpt_path is None


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_without_a_module_there_must_be_a_best_one(method: str, TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**BARE, fast_dev_run=True)
    trainer.fit(TinyModule(), datamodule=TinyData())
    for given in ({}, {"ckpt_path": "best"}, {"ckpt_path": "nowhere.ckpt"}):
        for error in (CheckpointError, FileNotFoundError, ValueError):
            with pytest.raises(error, match="checkpoint"):
                getattr(trainer, method)(datamodule=TinyData(), **given)


def test_a_trainer_can_be_copied_and_pickled_before_and_after_a_run(TinyModule: Any) -> None:
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[EarlyStopping("loss")])
    assert pickle.loads(pickle.dumps(trainer)).max_epochs == 1
    trainer = Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=1)
    trainer.fit(TinyModule(), torch.utils.data.DataLoader(rows(), 4))
    copied = copy.deepcopy(trainer)
    assert (copied.global_step, copied.current_epoch) == (trainer.global_step, 1)
    assert copied.step_optimizers[0].optimizer is copied.optimizers[0]
    assert copied.optimizers[0] is not trainer.optimizers[0]


def test_the_epoch_that_a_limit_cuts_short_counts(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**BARE, max_steps=3)
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert (trainer.current_epoch, trainer.global_step) == (1, 3)
    trainer.fit_loop.epoch_loop.max_steps = 8  # and is gone on with
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert (trainer.current_epoch, trainer.global_step) == (1, 8)


def test_a_second_fit_goes_on_to_the_new_limit(TinyModule: Any, TinyData: Any) -> None:
    trainer, module = Trainer(**BARE, max_epochs=1), TinyModule()
    trainer.fit(module, datamodule=TinyData())
    trainer.fit(module, datamodule=TinyData())
    assert (trainer.current_epoch, trainer.global_step) == (1, 8)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=TinyData())
    assert (trainer.current_epoch, trainer.global_step) == (3, 24)


def test_a_dataloader_idx_is_handed_on_when_there_are_several_loaders(TinyData: Any) -> None:
    class Notes(Callback):
        def on_test_batch_end(self, trainer: Trainer, module: Module, *given: Any) -> None:
            ends.append(len(given))

    class Net(Module):
        def test_step(self, *given: Any) -> None:
            steps.append(given[1:])

    steps: list[Any] = []
    ends: list[int] = []
    loader = torch.utils.data.DataLoader(rows(), 4)
    trainer = Trainer(**BARE, callbacks=Notes())
    trainer.test(Net(), loader, verbose=False)
    trainer.test(Net(), [loader, loader], verbose=False)
    assert steps == [(0,), (1,), (0, 0), (1, 0), (0, 1), (1, 1)]
    assert ends == [3, 3, 4, 4, 4, 4]


def test_validation_that_can_not_happen_is_told_of(TinyModule: Any) -> None:
    class Trains(TinyModule):  # type: ignore[misc, valid-type]
        validation_step = Module.validation_step

    loader = torch.utils.data.DataLoader(rows(), 4)
    with pytest.warns(UserWarning, match="has a validation_step, but there is no val_dataloader"):
        Trainer(**BARE, max_epochs=1).fit(TinyModule(), loader)
    with pytest.warns(UserWarning, match="validation loaders but no validation_step"):
        Trainer(**BARE, max_epochs=1).fit(Trains(), loader, loader)


def test_two_callbacks_with_one_state_are_refused_at_once() -> None:
    for error in (MisconfigurationException, RuntimeError):
        with pytest.raises(error, match="two callbacks keep their state under"):
            Trainer(**BARE, callbacks=[EarlyStopping("loss"), EarlyStopping("loss")])


def test_predict_needs_a_step_or_a_forward() -> None:
    with pytest.raises(MisconfigurationException, match="neither predict_step nor forward"):
        Trainer(**BARE).predict(Module(), torch.utils.data.DataLoader(rows(), 4))


def test_a_step_may_take_its_batch_from_an_iterator() -> None:
    class Pulls(Module):
        def __init__(self, twice: bool = False) -> None:
            super().__init__()
            self.line, self.twice = nn.Linear(3, 1), twice

        def training_step(self, dataloader_iter: Any) -> Any:
            (x, _), batch_idx, dataloader_idx = next(dataloader_iter)
            taken.append((tuple(x.shape), batch_idx, dataloader_idx))
            if self.twice:
                next(dataloader_iter)
            return self.line(x).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    taken: list[Any] = []
    loader = torch.utils.data.DataLoader(rows(), 4)
    Trainer(**BARE, max_epochs=1).fit(Pulls(), loader)
    assert taken == [((4, 3), 0, 0), ((4, 3), 1, 0)]
    with pytest.raises(MisconfigurationException, match="second item from its dataloader_iter"):
        Trainer(**BARE, max_epochs=1).fit(Pulls(twice=True), loader)


def test_predictions_that_are_none_are_told_of(TinyModule: Any) -> None:
    class Silent(TinyModule):  # type: ignore[misc, valid-type]
        def predict_step(self, batch: Any, batch_idx: int) -> None: ...

    loader = torch.utils.data.DataLoader(rows(), 4)
    with pytest.warns(UserWarning, match="predict_step returned None"):
        assert Trainer(**BARE).predict(Silent(), loader) == [None, None]
    assert Trainer(**BARE).predict(Silent(), loader, return_predictions=False) is None


def test_load_from_checkpoint_makes_the_module_again(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    trainer = Trainer(**BARE, max_epochs=1)
    module = TinyModule(lr=0.01)
    trainer.fit(module, datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = TinyModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.hparams == {"lr": 0.01}
    assert torch.equal(loaded.line.weight, module.line.weight)
    assert TinyModule.load_from_checkpoint(tmp_path / "x.ckpt", lr=0.5).hparams == {"lr": 0.5}


# ---------------------------------------------------------------- Ctrl-C and SIGTERM
SCRIPT = """
import os, signal, sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainkit import Trainer, Module, Callback
class M(Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        return self.line(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 11 and sys.argv[1] != "no":
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
data = DataLoader(TensorDataset(torch.randn(32, 3)), 4, shuffle=True, num_workers=int(sys.argv[2]))
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
trainer = Trainer(accelerator="cpu", max_epochs=3, callbacks=Kill(), **quiet)
trainer.fit(M(), data, ckpt_path="last" if sys.argv[1] == "no" else None)
print(trainer.global_step, trainer.resume_path)
"""


@pytest.mark.parametrize(("name", "code", "workers"), [("SIGINT", 130, 1), ("SIGTERM", 143, 0)])
def test_a_signal_finishes_the_step_and_saves(
    tmp_path: Path, checkout: Path, name: str, code: int, workers: int
) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "train.py", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )

    stopped = run(name, str(workers))
    assert stopped.returncode == code, stopped.stderr
    assert "Traceback" not in stopped.stderr
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    assert saved["progress"] == {"epoch": 1, "batch": 4, "step": 12, "total_batch": 12, "window": 12}
    resumed = run("no", str(workers))
    assert resumed.stdout.startswith("24 "), resumed.stderr
    assert "last.ckpt" in resumed.stdout


# ---------------------------------------------------------------- what Lightning programs count on
def test_loggers_are_called_by_name(TinyModule: Any, TinyData: Any) -> None:
    steps = []

    class ByName(CSVLogger):
        def log_metrics(self, *, metrics: Any, step: int | None = None) -> None:  # type: ignore[override]
            steps.append(step)

    Trainer(**{**BARE, "logger": ByName(".")}, max_epochs=1, log_every_n_steps=4).fit(TinyModule(), TinyData())
    assert steps
    assert set(steps) == {3, 7}


def test_a_trainer_is_set_for_modules_inside_a_module(TinyModule: Any) -> None:
    outer, inner = TinyModule(), TinyModule()
    outer.inner, trainer = inner, Trainer(**BARE)
    outer.trainer = trainer
    assert inner.trainer is trainer


def test_a_callback_of_the_module_replaces_one_that_it_derives_from(TinyModule: Any, TinyData: Any) -> None:
    class Better(EarlyStopping):
        pass

    plain, better = Callback(), Better("val_loss")
    module = TinyModule()
    module.configure_callbacks = lambda: better
    trainer = Trainer(**BARE, max_epochs=1, callbacks=[plain, EarlyStopping("val_loss")])
    trainer.fit(module, TinyData())
    assert trainer.callbacks == [plain, better]


def test_a_callback_may_get_its_state_in_setup(TinyModule: Any, TinyData: Any) -> None:
    class Late(Callback):
        def __init__(self, what: str) -> None:
            self.what = what

        @property
        def state_key(self) -> str:
            return self._generate_state_key(what=self.what)

        def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
            self.seen = 3

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

    trainer = Trainer(**BARE, max_epochs=1, callbacks=[Late("a"), Late("b")])
    trainer.fit(TinyModule(), TinyData())
    trainer.save_checkpoint("file.ckpt")
    states = torch.load("file.ckpt", weights_only=False)["callbacks"]
    keys = [key for key in states if "Late" in key]
    assert [key.split(".")[-1] for key in keys] == ["Late{'what': 'a'}", "Late{'what': 'b'}"]
    assert states[keys[0]] == {"seen": 3}


def test_a_checkpoint_that_is_named_goes_before_the_one_that_was_set(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(**BARE, max_epochs=1)
    trainer.fit(TinyModule(), TinyData())
    for name in ("set.ckpt", "named.ckpt"):
        trainer.save_checkpoint(name)
    trainer.ckpt_path = "set.ckpt"
    trainer.validate(TinyModule(), TinyData(), verbose=False)
    assert Path(str(trainer.ckpt_path)).name == "set.ckpt"
    with pytest.warns(UserWarning, match="trainer.ckpt_path was set to set.ckpt"):
        trainer.validate(TinyModule(), TinyData(), ckpt_path="named.ckpt", verbose=False)
    assert Path(str(trainer.ckpt_path)).name == "named.ckpt"


def test_a_module_without_optimizers_is_told_what_to_write(TinyModule: Any, TinyData: Any) -> None:
    module = TinyModule()
    module.configure_optimizers = None
    with pytest.raises(MisconfigurationException, match="configure_optimizers"):
        Trainer(**BARE, max_epochs=1).fit(module, TinyData())


def test_a_logger_need_not_be_derived_from_logger_if_it_can_do_what_one_can(
    tmp_path: Path, TinyModule: Any, TinyData: Any
) -> None:
    class Proxy:
        def __init__(self) -> None:
            self.logger = CSVLogger(tmp_path)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.logger, name)

    class Deaf:
        def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

    trainer = Trainer(**QUIET, max_epochs=1, logger=Proxy(), log_every_n_steps=1)  # type: ignore[arg-type]
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert list(tmp_path.rglob("metrics.csv"))
    with pytest.raises(TypeError, match="It has no log_hyperparams, log_graph"):
        Trainer(**QUIET, logger=Deaf())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forget the brackets"):
        Trainer(**QUIET, logger=CSVLogger)  # type: ignore[arg-type]
