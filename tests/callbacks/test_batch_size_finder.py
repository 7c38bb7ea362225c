"""BatchSizeFinder as a callback: the run goes on with the size it found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import BatchSizeFinder
from trainkit.errors import MisconfigurationException

QUIET: dict[str, Any] = {
    "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False,
    "accelerator": "cpu",
}  # fmt: skip


class Sizes(Callback):
    """Write down how large the batches of a run are."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        self.seen.append(len(batch[0]))

    def on_test_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append(len(batch[0]))

    def on_validation_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append(len(batch[0]))

    def on_predict_batch_start(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append(len(batch))


@pytest.fixture(name="Limited")
def limited_module(TinyModule: Any) -> Any:
    class Limited(TinyModule):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 10:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
            return super().forward(x)  # type: ignore[no-any-return]

    return Limited


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_run_goes_on_with_the_size_that_was_found(Limited: Any, TinyData: Any, stage: str) -> None:
    finder, sizes, data = BatchSizeFinder(steps_per_trial=1), Sizes(), TinyData()
    trainer = Trainer(max_epochs=1, callbacks=[sizes, finder], num_sanity_val_steps=0, limit_val_batches=1.0, **QUIET)
    result = getattr(trainer, stage)(Limited(), datamodule=data)
    assert finder.optimal_batch_size == data.batch_size == 8
    assert sizes.seen == [8] * (8 if stage == "fit" else 4)  # fit validates, too
    if stage == "predict":
        assert sum(map(len, result)) == 32
    assert trainer.global_step == (4 if stage == "fit" else 0)


def test_validation_inside_fit_has_its_own_limits_again(TinyModule: Any, TinyData: Any) -> None:
    finder = BatchSizeFinder(steps_per_trial=2, max_trials=1)
    trainer = Trainer(max_epochs=1, callbacks=finder, num_sanity_val_steps=0, **QUIET)
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert trainer.num_val_batches[0] == len(trainer.val_dataloaders) == 16


def test_loaders_that_were_asked_for_early_are_asked_for_again(Limited: Any, TinyData: Any) -> None:
    class Planning(Limited):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == 8
            return super().configure_optimizers()

    sizes = Sizes()
    trainer = Trainer(max_epochs=1, callbacks=[BatchSizeFinder(steps_per_trial=1), sizes], limit_val_batches=0, **QUIET)
    trainer.fit(Planning(), datamodule=TinyData())
    assert sizes.seen == [8] * 4


def test_a_subclass_searches_again_at_milestones(TinyModule: Any, TinyData: Any) -> None:
    class AtMilestones(BatchSizeFinder):
        def on_fit_start(self, trainer: Trainer, module: Module) -> None:
            pass

        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            if trainer.current_epoch in (0, 2):
                self._max_trials = 1 + trainer.current_epoch
                self.scale_batch_size(trainer, module)

    sizes = Sizes()
    callbacks = [AtMilestones(steps_per_trial=1), sizes]
    trainer = Trainer(max_epochs=3, callbacks=callbacks, limit_val_batches=0, limit_train_batches=2, **QUIET)
    trainer.fit(TinyModule(), datamodule=TinyData(shuffle=True))
    assert sizes.seen == [2, 2, 2, 2, 8, 8]


def test_loaders_made_after_the_modules_setup_are_looked_at_then(TinyModule: Any, TinyData: Any) -> None:
    class Late(TinyModule):  # type: ignore[misc]
        batch_size = 1

        def setup(self, stage: str) -> None:
            self.data = TinyData()

        def test_dataloader(self) -> Any:
            self.data.batch_size = self.batch_size
            return [self.data.test_dataloader()] * self.number

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    finder, module = BatchSizeFinder(max_trials=2, steps_per_trial=1), Late()
    module.number = 1
    Trainer(callbacks=finder, **QUIET).test(module, verbose=False)
    assert module.batch_size == 4
    module.number = 2
    with pytest.raises(MisconfigurationException, match="several test loaders"):
        Trainer(callbacks=finder, **QUIET).test(module, verbose=False)


def test_settings_that_can_not_work_are_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="mode must be"):
        BatchSizeFinder(mode="triple")
    for margin in (-0.1, 1.0):
        with pytest.raises(ValueError, match="margin must be"):
            BatchSizeFinder(margin=margin)
    assert BatchSizeFinder(init_val=16).optimal_batch_size == 16
