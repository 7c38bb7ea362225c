"""LearningRateFinder as a callback: fit trains with the rate it found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import LearningRateFinder, LearningRateMonitor
from trainkit.loggers import CSVLogger

QUIET: dict[str, Any] = {
    "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False,
    "accelerator": "cpu",
}  # fmt: skip


class Rates(Callback):
    """Write down the learning rate of each update."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Module, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_fit_trains_with_the_rate_that_was_found(TinyModule: Any, TinyData: Any) -> None:
    finder, rates, module = LearningRateFinder(num_training_steps=30), Rates(), TinyModule()
    trainer = Trainer(max_epochs=2, callbacks=[rates, finder], **QUIET)
    trainer.fit(module, datamodule=TinyData())
    assert finder.optimal_lr is not None
    found = finder.optimal_lr.suggestion()
    assert module.lr == module.hparams.lr == found != 0.05
    assert rates.seen == [found] * 16  # of the search it heard nothing
    assert (trainer.global_step, trainer.current_epoch) == (16, 2)


def test_it_searches_first_wherever_it_is_listed(TinyModule: Any, TinyData: Any) -> None:
    class Early(Callback):
        lr: float | None = None

        def on_fit_start(self, trainer: Trainer, module: Module) -> None:
            self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    early, finder = Early(), LearningRateFinder(num_training_steps=20)
    trainer = Trainer(max_epochs=1, callbacks=[early, finder], **QUIET)
    assert trainer.callbacks[0] is finder
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert finder.optimal_lr is not None
    assert early.lr == finder.optimal_lr.suggestion()


@pytest.mark.parametrize("make", ["step", "chain"])
def test_a_schedule_starts_from_the_rate_that_was_found(TinyModule: Any, TinyData: Any, make: str) -> None:
    class Scheduled(TinyModule):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            schedules = torch.optim.lr_scheduler
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            schedule: Any = schedules.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
            if make == "chain":
                schedule = schedules.SequentialLR(optimizer, [schedule, schedules.StepLR(optimizer, 1)], [10])
            return [optimizer], [schedule]

    finder, rates = LearningRateFinder(num_training_steps=20), Rates()
    Trainer(max_epochs=3, callbacks=[rates, finder], limit_train_batches=1, **QUIET).fit(
        Scheduled(), datamodule=TinyData()
    )
    assert finder.optimal_lr is not None
    found = finder.optimal_lr.suggestion()
    assert found is not None
    assert rates.seen == [found, found / 2, found / 4]


def test_without_update_attr_it_only_looks(TinyModule: Any, TinyData: Any) -> None:
    weights = []
    finder = LearningRateFinder(update_attr=False, num_training_steps=20, early_stop_threshold=None)
    for callbacks in ([], [finder]):
        torch.manual_seed(0)
        module = TinyModule()
        Trainer(max_epochs=2, callbacks=callbacks, **QUIET).fit(module, datamodule=TinyData(shuffle=True))  # type: ignore[arg-type]
        assert module.lr == 0.05
        weights.append(module.line.weight.detach().clone())
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["loss"]) == 20
    assert finder.optimal_lr.suggestion() is not None
    assert torch.equal(*weights)


def test_a_subclass_searches_again_at_milestones_in_the_middle_of_a_run(TinyModule: Any, TinyData: Any) -> None:
    class AtMilestones(LearningRateFinder):
        def __init__(self, milestones: tuple[int, ...], **settings: Any) -> None:
            super().__init__(**settings)
            self.milestones, self.found, self.losses = milestones, {}, []

        def on_fit_start(self, trainer: Trainer, module: Module) -> None:
            pass

        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            if trainer.current_epoch in self.milestones:
                before = (trainer.global_step, trainer.current_epoch)
                self.lr_find(trainer, module)
                assert (trainer.global_step, trainer.current_epoch) == before
                assert self.optimal_lr is not None
                self.found[trainer.current_epoch] = self.optimal_lr.suggestion()
                self.losses.append(self.optimal_lr.results["loss"][0])

    finder, rates = AtMilestones((0, 2), num_training_steps=25), Rates()
    monitor = LearningRateMonitor()
    settings = QUIET | {"logger": CSVLogger(".")}
    Trainer(max_epochs=4, callbacks=[finder, rates, monitor], log_every_n_steps=1, **settings).fit(
        TinyModule(), datamodule=TinyData()
    )
    assert list(finder.found) == [0, 2]
    assert finder.losses[1] < finder.losses[0]  # the second search began from what was learned by then
    assert None not in finder.found.values()
    assert rates.seen == [finder.found[0]] * 16 + [finder.found[2]] * 16
    assert len(finder.optimal_lr.results["lr"]) == 25  # type: ignore[union-attr]


def test_a_wrong_mode_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="mode must be"):
        LearningRateFinder(mode="cubic")
    assert LearningRateFinder(mode="LINEAR").optimal_lr is None
