from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import StochasticWeightAveraging
from trainkit.errors import MisconfigurationException


class Net(Module):
    def __init__(self, seed: int = 0, norm: bool = False, schedule: str | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters()}, {"params": [*self.net[1:].parameters()], "lr": 0.05}]
        optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "interval": self.schedule}]


class Watch(Callback):
    """Keep what each epoch begins with, the learning rates it ends with, and save after some updates."""

    def __init__(self, *save_at: int) -> None:
        self.save_at = save_at
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.schedules: list[str] = []

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        self.weights.append(copy.deepcopy(module.state_dict()))

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        self.rates.append([round(group["lr"], 6) for group in trainer.optimizers[0].param_groups])
        self.schedules += [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.global_step in self.save_at:
            trainer.save_checkpoint(f"{trainer.global_step}.ckpt")


def data() -> Any:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


def fit(*callbacks: Callback, module: Net | None = None, ckpt_path: str | None = None, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        callbacks=list(callbacks), **{**quiet, "enable_checkpointing": False, "max_epochs": 5, **settings}
    )
    trainer.fit(module or Net(), data(), ckpt_path=ckpt_path)
    return trainer


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("start", "first"), [(3, 2), (1, 0), (0.6, 2), (0.0, 0), (5, 4), (1.0, 4)])
def test_training_ends_with_the_mean_of_what_the_last_epochs_began_with(start: Any, first: int) -> None:
    watch, module = Watch(), Net()
    callback = StochasticWeightAveraging(0.01, swa_epoch_start=start)
    fit(callback, watch, module=module)
    assert (callback.swa_start, callback.swa_end) == (first, 4)
    for name, value in module.state_dict().items():
        expected = torch.stack([weights[name] for weights in watch.weights[first:]]).mean(0)
        assert torch.allclose(value, expected, atol=1e-6), name
    assert int(callback.n_averaged) == 5 - first


def test_the_learning_rate_moves_to_the_one_asked_for() -> None:
    watch = Watch()
    fit(StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2, annealing_strategy="linear"), watch)
    assert watch.rates == [[0.1, 0.05], [0.055, 0.03], [0.01, 0.01], [0.01, 0.01], [0.01, 0.01]]


def test_each_group_can_have_its_own() -> None:
    watch = Watch()
    fit(StochasticWeightAveraging([0.2, 0.3], swa_epoch_start=1, annealing_epochs=0), watch)
    assert watch.rates == [[0.2, 0.3]] * 5


@pytest.mark.parametrize("schedule", [None, "epoch"])
def test_its_schedule_takes_the_place_of_the_modules(schedule: str | None) -> None:
    watch = Watch()
    fit(StochasticWeightAveraging(0.01, swa_epoch_start=3), watch, module=Net(schedule=schedule))
    assert watch.schedules == (["StepLR"] * 2 if schedule else []) + ["SWALR"] * 3


def test_a_schedule_by_steps_is_replaced_with_a_warning() -> None:
    watch = Watch()
    with pytest.warns(UserWarning, match="replaces StepLR"):
        fit(StochasticWeightAveraging(0.01, swa_epoch_start=2), watch, module=Net(schedule="step"))
    assert watch.schedules[1:] == ["SWALR"] * 4
    assert len(set(map(tuple, watch.rates[1:]))) == 4  # moved once an epoch


def test_an_averaging_function_of_the_users_is_asked() -> None:
    watch, module = Watch(), Net()
    fit(StochasticWeightAveraging(0.01, 3, avg_fn=lambda average, weights, n: weights), watch, module=module)
    assert equal(module.state_dict(), watch.weights[-1])


def test_batch_norm_is_measured_anew_with_the_averaged_weights() -> None:
    module, trainer_data = Net(norm=True), data()
    trainer = fit(StochasticWeightAveraging(0.01, 2), module=module)
    expected = copy.deepcopy(module)
    update_bn(([batch[0]] for batch in [*trainer_data]), expected.net)
    for name, value in module.state_dict().items():
        if "running" in name:
            assert torch.allclose(value, expected.state_dict()[name], atol=1e-6), name
    assert module.net[1].momentum == 0.1
    assert module.steps == 24  # five epochs, and once through the data
    assert (trainer.global_step, trainer.current_epoch, trainer.max_epochs) == (20, 5, 5)


def test_measuring_draws_no_random_number_and_logs_nothing() -> None:
    after = []
    for start in (2, 9):
        torch.manual_seed(3)
        trainer = fit(StochasticWeightAveraging(0.01, start), module=Net(norm=True))
        after.append(torch.rand(1).item())
        assert list(trainer.callback_metrics) == ["loss"]
    assert after[0] == after[1]


def test_with_manual_optimization_batch_norm_can_not_be_measured() -> None:
    module = Net(norm=True)
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization=False"):
        fit(StochasticWeightAveraging(0.1), module=module)


def test_a_run_that_ends_before_it_begins_keeps_its_weights() -> None:
    module, plain = Net(norm=True), Net(norm=True)
    callback = StochasticWeightAveraging(0.01, swa_epoch_start=9)
    fit(callback, module=module)
    fit(module=plain)
    assert equal(module.state_dict(), plain.state_dict())
    assert callback.n_averaged is None


@pytest.mark.parametrize("step", [2, 4, 6, 8, 10, 16, 18])
@pytest.mark.parametrize("schedule", [None, "epoch"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(step: int, schedule: str | None, norm: bool) -> None:
    def make() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(0.01, swa_epoch_start=3, annealing_epochs=3)

    whole, resumed = Net(norm=norm, schedule=schedule), Net(5, norm=norm, schedule=schedule)
    watch, seen = Watch(step), Watch()
    fit(make(), watch, module=whole)
    fit(make(), seen, module=resumed, ckpt_path=f"{step}.ckpt")
    assert equal(resumed.state_dict(), whole.state_dict())
    assert seen.rates == watch.rates[-len(seen.rates) :]


def test_a_run_that_ended_goes_on_with_the_weights_that_were_trained() -> None:
    whole, first, second = Net(), Net(), Net(seed=5)
    fit(StochasticWeightAveraging(0.01, 2), module=whole)
    fit(StochasticWeightAveraging(0.01, 2), module=first, max_epochs=3).save_checkpoint("ended.ckpt")
    assert equal(torch.load("ended.ckpt", weights_only=True)["state_dict"], first.state_dict())
    fit(StochasticWeightAveraging(0.01, 2), module=second, ckpt_path="ended.ckpt")
    assert equal(second.state_dict(), whole.state_dict())


def test_an_endless_run_is_averaged_when_it_stops() -> None:
    module, watch = Net(), Watch()
    fit(StochasticWeightAveraging(0.01, 2), watch, module=module, max_epochs=-1, max_steps=12)
    expected = torch.stack([weights["net.0.weight"] for weights in watch.weights[1:]]).mean(0)
    assert torch.allclose(module.net[0].weight, expected)


def test_a_stream_of_batches_is_gone_through_once_more() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(data().dataset)

    module = Net(norm=True)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=3, callbacks=[StochasticWeightAveraging(0.01, 2)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(Stream(), 4))
    assert int(module.net[1].num_batches_tracked) == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"swa_lrs": 0}, "swa_lrs"),
        ({"swa_lrs": 1}, "swa_lrs"),
        ({"swa_lrs": -0.1}, "swa_lrs"),
        ({"swa_lrs": [0.1, 0]}, "swa_lrs"),
        ({"swa_lrs": 0.1, "swa_epoch_start": 0}, "swa_epoch_start"),
        ({"swa_lrs": 0.1, "swa_epoch_start": 1.5}, "swa_epoch_start"),
        ({"swa_lrs": 0.1, "swa_epoch_start": "2"}, "swa_epoch_start"),
        ({"swa_lrs": 0.1, "annealing_epochs": -1}, "annealing_epochs"),
        ({"swa_lrs": 0.1, "annealing_strategy": "cosine"}, "annealing_strategy"),
        ({"swa_lrs": 0.1, "avg_fn": 1}, "avg_fn"),
        ({"swa_lrs": 0.1, "device": 0}, "device"),
    ],
)
def test_wrong_arguments_are_errors_at_construction(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(MisconfigurationException, match=named):
        StochasticWeightAveraging(**arguments)


def test_what_can_not_be_averaged_is_an_error_before_the_first_step() -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    class TwoSchedules(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [StepLR(optimizer, 1), StepLR(optimizer, 2)]

    for module, settings, message in (
        (Two(), {}, "one optimizer"),
        (TwoSchedules(), {}, "one lr scheduler"),
        (Net(), {"max_epochs": -1, "max_steps": 2}, "share of max_epochs"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            fit(StochasticWeightAveraging(0.1), module=module, **settings)
        assert module.steps == 0


def test_the_helpers_are_there_for_callbacks_derived_from_it() -> None:
    assert StochasticWeightAveraging.pl_module_contains_batch_norm(Net(norm=True))
    assert not StochasticWeightAveraging.pl_module_contains_batch_norm(Net())
    source, target = Net(1), Net(2)
    StochasticWeightAveraging.transfer_weights(source, target)
    assert equal(source.state_dict(), target.state_dict())
    count = torch.tensor(1)
    StochasticWeightAveraging.update_parameters(target, Net(3), count, StochasticWeightAveraging.avg_fn)
    assert torch.allclose(target.net[0].weight, (source.net[0].weight + Net(3).net[0].weight) / 2)
    assert count == 2
