from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import EMAWeightAveraging, WeightAveraging
from trainkit.errors import MisconfigurationException


class Net(Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.validated: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(copy.deepcopy(self.state_dict()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Watch(Callback):
    """Keep the weights after each update, and save where asked to."""

    def __init__(self, *save_at: int) -> None:
        self.save_at = save_at
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(copy.deepcopy(module.state_dict()))

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.global_step in self.save_at:
            trainer.save_checkpoint(f"{trainer.global_step}.ckpt")
            trainer.save_checkpoint(f"{trainer.global_step}-weights.ckpt", weights_only=True)


def data(batches: int = 4) -> Any:
    x = torch.randn(4 * batches, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


def fit(*callbacks: Callback, module: Net | None = None, ckpt_path: str | None = None, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": 2}
    trainer = Trainer(callbacks=list(callbacks), **{**quiet, **settings})
    trainer.fit(module or Net(), data(), data(1), ckpt_path=ckpt_path)
    return trainer


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[key].double(), other[key].double()) for key in one)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def mean(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name].double() for each in weights]).mean(0) for name in weights[0]}


class AtEpochs(WeightAveraging):
    def __init__(self, *epochs: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epochs = epochs

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx in self.epochs


def test_training_ends_with_the_mean_of_the_weights_after_every_update() -> None:
    watch, module = Watch(), Net()
    fit(WeightAveraging(), watch, module=module, max_epochs=1)
    expected = mean(watch.weights)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[name], atol=1e-6), name


def test_without_buffers_they_are_the_newest() -> None:
    watch, module = Watch(), Net()
    fit(WeightAveraging(use_buffers=False), watch, module=module)
    assert torch.equal(module.net[1].running_mean, watch.weights[-1]["net.1.running_mean"])
    assert not torch.equal(module.net[0].weight, watch.weights[-1]["net.0.weight"])


def test_the_exponential_average_moves_by_one_minus_decay() -> None:
    watch, module = Watch(), Net()
    fit(EMAWeightAveraging(decay=0.6), watch, module=module, max_epochs=1)
    average = watch.weights[0]["net.0.weight"]
    for weights in watch.weights[1:]:
        average = 0.6 * average + 0.4 * weights["net.0.weight"]
    assert torch.allclose(module.net[0].weight, average)


@pytest.mark.parametrize("kind", ["avg_fn", "multi_avg_fn"])
def test_a_function_of_the_users_averages(kind: str) -> None:
    function = get_ema_avg_fn(0.6) if kind == "avg_fn" else get_ema_multi_avg_fn(0.6)
    modules = Net(), Net()
    fit(WeightAveraging(**{kind: function}), module=modules[0])
    fit(EMAWeightAveraging(decay=0.6), module=modules[1])
    assert close(modules[0].state_dict(), modules[1].state_dict())


def test_should_update_is_asked_after_each_update_and_each_epoch() -> None:
    asked: list[tuple[int | None, int | None]] = []

    class Asking(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            asked.append((step_idx, epoch_idx))
            return True

    fit(Asking(), accumulate_grad_batches=2)
    assert asked == [(0, None), (1, None), (None, 0), (2, None), (3, None), (None, 1)]


@pytest.mark.parametrize(
    ("settings", "steps", "epochs"),
    [
        ({}, [0, 1, 2, 3, 4, 5], []),
        ({"update_every_n_steps": 2}, [0, 2, 4], []),
        ({"update_every_n_steps": 2, "update_starting_at_step": 3}, [4], []),
        ({"update_every_n_steps": 0}, [], []),
        ({"update_every_n_steps": 0, "update_starting_at_epoch": 2}, [], [2, 3]),
        ({"update_every_n_steps": 5, "update_starting_at_epoch": 3}, [0, 5], [3]),
    ],
)
def test_the_exponential_average_is_updated_when_asked_to(
    settings: dict[str, int], steps: list[int], epochs: list[int]
) -> None:
    callback = EMAWeightAveraging(**settings)  # type: ignore[arg-type]
    assert [step for step in range(6) if callback.should_update(step_idx=step)] == steps
    assert [epoch for epoch in range(4) if callback.should_update(epoch_idx=epoch)] == epochs
    assert not callback.should_update()


def test_validation_sees_the_average_and_training_goes_on_with_the_weights() -> None:
    watch, module, plain = Watch(), Net(), Watch()
    fit(WeightAveraging(), watch, module=module)
    fit(plain)
    assert all(equal(*pair) for pair in zip(watch.weights, plain.weights, strict=True))
    seen = module.validated[0]["net.0.weight"]
    assert torch.allclose(seen.double(), mean(watch.weights[:4])["net.0.weight"], atol=1e-6)


def test_until_there_is_an_average_the_module_is_used_as_it_is() -> None:
    module, plain = Net(), Net()
    fit(AtEpochs(9), module=module)
    fit(module=plain)
    assert equal(module.state_dict(), plain.state_dict())
    assert all(equal(*pair) for pair in zip(module.validated, plain.validated, strict=True))


def test_a_checkpoint_has_the_average_where_the_weights_are() -> None:
    watch = Watch(8)
    module = Net()
    fit(AtEpochs(0, 1), watch, module=module)
    checkpoint = torch.load("8.ckpt", weights_only=True)
    assert equal(checkpoint["state_dict"], module.state_dict())
    assert equal(checkpoint["current_model_state"], watch.weights[-1])
    assert {name: int(value) for name, value in checkpoint["averaging_state"].items()} == {"n_averaged": 2}
    assert equal(Net.load_from_checkpoint("8.ckpt").state_dict(), module.state_dict())


def test_a_checkpoint_of_weights_only_has_only_the_average() -> None:
    module = Net()
    fit(AtEpochs(1), Watch(8), module=module)
    checkpoint = torch.load("8-weights.ckpt", weights_only=True)
    assert equal(checkpoint["state_dict"], module.state_dict())
    assert not {"current_model_state", "averaging_state", "optimizer_states"} & checkpoint.keys()


@pytest.mark.parametrize("make", [WeightAveraging, EMAWeightAveraging, lambda: AtEpochs(0, 2), lambda: AtEpochs(2)])
@pytest.mark.parametrize("step", [2, 4, 7])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(make: Any, step: int) -> None:
    whole, resumed = Net(), Net(seed=5)
    fit(make(), Watch(step), module=whole, max_epochs=3, val_check_interval=2)
    fit(make(), module=resumed, max_epochs=3, val_check_interval=2, ckpt_path=f"{step}.ckpt")
    assert equal(resumed.state_dict(), whole.state_dict())


def test_a_run_that_ended_goes_on_with_the_weights_that_were_trained() -> None:
    whole, first, second = Net(), Net(), Net(seed=5)
    fit(WeightAveraging(), module=whole, max_epochs=3)
    trainer = fit(WeightAveraging(), module=first, max_epochs=2)
    trainer.save_checkpoint("ended.ckpt")
    assert equal(torch.load("ended.ckpt", weights_only=True)["state_dict"], first.state_dict())
    fit(WeightAveraging(), module=second, max_epochs=3, ckpt_path="ended.ckpt")
    assert equal(second.state_dict(), whole.state_dict())


def test_a_checkpoint_without_an_average_starts_one_and_says_so() -> None:
    fit(Watch(4), max_epochs=1)
    module = Net()
    with pytest.warns(UserWarning, match="no average of weights"):
        fit(AtEpochs(1), module=module, ckpt_path="4.ckpt")
    plain = Net()
    fit(module=plain)
    assert equal(module.state_dict(), plain.state_dict())  # the average of one


def test_an_error_in_validation_leaves_the_module_with_the_trained_weights() -> None:
    class Fails(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("on purpose")

    watch, module = Watch(), Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(WeightAveraging(), watch, module=module)
    assert equal(module.state_dict(), watch.weights[-1])


def test_another_kind_of_run_does_not_touch_the_average() -> None:
    module = Net()
    trainer = fit(WeightAveraging(), Watch(8), module=module)
    average = copy.deepcopy(module.state_dict())
    trainer.validate(module, data(1), verbose=False)
    assert equal(module.state_dict(), average)
    trainer.validate(module, data(1), ckpt_path="8.ckpt", verbose=False)
    assert equal(module.state_dict(), average)


def test_the_module_may_make_its_layers_in_configure_model() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = Net().net

    late, early = Late(), Net()
    fit(WeightAveraging(), module=late)
    fit(WeightAveraging(), module=early)
    assert equal(late.state_dict(), early.state_dict())


@pytest.mark.parametrize("name", ["avg_fn", "multi_avg_fn", "averaging"])
def test_the_exponential_average_takes_no_other_function(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        EMAWeightAveraging(**{name: max})


def test_wrong_arguments_are_errors_at_construction() -> None:
    with pytest.raises(TypeError, match="did you mean 'avg_fn'"):
        WeightAveraging(avgfn=max)
    with pytest.raises(MisconfigurationException, match="not both"):
        WeightAveraging(avg_fn=max, multi_avg_fn=max)
    for decay in (-0.1, 1.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            EMAWeightAveraging(decay=decay)


def test_parameters_that_appear_during_training_are_an_error_that_names_them() -> None:
    class Grow(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
            if trainer.current_epoch == 1:
                module.added = nn.Linear(1, 1)

    with pytest.raises(MisconfigurationException, match=r"added\.bias"):
        fit(Grow(), WeightAveraging())


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_the_average_is_kept_where_it_was_asked_to_be(device: str | None) -> None:
    module, on_cpu = Net(), Net()
    callback = WeightAveraging(device=device)
    fit(callback, module=module, accelerator="cuda")
    fit(WeightAveraging(), module=on_cpu)
    assert all(torch.allclose(a.cpu().float(), b.float(), atol=1e-3) for a, b in
               zip(module.state_dict().values(), on_cpu.state_dict().values(), strict=True))  # fmt: skip
