"""Override points of the update, closures, clipping, and the optimizer that user code gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainkit import Callback, Module, Trainer
from trainkit.errors import MisconfigurationException
from trainkit.precision import MixedPrecision
from trainkit.update import StepOptimizer, wants_closure

BARE: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


class Net(Module):
    """Two layers on three numbers, from the same weights each time."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **settings: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.optimizer, self.settings = optimizer, settings or {"lr": 0.1}

    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), **self.settings)  # type: ignore[arg-type]


class Batches:
    def __init__(self, number: int) -> None:
        self.batches = list(torch.randn(number, 8, 3, generator=torch.Generator().manual_seed(0)))

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def fitted(module: Module, number: int = 4, **settings: Any) -> Trainer:
    trainer = Trainer(**{**BARE, **settings})
    trainer.fit(module, Batches(number))
    return trainer


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ---------------------------------------------------------------- override points
def test_each_override_point_of_the_update_is_called_with_lightnings_arguments() -> None:
    calls: list[Any] = []

    class Mine(Net):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            calls.append(("zero_grad", epoch, batch_idx, type(optimizer)))
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            calls.append(("backward", loss.requires_grad))
            super().backward(loss, *args, **kwargs)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            calls.append(("step", epoch, batch_idx, type(optimizer)))
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            calls.append(("clip", type(optimizer), gradient_clip_val, gradient_clip_algorithm))
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    module = Mine()
    trainer = fitted(module, 1, gradient_clip_val=0.5)
    assert calls == [
        ("zero_grad", 0, 0, torch.optim.SGD),
        ("backward", True),
        ("step", 0, 0, StepOptimizer),
        ("clip", torch.optim.SGD, 0.5, None),
    ]
    plain = Net()
    fitted(plain, 1, gradient_clip_val=0.5)
    assert same(module, plain)
    assert trainer.global_step == 1


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("name", ["optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping"])
def test_an_override_that_calls_its_base_changes_nothing(name: str, accumulate: int) -> None:
    base = getattr(Module, name)
    overriding = type("Mine", (Net,), {name: lambda self, *args, **kwargs: base(self, *args, **kwargs)})
    mine, plain = overriding(torch.optim.AdamW, lr=0.01), Net(torch.optim.AdamW, lr=0.01)
    for module in (mine, plain):
        fitted(module, 7, accumulate_grad_batches=accumulate, gradient_clip_val=0.1, max_epochs=2)
    assert same(mine, plain)


def test_configure_gradient_clipping_is_called_without_a_clip_value_too() -> None:
    class Mine(Net):
        def configure_gradient_clipping(self, optimizer: Any, *given: Any) -> None:
            assert given == (None, None)
            self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="value")

        def on_train_batch_end(self, *_: Any) -> None:
            assert max(float(p.grad.abs().max()) for p in self.parameters() if p.grad is not None) <= 1e-3 * (1 + 1e-6)

    fitted(Mine(), 2)


def test_a_warm_up_in_optimizer_step_reaches_the_optimizer() -> None:
    rates = []

    class Warms(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (self.trainer.global_step + 1) / 4
            optimizer.step(closure=optimizer_closure)
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    fitted(Warms(), 4)
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_optimizer_step_may_leave_an_update_out() -> None:
    class Rare(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            assert isinstance(optimizer_closure(), Tensor)
            if batch_idx % 2:
                optimizer.step()

    rare, plain = Rare(), Net()
    trainer = fitted(rare, 4)

    for index, batch in enumerate(Batches(4)):
        plain.zero_grad()
        plain.loss(batch).backward()  # type: ignore[no-untyped-call]
        if index % 2:
            torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert same(rare, plain)
    assert trainer.global_step == 4  # Lightning counts such a batch, too


# ---------------------------------------------------------------- closures
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lbfgs_trains_as_in_a_loop_by_hand(accumulate: int) -> None:
    settings = {"lr": 0.5, "max_iter": 4}
    module, plain = Net(torch.optim.LBFGS, **settings), Net()
    trainer = fitted(module, 6, accumulate_grad_batches=accumulate)

    optimizer = torch.optim.LBFGS(plain.parameters(), **settings)  # type: ignore[arg-type]
    batches = list(Batches(6))
    for start in range(0, 6, accumulate):

        def closure(window: list[Tensor] = batches[start : start + accumulate]) -> Tensor:
            optimizer.zero_grad()
            for batch in window:
                loss = plain.loss(batch) / accumulate if accumulate > 1 else plain.loss(batch)
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)
    assert same(module, plain)
    assert trainer.global_step == 6 // accumulate


def test_an_optimizer_of_ones_own_gets_a_closure_that_computes_again() -> None:
    class TwoSteps(torch.optim.SGD):
        """Step, look at the loss from there, and step again with the gradients of there."""

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            assert closure is not None
            with torch.enable_grad():
                losses.append(closure().item())
            super().step()
            with torch.enable_grad():
                losses.append(closure().item())
            super().step()
            return losses[-1]

    losses: list[float] = []
    module, plain = Net(TwoSteps), Net()
    fitted(module, 1)
    batch = next(iter(Batches(1)))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    by_hand = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = plain.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        by_hand.append(loss.item())
    assert losses == by_hand
    assert same(module, plain)


def test_no_closure_is_made_for_torchs_own_optimizers() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    own = type("Own", (torch.optim.SGD,), {"step": lambda self, closure=None: None})
    assert wants_closure(torch.optim.LBFGS(parameters))
    assert not any(wants_closure(kind(parameters)) for kind in (torch.optim.SGD, torch.optim.AdamW))  # type: ignore[operator]
    assert wants_closure(own(parameters))


def test_float16_refuses_lbfgs_with_the_way_out() -> None:
    module = Net(torch.optim.LBFGS, lr=0.1)
    with pytest.raises(MisconfigurationException, match='"bf16-mixed"'):
        fitted(module, 1, precision="16-mixed")
    fitted(Net(torch.optim.LBFGS, lr=0.1), 1, precision="bf16-mixed")


# ---------------------------------------------------------------- clipping
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_by_norm_and_by_value_is_torchs(algorithm: Any) -> None:
    module, plain = Net(), Net()
    fitted(module, 3, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    for batch in Batches(3):
        optimizer.zero_grad()
        plain.loss(batch).backward()  # type: ignore[no-untyped-call]
        clip(plain.parameters(), 0.01)  # type: ignore[operator]
        optimizer.step()
    assert same(module, plain)


@pytest.mark.parametrize("limit", [0, -1.0, None])
def test_nothing_is_clipped_without_a_positive_limit(limit: Any) -> None:
    clipped, plain = Net(), Net()
    fitted(clipped, gradient_clip_val=limit)
    fitted(plain)
    assert same(clipped, plain)


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        ({"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.1}, MisconfigurationException),
        (
            {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"},
            {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
            MisconfigurationException,
        ),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "x"}, {}, MisconfigurationException),
        ({"gradient_clip_val": "0.1"}, {}, TypeError),
    ],
)
def test_clip_gradients_refuses_what_contradicts_the_trainer(
    arguments: dict[str, Any], settings: dict[str, Any], error: type[Exception]
) -> None:
    class Mine(Net):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any) -> None:
            self.clip_gradients(optimizer, **arguments)

    with pytest.raises(error, match=r"gradient_clip_(val|algorithm)"):
        fitted(Mine(), 1, **settings)


# ---------------------------------------------------------------- manual optimization
class Manual(Net):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.01, "norm")
        optimizer.step()


@pytest.mark.parametrize("half", [False, True])
def test_manual_optimization_clips_true_gradients(half: bool) -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Module, *_: Any) -> None:
            norms.append(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item())

    norms: list[float] = []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a scale that does not overflow
    trainer = fitted(
        Manual(), 4, plugins=[MixedPrecision("16-mixed", scaler=scaler)] if half else None, callbacks=[Looks()]
    )
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert trainer.global_step == 4


def test_the_optimizer_that_user_code_gets_stands_for_its_own() -> None:
    class Looks(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            assert isinstance(optimizer, torch.optim.SGD)
            assert isinstance(optimizer, StepOptimizer)
            assert optimizer.optimizer is self.optimizers(use_pl_optimizer=False) is self.trainer.optimizers[0]
            assert optimizer.param_groups is optimizer.optimizer.param_groups

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            returned.append(optimizer.step(closure))

    returned: list[Any] = []
    trainer = fitted(Looks(), 2)
    assert all(isinstance(loss, Tensor) for loss in returned)
    assert trainer.global_step == 2


def test_an_optimizer_may_be_wrapped_without_a_run() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = StepOptimizer(torch.optim.SGD([parameter], lr=1.0))
    parameter.grad = torch.ones(2)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert torch.equal(parameter.detach(), torch.zeros(2))
    with pytest.raises(MisconfigurationException, match=r"from self\.optimizers"), optimizer.toggle_model():
        pass


def test_manual_backward_is_refused_with_automatic_optimization() -> None:
    class Both(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

    with pytest.raises(MisconfigurationException, match="automatic_optimization = False"):
        fitted(Both(), 1)


def test_toggling_leaves_gradients_to_one_optimizer_and_gives_back_what_was() -> None:
    class Gan(Manual):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 1)
            self.two.bias.requires_grad = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.one, self.two)]

        def grads(self) -> list[bool]:
            return [p.requires_grad for p in (*self.one.parameters(), *self.two.parameters())]

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            first, second = self.optimizers()
            before = self.grads()
            with self.toggled_optimizer(second):
                assert self.grads() == [False, False, True, False]
            assert self.grads() == before
            with first.toggle_model():
                assert self.grads() == [True, True, False, False]
                loss = self.two(self.one(batch)).mean()
                first.zero_grad()
                self.manual_backward(loss)
                first.step()
            self.toggle_optimizer(first)
            self.toggle_optimizer(second)  # without giving back in between
            assert self.grads() == [False, False, True, False]
            self.untoggle_optimizer(second)
            assert self.grads() == before == [True, True, True, False]

    assert fitted(Gan(), 2).global_step == 2
