from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import GradientAccumulationScheduler
from trainkit.errors import MisconfigurationException


class Watch(Callback):
    def __init__(self, *save_at: int) -> None:
        self.save_at = save_at
        self.steps: list[int] = []
        self.factors: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        self.steps.append(trainer.global_step)
        self.factors.append(trainer.accumulate_grad_batches)

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.progress.total_batch in self.save_at:
            trainer.save_checkpoint(f"{trainer.progress.total_batch}.ckpt")


@pytest.fixture
def fit(TinyModule: Any, TinyData: Any) -> Any:
    def run(*callbacks: Callback, module: Any = None, ckpt_path: str | None = None, **settings: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(
            callbacks=list(callbacks), **{**quiet, "enable_checkpointing": False, "max_epochs": 4, **settings}
        )
        module = module or TinyModule()
        trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt_path)
        return module, trainer

    return run


@pytest.mark.parametrize(
    ("scheduling", "factors", "steps"),
    [
        ({0: 2}, [2, 2, 2, 2], [4, 8, 12, 16]),
        ({1: 3}, [1, 3, 3, 3], [8, 11, 14, 17]),
        ({0: 8, 2: 4, 3: 1}, [8, 8, 4, 1], [1, 2, 4, 12]),
        ({9: 4}, [1, 1, 1, 1], [8, 16, 24, 32]),
    ],
)
def test_each_epoch_has_the_factor_of_the_last_one_named(
    fit: Any, scheduling: dict[int, int], factors: list[int], steps: list[int]
) -> None:
    watch, callback = Watch(), GradientAccumulationScheduler(scheduling)
    fit(callback, watch)
    assert (watch.factors, watch.steps) == (factors, steps)
    assert [callback.get_accumulate_grad_batches(epoch) for epoch in range(4)] == factors
    assert callback.going_to_accumulate_grad_batches() == (max(scheduling.values()) > 1)


def test_one_factor_is_the_trainers_own(fit: Any) -> None:
    scheduled, _ = fit(GradientAccumulationScheduler({0: 4}))
    plain, _ = fit(accumulate_grad_batches=4)
    assert torch.equal(scheduled.line.weight, plain.line.weight)


def test_the_dict_is_left_as_it_was_given() -> None:
    scheduling = {3: 2}
    callback = GradientAccumulationScheduler(scheduling)
    assert scheduling == {3: 2}
    assert (callback.scheduling, callback.epochs) == ({0: 1, 3: 2}, [0, 3])


@pytest.mark.parametrize("batch", [8, 10, 16, 20])
def test_a_run_resumed_inside_an_epoch_goes_on_with_its_factor(fit: Any, TinyModule: Any, batch: int) -> None:
    whole, trainer = fit(GradientAccumulationScheduler({1: 2, 2: 4}), Watch(batch))
    resumed, run = fit(GradientAccumulationScheduler({1: 2, 2: 4}), ckpt_path=f"{batch}.ckpt")
    assert torch.equal(resumed.line.weight, whole.line.weight)
    assert run.global_step == trainer.global_step


def test_a_trainer_may_fit_twice(fit: Any, TinyModule: Any, TinyData: Any) -> None:
    _, trainer = fit(GradientAccumulationScheduler({1: 4}), max_epochs=2)
    trainer.max_epochs = 3
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert trainer.accumulate_grad_batches == 4


def test_the_trainers_own_factor_beside_it_is_an_error(fit: Any) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches=2"):
        fit(GradientAccumulationScheduler({0: 4}), accumulate_grad_batches=2)


def test_with_manual_optimization_it_is_an_error(fit: Any, TinyModule: Any) -> None:
    module = TinyModule()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="automatic_optimization=False"):
        fit(GradientAccumulationScheduler({0: 4}), module=module)


def test_a_step_of_the_modules_own_is_told_when_it_is_called(fit: Any, TinyModule: Any) -> None:
    class Own(TinyModule):  # type: ignore[misc]
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="optimizer_zero_grad is called once for each update"):
        fit(GradientAccumulationScheduler({0: 4}), module=Own(), max_epochs=1)


@pytest.mark.parametrize("scheduling", [{}, None, 4, [2]])
def test_what_is_no_schedule_is_a_type_error(scheduling: Any) -> None:
    with pytest.raises(TypeError, match="must be a dict of epochs and factors"):
        GradientAccumulationScheduler(scheduling)


@pytest.mark.parametrize("scheduling", [{0.5: 2}, {"1": 2}, {-1: 2}, {0: 0}, {0: 1.5}, {0: "2"}, {2: Tensor}])
def test_epochs_and_factors_are_whole_numbers(scheduling: Any) -> None:
    with pytest.raises(MisconfigurationException, match="must be an int from"):
        GradientAccumulationScheduler(scheduling)
