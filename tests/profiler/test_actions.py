"""A run's actions: their names, how often each happens, and that nothing is there without a profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit import Callback, Trainer
from trainkit.callbacks import LearningRateFinder
from trainkit.profiler import Profiler, SimpleProfiler

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Stack(Profiler):
    """Insist on actions that nest, and remember in what."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.parents: dict[str, set[str | None]] = {}

    def start(self, action_name: str) -> None:
        self.parents.setdefault(action_name, set()).add(self.open[-1] if self.open else None)
        self.open.append(action_name)

    def stop(self, action_name: str) -> None:
        assert self.open.pop() == action_name


def counts(profiler: SimpleProfiler) -> dict[str, int]:
    assert profiler.current_actions == {}
    return {name: len(times) for name, times in profiler.recorded_durations.items()}


def test_every_part_of_a_run_has_its_action(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    class Watcher(Callback):
        state_key = "Watcher{own}"  # type: ignore[assignment]

        def on_train_batch_end(self, *_: Any) -> None:
            pass

        def on_fit_end(self, *_: Any) -> None:
            pass

    class Hooked(TinyModule):  # type: ignore[misc, valid-type]
        def on_train_epoch_start(self) -> None:
            pass

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch)

    profiler = SimpleProfiler()
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": True},
        default_root_dir=tmp_path, max_epochs=2, gradient_clip_val=1.0, callbacks=[Watcher()], profiler=profiler,
    )  # fmt: skip
    module, data = Hooked(), TinyData(num_batches=3)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    found = counts(profiler)
    strategy = f"[Strategy]{type(trainer.strategy).__name__}"
    expected = {
        "run_training_epoch": 2,
        "run_training_batch": 6,
        "save_checkpoint": 2,
        "[_TrainingEpochLoop].train_dataloader_next": 6,
        "[_EvaluationLoop].val_next": 6,
        "[_EvaluationLoop].test_next": 3,
        "[_PredictionLoop].predict_next": 3,
        "[LightningModule]Hooked.training_step": 6,
        "[LightningModule]Hooked.validation_step": 6,
        "[LightningModule]Hooked.test_step": 3,
        "[LightningModule]Hooked.predict_step": 3,
        "[LightningModule]Hooked.configure_optimizers": 1,
        "[LightningModule]Hooked.optimizer_zero_grad": 6,
        "[LightningModule]Hooked.configure_gradient_clipping": 6,
        "[LightningModule]Hooked.optimizer_step": 6,
        "[LightningModule]Hooked.on_train_epoch_start": 2,
        "[LightningDataModule]TinyData.setup": 3,
        "[LightningDataModule]TinyData.prepare_data": 3,
        "[LightningDataModule]TinyData.teardown": 3,
        "[LightningDataModule]TinyData.train_dataloader": 1,
        "[LightningDataModule]TinyData.predict_dataloader": 1,
        "[Callback]Watcher{own}.on_train_batch_end": 6,
        "[Callback]Watcher{own}.on_fit_end": 1,
        f"{strategy}.training_step": 6,
        f"{strategy}.validation_step": 6,
        f"{strategy}.backward": 6,
        f"{strategy}.optimizer_step": 6,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_actions_nest_as_the_work_does(TinyModule: Any, TinyData: Any) -> None:
    profiler = Stack()
    Trainer(**QUIET, max_epochs=1, profiler=profiler).fit(TinyModule(), TinyData())
    assert profiler.open == []
    assert profiler.parents["[LightningModule]TinyModule.training_step"] == {
        "[Strategy]SingleDeviceStrategy.training_step"
    }
    assert profiler.parents["[Strategy]SingleDeviceStrategy.training_step"] == {"run_training_batch"}
    assert profiler.parents["[LightningModule]TinyModule.optimizer_step"] == {"run_training_batch"}
    assert profiler.parents["[_TrainingEpochLoop].train_dataloader_next"] == {"run_training_epoch"}
    assert profiler.parents["[_EvaluationLoop].val_next"] == {"run_training_epoch"}
    assert profiler.parents["run_training_epoch"] == {None}


def test_an_optimizer_step_of_ones_own_and_manual_steps_are_seen(TinyModule: Any, TinyData: Any) -> None:
    class Own(TinyModule):  # type: ignore[misc, valid-type]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer.step(closure=optimizer_closure)

    class Manual(TinyModule):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    for module, name in ((Own(), "[LightningModule]Own.optimizer_step"), (Manual(), "optimizer_step")):
        profiler = SimpleProfiler()
        trainer = Trainer(**QUIET, max_epochs=1, profiler=profiler)
        trainer.fit(module, TinyData(num_batches=3))
        found = counts(profiler)
        assert (found[name], found["[Strategy]SingleDeviceStrategy.optimizer_step"]) == (3, 3)
        optimizer = trainer.optimizers[0]
        assert not optimizer._optimizer_step_pre_hooks  # a later run without the profiler does not see it
        assert not optimizer._optimizer_step_post_hooks


def test_a_failed_run_ends_its_actions_and_is_reported(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    class Fails(TinyModule):  # type: ignore[misc, valid-type]
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.trainer.global_step == 2:
                raise ZeroDivisionError

    profiler = SimpleProfiler(tmp_path, "times")
    trainer = Trainer(**QUIET, max_epochs=1, profiler=profiler)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Fails(), TinyData())
    assert counts(profiler)["run_training_batch"] == 3
    assert "run_training_batch" in (tmp_path / "fit-times.txt").read_text()
    trainer.fit(TinyModule(), TinyData())  # the next one is none the worse: it does the epoch's other six batches
    assert counts(profiler)["run_training_batch"] == 3 + 6


def test_the_rest_of_a_skipped_epoch_is_no_batch(TinyModule: Any, TinyData: Any) -> None:
    class Skips(TinyModule):  # type: ignore[misc, valid-type]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    profiler = SimpleProfiler()
    Trainer(**QUIET, max_epochs=2, profiler=profiler).fit(Skips(), TinyData())
    found = counts(profiler)
    assert (found["run_training_batch"], found["run_training_epoch"]) == (4, 2)


def test_several_validation_loaders_and_a_run_that_is_resumed_inside_an_epoch(
    TinyModule: Any, TinyData: Any, tmp_path: Path
) -> None:
    class TwoLoaders(TinyModule):  # type: ignore[misc, valid-type]
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

        def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    data = TinyData(num_batches=4)
    loaders = [data.val_dataloader(), data.val_dataloader()]
    first = Trainer(**QUIET, max_steps=2, profiler=SimpleProfiler())
    first.fit(TwoLoaders(), data.train_dataloader(), loaders)
    first.save_checkpoint(tmp_path / "inside.ckpt")
    profiler = SimpleProfiler()
    second = Trainer(**QUIET, max_epochs=1, profiler=profiler)
    second.fit(TwoLoaders(), data.train_dataloader(), loaders, ckpt_path=tmp_path / "inside.ckpt")
    found = counts(profiler)
    assert found["run_training_batch"] == 2
    assert found["[LightningModule]TwoLoaders.on_validation_batch_start"] == 8


def test_without_a_profiler_the_steps_are_called_as_they_are(TinyModule: Any, TinyData: Any) -> None:
    seen: list[Any] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            seen.append((trainer.actions, trainer.wrapped_step("training_step") == module.training_step))
            seen.append(trainer.sources.train.fetching)

    Trainer(**QUIET, max_steps=1, callbacks=Looks()).fit(TinyModule(), TinyData())
    assert seen == [(None, True), None]


def test_a_search_that_leaves_a_loop_in_the_middle_does_not_disturb(
    TinyModule: Any, TinyData: Any, tmp_path: Path
) -> None:
    profiler = Stack()
    trainer = Trainer(
        **QUIET, default_root_dir=tmp_path, max_epochs=1, profiler=profiler,
        callbacks=LearningRateFinder(num_training_steps=12),
    )  # fmt: skip
    trainer.fit(TinyModule(), TinyData())
    assert profiler.open == []
    assert "[Callback]LearningRateFinder.on_fit_start" in profiler.parents["run_training_epoch"]
