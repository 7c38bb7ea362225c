"""A rehearsal leaves no trace, whatever happens inside."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.loggers import CSVLogger
from trainkit.optim import LRSchedulerConfig
from trainkit.random import random_state
from trainkit.rehearsal import Updates, loaders_in, rehearsal

QUIET: dict[str, Any] = {
    "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False,
    "accelerator": "cpu",
}  # fmt: skip


class Counting(nn.Module):
    """Keep state as metric libraries do: in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())
        self.values: list[torch.Tensor] = []
        self.updates = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = self.total + x.sum().detach()
        self.values.append(x.detach())
        self.updates += 1
        return x


class Busy(Module):
    """A module whose training changes all that can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.tied = self.net[3]
        self.count = Counting()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.mean = torch.zeros(3)
        self.order = torch.Generator().manual_seed(5)
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        self.calls += 1
        self.seen = self.seen + 1
        self.mean.add_(x.mean(0))
        torch.rand((), generator=self.order)
        random.random(), np.random.rand()
        self.net[0].bias.requires_grad_(False)
        self.net[1].eval()
        loss = nn.functional.mse_loss(self.count(self.net(x)), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def train_dataloader(self) -> Any:
        x = torch.arange(48.0).reshape(16, 3)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4, shuffle=True, generator=self.order)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def state_of(trainer: Trainer) -> Any:
    """Everything there is to see of a run, by value."""
    module = trainer.module
    return copy.deepcopy(
        {
            "weights": dict(module.named_parameters()),
            "buffers": dict(module.named_buffers()),
            "gradients": {name: parameter.grad for name, parameter in module.named_parameters()},
            "learns": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
            "modes": {name: part.training for name, part in module.named_modules()},
            "plain": [module.mean, module.count.total, module.count.values, module.count.updates],
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "progress": trainer.progress,
            "metrics": trainer.metrics.state_dict(),
            "precision": trainer.precision_plugin.state_dict(),
            "random": random_state(),
            "order": module.order.get_state(),
        }
    )


def assert_same(one: Any, other: Any, path: str = "state") -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), path
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


class Rehearse(Callback):
    """Rehearse at the start of each epoch, and compare what there is before and after."""

    def __init__(self, fail: bool = False) -> None:
        self.fail, self.compared = fail, 0

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        from trainkit import loop

        attributes, before = dict(vars(trainer)), state_of(trainer)
        objects = dict(module.named_parameters())
        try:
            with rehearsal(trainer, [Updates(6, trainer.interruption)]):
                trainer.sources.load_train()
                loop.fit(trainer)
                assert trainer.global_step == before["progress"].step + 6
                if self.fail:
                    raise RuntimeError("in the middle")
        except RuntimeError:
            assert self.fail
        assert vars(trainer).keys() == attributes.keys()
        assert all(vars(trainer)[name] is value for name, value in attributes.items())
        assert all(parameter is objects[name] for name, parameter in module.named_parameters())
        assert_same(before, state_of(trainer))
        self.compared += 1


@pytest.mark.parametrize("fail", [False, True])
def test_everything_is_what_it_was_before_the_first_step_and_in_the_middle_of_training(fail: bool) -> None:
    torch.manual_seed(0)
    callback = Rehearse(fail)
    module = Busy()
    Trainer(max_epochs=3, callbacks=callback, **QUIET).fit(module)
    assert callback.compared == 3
    assert module.calls == 3 * 4 + 3 * 6  # what a module counts for itself is its own


def test_a_run_with_rehearsals_ends_with_the_weights_of_one_without() -> None:
    weights = []
    for callbacks in ([], [Rehearse()], [Rehearse(fail=True)]):
        torch.manual_seed(0)
        module = Busy()
        Trainer(max_epochs=2, callbacks=callbacks, **QUIET).fit(module)  # type: ignore[arg-type]
        weights.append(module.state_dict())
    assert_same(weights[0], weights[1])
    assert_same(weights[0], weights[2])


def test_a_scaler_that_was_left_in_the_middle_of_a_step_starts_anew(TinyModule: Any, TinyData: Any) -> None:
    trainer = Trainer(max_epochs=1, precision="16-mixed", **QUIET)
    seen = []

    class Interrupt(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            before = copy.deepcopy(trainer.precision_plugin.state_dict())
            with pytest.raises(RuntimeError, match="between"), rehearsal(trainer, []):  # noqa: PT012
                trainer.precision_plugin.scaler.scale(module.line.weight.sum()).backward()  # type: ignore[attr-defined,operator]
                trainer.precision_plugin.unscale(trainer.optimizers[0])
                raise RuntimeError("between unscaling and the step")
            assert trainer.precision_plugin.state_dict() == before
            seen.append(module.line.weight.grad)

    trainer.callbacks.append(Interrupt())
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert seen == [None]
    assert trainer.global_step == 8


def test_loggers_inside_know_their_folder_and_write_nothing(TinyModule: Any, TinyData: Any) -> None:
    from trainkit import loop

    logger = CSVLogger(".", version=3)
    written = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            with rehearsal(trainer, [Updates(2, trainer.interruption)]):
                assert trainer.logger is not None
                assert (trainer.logger.log_dir, trainer.logger.version) == (logger.log_dir, 3)
                trainer.logger.experiment.add_histogram("anything", 1)
                trainer.sources.load_train()
                loop.fit(trainer)
            written.append(dict(trainer.logged_metrics))

    settings = QUIET | {"logger": logger, "log_every_n_steps": 1}
    Trainer(max_epochs=1, callbacks=Look(), **settings).fit(TinyModule(), datamodule=TinyData())
    assert written == [{}]


def test_schedules_inside_can_be_stepped_by_hand_and_stay(TinyModule: Any, TinyData: Any) -> None:
    class Manual(TinyModule):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.lr_schedulers().step()
            self.rates.append(self.lr_schedulers().get_last_lr()[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            from trainkit import loop

            with rehearsal(trainer, [Updates(3, trainer.interruption)]):
                trainer.sources.load_train()
                loop.fit(trainer)

    module = Manual()
    module.rates = []
    Trainer(max_epochs=1, callbacks=Look(), **QUIET).fit(module, datamodule=TinyData(num_batches=2))
    assert module.rates == [1.0, 1.0, 1.0, 0.5, 0.25]


@pytest.mark.filterwarnings("ignore:a batch is skipped")
def test_updates_that_give_no_loss_count_and_epochs_that_are_skipped_end_it(TinyModule: Any, TinyData: Any) -> None:
    from trainkit import loop

    class Nothing(TinyModule):  # type: ignore[misc]
        skips = False

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.skips else None

        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    counts = []

    class Look(Callback):
        def on_fit_start(self, trainer: Trainer, module: Module) -> None:
            for module.skips in (False, True):  # type: ignore[attr-defined]
                updates = Updates(5, trainer.interruption)
                with rehearsal(trainer, [updates]):
                    trainer.sources.load_train()
                    loop.fit(trainer)
                counts.append(updates.count)

    Trainer(max_epochs=1, callbacks=Look(), **QUIET).fit(Nothing(), datamodule=TinyData())
    assert counts == [5, 0]


def test_loaders_with_a_state_go_on_where_they_were(TinyModule: Any) -> None:
    class Stream:
        """Batches that go on where the last epoch stopped."""

        def __init__(self) -> None:
            self.position = 7

        def __iter__(self) -> Any:
            for _ in range(4):
                self.position += 1
                yield torch.ones(2, 3), torch.full((2, 1), float(self.position))

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    from trainkit import loop

    positions = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            with rehearsal(trainer, [Updates(9, trainer.interruption)]):
                trainer.sources.load_train()
                loop.fit(trainer)
                positions.append(stream.position)
            positions.append(stream.position)

    stream = Stream()
    Trainer(max_epochs=1, callbacks=Look(), **QUIET).fit(TinyModule(), stream)
    assert positions[0] > 16
    assert positions[1] == 7
    assert stream.position == 11


def test_loaders_are_found_in_lists_dicts_and_combinations() -> None:
    class Combined:
        flattened = ("c", "d")

    assert list(loaders_in(["a", {"x": "b", "y": Combined()}, None])) == ["a", "b", "c", "d"]


def test_a_stand_in_for_a_schedule_reads_like_it() -> None:
    from trainkit.rehearsal import Still

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    still = Still(torch.optim.lr_scheduler.StepLR(optimizer, 1))
    still.step()
    assert LRSchedulerConfig(still).scheduler.get_last_lr() == [2.0]
    assert copy.copy(still).last_epoch == 0
