"""Fused optimizer kernels where nobody chose: which groups get them, the same updates, other runs' checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import BaseFinetuning, ModelCheckpoint

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 2,
}


class Net(Module):
    def __init__(self, make: Callable[[Any], Optimizer] = lambda parameters: Adam(parameters, lr=0.01)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 1))
        self.make = make

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def loader() -> DataLoader[Any]:
    random = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(24, 18, generator=random), torch.randn(24, 1, generator=random)), 4)


class Ways(Callback):
    """Notes how groups are updated at the end of a run: after it, optimizers are as they were made."""

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.fused = [group.get("fused") for optimizer in trainer.optimizers for group in optimizer.param_groups]


def trained(module: Module, **settings: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, **settings, "callbacks": [*settings.get("callbacks", []), Ways()]})
    trainer.fit(module, loader())
    return trainer


def fused(trainer: Trainer) -> list[Any]:
    return next(callback.fused for callback in trainer.callbacks if isinstance(callback, Ways))


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def by_hand(module: Net, fused: bool | None = None) -> list[Tensor]:
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["fused"] = fused
    for batch in [*loader(), *loader()]:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    return weights(module)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.01),
    "momentum": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_open_choice_is_fused_and_is_the_update_of_torchs_fused_loop(name: str) -> None:
    module = Net(MAKERS[name])
    assert fused(trained(module)) == [None if name == "sgd" else True]  # without momentum there is nothing to gain
    assert all(map(torch.equal, weights(module), by_hand(Net(MAKERS[name]), fused=True)))
    for one, other in zip(weights(module), by_hand(Net(MAKERS[name])), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MAKERS)
def test_turned_off_the_update_is_that_of_torchs_plain_loop_to_the_last_bit(name: str) -> None:
    module = Net(MAKERS[name])
    assert fused(trained(module, fused_optimizers=False)) == [None]
    assert all(map(torch.equal, weights(module), by_hand(Net(MAKERS[name]))))


@pytest.mark.gpu
def test_by_default_a_run_on_an_accelerator_is_fused() -> None:
    assert fused(trained(Net(), accelerator="gpu")) == [True]


class MySGD(SGD):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: SGD(parameters, lr=0.01, foreach=True),
        lambda parameters: SGD(parameters, lr=0.01, foreach=False),
        lambda parameters: Adam(parameters, lr=0.01, fused=False),
        lambda parameters: Adam(parameters, lr=torch.tensor(0.01)),
        lambda parameters: MySGD(parameters, lr=0.01),
        lambda parameters: RMSprop(parameters, lr=0.01),
    ],
)
def test_what_the_user_chose_or_torch_can_t_fuse_stays_as_it_is(make: Callable[[Any], Optimizer]) -> None:
    module = Net(make)
    trainer = trained(module)
    group, before = trainer.optimizers[0].param_groups[0], make(Net().parameters()).param_groups[0]
    assert [group.get(way) for way in ("fused", "foreach")] == [before.get(way) for way in ("fused", "foreach")]


class Words(Module):
    def __init__(self, sparse: bool, declared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 3, sparse=sparse and declared)
        self.sparse, self.declared = sparse, declared
        self.line = nn.Linear(3, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        indices = batch[0][:, :4].abs().long() % 10
        if self.sparse and not self.declared:
            words = nn.functional.embedding(indices, self.words.weight, sparse=True)
        else:
            words = self.words(indices)
        return self.line(words).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return SGD([{"params": p} for p in (self.words.parameters(), self.line.parameters())], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("declared", [True, False])
def test_sparse_gradients_keep_their_update(declared: bool) -> None:
    dense, module = Words(sparse=False), Words(sparse=True, declared=declared)
    trained(dense)
    assert fused(trained(module)) == [None, True]
    for one, other in zip(weights(module), weights(dense), strict=True):
        torch.testing.assert_close(one, other)


class Replaced(Net):
    """Gives its parameters gradients that lie in memory in another order, from the second batch on."""

    def on_after_backward(self) -> None:
        weight = self.layers[3].weight
        assert weight.grad is not None
        if self.trainer.batch_idx:
            padded = torch.zeros(1, 24)
            padded[:, ::2] = weight.grad
            weight.grad = padded[:, ::2]


def test_a_gradient_that_lies_otherwise_than_its_parameter_is_updated_right() -> None:
    module, plain = Replaced(MAKERS["momentum"]), Net(MAKERS["momentum"])
    assert fused(trained(module)) == [None]
    trained(plain)
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)


class Strided(Net):
    def __init__(self) -> None:
        super().__init__(MAKERS["momentum"])
        self.layers[3].weight = nn.Parameter(torch.ones(1, 24)[:, ::2])


def test_a_parameter_with_gaps_in_memory_is_left_to_torch() -> None:
    module, plain = Strided(), Strided()
    assert fused(trained(module)) == [None]
    trained(plain, fused_optimizers=False)
    assert all(map(torch.equal, weights(module), weights(plain)))


def test_parameters_of_several_dtypes_are_fused_together() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers[3].double()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.layers[3](self.layers[:3](batch[0]).double()).mean()

    assert fused(trained(Mixed())) == [True]


def test_complex_parameters_and_those_of_integers_are_not() -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1, dtype=torch.complex64))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (super().training_step(batch, batch_idx) * self.factor).abs().sum()

    assert fused(trained(Odd())) == [None]


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "16-mixed"},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 4},
        {"nan_policy": "skip"},
    ],
    ids=str,
)
def test_it_goes_with_everything_that_reaches_into_an_update(settings: dict[str, Any]) -> None:
    module, plain = Net(MAKERS["momentum"]), Net(MAKERS["momentum"])
    assert fused(trained(module, **settings)) == [True]
    trained(plain, fused_optimizers=False, **settings)
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_parameters_of_16_bits_are_left_to_torch_on_the_cpu(precision: str) -> None:
    module, plain = Net(MAKERS["momentum"]), Net(MAKERS["momentum"])
    assert fused(trained(module, precision=precision)) == [None]
    trained(plain, fused_optimizers=False, precision=precision)
    assert all(map(torch.equal, weights(module), weights(plain)))


class Overflowing(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 2 else 1.0)


def test_an_update_that_float16_overflowed_is_held() -> None:
    module, plain = Overflowing(), Overflowing()
    first, second = (trained(m, precision="16-mixed", fused_optimizers=f) for m, f in ((module, True), (plain, False)))
    assert first.scaler.get_scale() == second.scaler.get_scale() < 65536  # type: ignore[union-attr]
    assert all(parameter.isfinite().all() for parameter in weights(module))
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Module) -> None:
        self.freeze(pl_module.layers[1])

    def finetune_function(self, pl_module: Module, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.layers[1], optimizer)


def test_groups_that_are_added_later_are_updated_too() -> None:
    module, plain = (Net(lambda parameters: Adam([p for p in parameters if p.requires_grad])) for _ in range(2))
    before = weights(module)
    trainer = trained(module, callbacks=[Unfreeze()])
    assert fused(trainer) == [True, None]
    trained(plain, callbacks=[Unfreeze()], fused_optimizers=False)
    assert not torch.equal(before[0], weights(module)[0])
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("wrote", "reads"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_checkpoint_of_a_run_that_chose_otherwise_is_resumed_in_this_runs_way(
    tmp_path: Path, wrote: bool, reads: bool
) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    whole = Net()
    trained(whole, fused_optimizers=wrote, enable_checkpointing=True, callbacks=[keep])
    module = Net()
    trainer = Trainer(**QUIET, fused_optimizers=reads, callbacks=[Ways()])
    with nullcontext() if wrote == reads else pytest.warns(UserWarning, match=r"bits +Trainer\(fused_optimizers\)"):
        trainer.fit(module, loader(), ckpt_path=tmp_path / "step=4.ckpt")
    assert fused(trainer) == [reads or None]
    assert trainer.global_step == 12
    for one, other in zip(weights(module), weights(whole), strict=True):
        assert torch.equal(one, other) if wrote == reads else torch.allclose(one, other, atol=1e-6)


def test_the_choice_in_a_checkpoint_is_plain_torchs_to_load(tmp_path: Path) -> None:
    module = Net()
    trained(module).save_checkpoint(path := tmp_path / "it.ckpt")
    state = torch.load(path, weights_only=True)["optimizer_states"][0]
    optimizer = Adam(Net().parameters(), lr=0.01)
    optimizer.load_state_dict(state)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert float(optimizer.state[parameter]["step"]) == 13.0


def test_state_that_lies_otherwise_than_its_parameter_is_laid_as_it_is(tmp_path: Path) -> None:
    first = trained(Net(MAKERS["momentum"]), max_epochs=1)
    optimizer = first.optimizers[0]
    for parameter, state in optimizer.state.items():
        if parameter.ndim == 4:
            state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=torch.channels_last)
    first.save_checkpoint(path := tmp_path / "it.ckpt")
    module, plain = Net(MAKERS["momentum"]), Net(MAKERS["momentum"])
    Trainer(**QUIET, fused_optimizers=True).fit(module, loader(), ckpt_path=path)
    with pytest.warns(UserWarning, match="bits"):
        Trainer(**QUIET, fused_optimizers=False).fit(plain, loader(), ckpt_path=path)
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)  # the last bit is that of the cpu's kernel


def test_schedules_and_copies_of_an_optimizer_work() -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = Adam(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    trainer = trained(Scheduled())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025
    copied = copy.deepcopy(trainer.optimizers[0])
    assert copied.param_groups[0]["lr"] == 0.025


def test_an_optimizer_without_parameters_that_learn_is_left_alone() -> None:
    class Frozen(Net):
        def configure_optimizers(self) -> Any:
            return [AdamW(self.layers[1].parameters()), AdamW([nn.Parameter(torch.empty(0))])]

    assert fused(trained(Frozen())) == [True, True]


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_a_part_that_learns_later_than_others_begins_its_momentum_then(dampening: float) -> None:
    class Thawing(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.layers[1].requires_grad_(self.trainer.global_step > 3)

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.01, momentum=0.9, dampening=dampening)

    module, plain = Thawing(), Thawing()
    assert fused(trained(module)) == [None if dampening else True]
    trained(plain, fused_optimizers=False)
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_looks_at_gradients_after_the_first_step_where_only_autograd_makes_them() -> None:
    looking = {}

    class Counting(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Module, *_: Any) -> None:
            looking[type(pl_module)] = len(trainer.optimizers[0]._optimizer_step_pre_hooks)

    trainers = [trained(make(), callbacks=[Counting()]) for make in (Net, Replaced)]
    assert looking == {Net: 0, Replaced: 1}
    assert not any(trainer.optimizers[0]._optimizer_step_pre_hooks for trainer in trainers)


def test_step_hooks_of_ones_own_are_called_as_ever() -> None:
    class Hooked(Net):
        def configure_optimizers(self) -> Any:
            optimizer = Adam(self.parameters())
            optimizer.register_step_pre_hook(lambda *_: called.append("own"))
            return optimizer

        def on_train_start(self) -> None:
            self.optimizers().optimizer.register_step_pre_hook(lambda *_: called.append("late"))

    called: list[str] = []
    assert fused(trained(Hooked())) == [True]
    assert called == ["own", "late"] * 12


class Shared(Net):
    """Gives every fit one and the same optimizer."""

    def __init__(self) -> None:
        super().__init__(MAKERS["momentum"])
        self.one = super().configure_optimizers()

    def configure_optimizers(self) -> Any:
        return self.one


def test_an_optimizer_is_given_back_as_it_was_made() -> None:
    module, plain = Shared(), Shared()
    for net, settings in ((module, {}), (plain, {"fused_optimizers": False})):
        net.layers[1].requires_grad_(False)
        trained(net, **settings)
        net.layers[1].requires_grad_(True)  # torch's fused kernel fails where some have a momentum and others do not
        trained(net, **settings)
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)
    assert module.one.param_groups[0]["fused"] is None
    assert fused(trained(module, fused_optimizers=False)) == [None]


def test_a_format_that_a_hook_gives_the_weights_of_a_resumed_run_is_that_of_its_state(tmp_path: Path) -> None:
    class Laid(Net):
        def on_train_start(self) -> None:
            self.to(memory_format=torch.channels_last)

    module, plain = Laid(MAKERS["momentum"]), Laid(MAKERS["momentum"])
    trained(Laid(MAKERS["momentum"]), max_epochs=1).save_checkpoint(path := tmp_path / "it.ckpt")
    Trainer(**QUIET).fit(module, loader(), ckpt_path=path)
    with pytest.warns(UserWarning, match="bits"):
        Trainer(**QUIET, fused_optimizers=False).fit(plain, loader(), ckpt_path=path)
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("hooks", ["gradient", "step"])
def test_a_gradient_that_a_hook_of_torchs_exchanges_later_is_updated_right(hooks: str) -> None:
    class Exchanging(Net):
        def exchange(self, *_: Any) -> None:
            weight = self.layers[1].weight
            if self.trainer.global_step > 2 and weight.grad is not None:
                weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            if hooks == "step":
                optimizer.register_step_pre_hook(self.exchange)
            else:
                self.layers[1].weight.register_post_accumulate_grad_hook(self.exchange)
            return optimizer

    module, plain = Exchanging(MAKERS["momentum"]), Exchanging(MAKERS["momentum"])
    assert fused(trained(module)) == [None]
    trained(plain, fused_optimizers=False)
    for one, other in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fused_optimizers", [True, False])
def test_autograd_notices_that_an_update_changed_what_a_graph_still_needs(fused_optimizers: bool) -> None:
    class Stale(Net):
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = self.layers(batch[0]).relu().square().mean() + self.layers[3].weight.square().sum()
            self.manual_backward(loss, retain_graph=True)
            optimizer.step()
            self.manual_backward(loss)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(Stale(), fused_optimizers=fused_optimizers)
