"""Each precision against a hand-written loop, and the float16 scaler on the cpu."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.errors import MisconfigurationException
from trainkit.precision import PRECISIONS, MixedPrecision, Precision, TruePrecision, precision_of

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


class Net(Module):
    """Note what a step sees."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.lr = lr
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def note(self, x: Tensor) -> Tensor:
        output = self(x)
        self.seen.append((x.dtype, output.dtype, torch.zeros(1).dtype, torch.is_autocast_enabled("cpu")))
        return output

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.note(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.note(batch).square().mean())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.note(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(torch.randn(batches * 4, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)  # type: ignore[arg-type]


def trainer_of(precision: Any, **settings: Any) -> Trainer:
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(precision=precision, **{**bare, **settings})


# ---------------------------------------------------------------- names
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_name_gives_the_precision_of_that_name(name: str) -> None:
    assert precision_of(name).precision == name
    assert Trainer(precision=name, accelerator="cpu", logger=False).precision == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        (None, "32-true"), (32, "32-true"), ("32", "32-true"), (64, "64-true"), ("64", "64-true"),
        (16, "16-mixed"), ("16", "16-mixed"), ("bf16", "bf16-mixed"),
    ],
)  # fmt: skip
def test_lightnings_short_names_mean_what_they_mean_there(alias: Any, name: str) -> None:
    assert precision_of(alias).precision == name


def test_an_object_is_taken_as_it_is() -> None:
    mine = MixedPrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    assert precision_of(mine) is mine
    assert Trainer(precision=mine, accelerator="cpu", logger=False).precision_plugin is mine


@pytest.mark.parametrize("wrong", ["16mixed", "fp16", "", 8, 32.0, True, float("nan"), ["32"], torch.float32])
def test_an_unknown_name_is_refused_with_the_known_ones(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"precision must be one of '32-true', 'bf16-mixed', .*Received"):
        Trainer(precision=wrong, accelerator="cpu", logger=False)


# ---------------------------------------------------------------- what a step sees
@pytest.mark.parametrize("name", PRECISIONS)
def test_each_precision_has_its_dtypes_in_every_step(name: str) -> None:
    dtype, mixed = DTYPES[name], name.endswith("mixed")
    parameters = torch.float32 if mixed else dtype
    module, trainer = Net(), trainer_of(name)
    trainer.fit(module, loader(1), loader(1))
    trainer.validate(module, loader(1), verbose=False)
    (prediction,) = trainer.predict(module, loader(1))
    assert prediction.dtype is dtype
    assert {parameter.dtype for parameter in module.parameters()} == {parameters}
    assert set(module.seen) == {(parameters, dtype, parameters, mixed)}
    assert len(module.seen) == 4
    assert torch.get_default_dtype() is torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_that_fails_leaves_torch_as_it_was(name: str) -> None:
    class Fails(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        trainer_of(name).fit(Fails(), loader())
    assert torch.get_default_dtype() is torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_a_true_precision_converts_floating_point_inputs_wherever_they_are() -> None:
    class Inputs(Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(3, 1)
            self.wave = nn.Parameter(torch.tensor([1 + 2j]))
            self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    packed = pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    batch = {"x": [torch.randn(2, 3)], "index": torch.tensor([1, 2]), "name": "a", "packed": packed}
    module = Inputs()
    (seen,) = trainer_of("64-true").predict(module, iter([batch]))
    assert (seen["x"][0].dtype, seen["index"].dtype, seen["name"]) == (torch.float64, torch.int64, "a")
    assert isinstance(seen["packed"], PackedSequence)
    assert seen["packed"].data.dtype is torch.float64
    assert batch["x"][0].dtype is torch.float32  # the loader's own batch is as it was
    assert module.line.weight.dtype is torch.float64
    assert module.wave == torch.tensor([1 + 2j])
    assert module.count.dtype is torch.int64


# ---------------------------------------------------------------- against plain loops
def plain(name: str, epochs: int) -> nn.Module:
    """Train as the precision's name says, by hand."""
    module = Net()
    dtype, mixed = DTYPES[name], name.endswith("mixed")
    if not mixed:
        module.to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=name == "16-mixed")
    for _ in range(epochs):
        for batch in loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=mixed):
                loss = module(batch if mixed else batch.to(dtype)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return module


@pytest.mark.parametrize("name", PRECISIONS)
def test_training_is_that_of_a_plain_loop_bit_for_bit(name: str) -> None:
    module = Net()
    trainer_of(name, max_epochs=3).fit(module, loader())
    expected = plain(name, 3).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in module.state_dict().items())
    assert not torch.equal(Net().net[0].weight.to(module.dtype), module.net[0].weight)


def test_a_precision_of_ones_own_overrides_what_differs() -> None:
    class Loud(Precision):
        precision = "loud"

        def wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                calls.append("step")
                return step(*arguments)

            return run

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            calls.append("backward")
            super().backward(loss * 2, *args, **kwargs)

    calls: list[str] = []
    trainer = trainer_of(Loud())
    trainer.fit(Net(), loader(2))
    assert calls == ["step", "backward"] * 2
    assert trainer.precision == "loud"


# ---------------------------------------------------------------- the scaler
def half() -> MixedPrecision:
    """Return 16-mixed with a scale at which nothing overflows by itself."""
    return MixedPrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


class Overflows(Net):
    """Give an infinite gradient in some batches."""

    def __init__(self, batches: set[int]) -> None:
        super().__init__()
        self.overflowing = batches

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (float("inf") if batch_idx in self.overflowing else 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}]


class Notes(Callback):
    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float, int]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.rows.append(
            (
                trainer.precision_plugin.scaler.get_scale(),  # type: ignore[attr-defined]
                trainer.optimizers[0].param_groups[0]["lr"],
                module.net[0].weight.sum().item(),
                trainer.global_step,
            )
        )


def test_an_overflow_holds_the_weights_and_the_schedule_back_and_halves_the_scale() -> None:
    module, notes = Overflows({1, 2}), Notes()
    start = module.net[0].weight.sum().item()
    trainer_of(half(), callbacks=notes).fit(module, loader(5))
    scales, rates, weights, steps = zip(*notes.rows, strict=True)
    assert scales == (1024.0, 512.0, 256.0, 256.0, 256.0)
    assert rates == (0.025, 0.025, 0.025, 0.0125, 0.00625)
    assert start != weights[0]
    assert weights[0] == weights[1] == weights[2]
    assert len(set(weights[2:])) == 3
    assert steps == (1, 2, 3, 4, 5)


def test_the_scale_grows_after_steps_that_went_well() -> None:
    notes = Notes()
    precision = MixedPrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2))
    trainer_of(precision, callbacks=notes).fit(Net(), loader(5))
    assert [row[0] for row in notes.rows] == [4.0, 8.0, 8.0, 16.0, 16.0]


@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_are_true_ones_when_anybody_looks_at_them(clip: float | None) -> None:
    class Looks(Callback):
        def on_after_backward(self, trainer: Trainer, module: Any) -> None:
            scaled.append(module.net[2].bias.grad.item())

        def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
            seen.append(module.net[2].bias.grad.item())

        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            gradients = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
            norms.append(float(gradients.norm()))

    scaled: list[float] = []
    seen: list[float] = []
    norms: list[float] = []
    trainer_of(half(), callbacks=Looks(), gradient_clip_val=clip).fit(Net(), loader(2))
    assert scaled == pytest.approx([1024 * value for value in seen])
    assert all(norm == pytest.approx(0.01, rel=1e-3) if clip else norm > 0.02 for norm in norms)


def test_an_accumulated_window_overflows_as_a_whole() -> None:
    module, notes = Overflows({0}), Notes()
    start = module.net[0].weight.sum().item()
    trainer_of(half(), callbacks=notes, accumulate_grad_batches=2).fit(module, loader(4))
    scales, rates, weights, steps = zip(*notes.rows, strict=True)
    assert scales == (1024.0, 512.0, 512.0, 512.0)
    assert rates == (0.05, 0.05, 0.05, 0.025)
    assert (start, start, start) == weights[:3]
    assert weights[3] != start
    assert steps == (0, 1, 1, 2)


def test_manual_optimization_goes_through_the_scaler() -> None:
    class Manual(Overflows):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module, notes = Manual({1}), Notes()
    trainer_of(half(), callbacks=notes).fit(module, loader(3))
    assert [row[0] for row in notes.rows] == [1024.0, 512.0, 512.0]
    assert notes.rows[0][2] == notes.rows[1][2] != notes.rows[2][2]


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    class Closure(Net):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().step(lambda: super(Closure, self).training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="precision='16-mixed' can't run LBFGS"):
        trainer_of("16-mixed").fit(Closure(), loader())


def test_the_scaler_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "half.ckpt"
    whole, first, second = Overflows({1, 5}), Overflows({1, 5}), Overflows({1, 5})
    notes = Notes()
    trainer_of(half(), max_steps=8, max_epochs=-1, callbacks=notes).fit(whole, loader(8))
    trainer = trainer_of(half(), max_steps=4, max_epochs=-1)
    trainer.fit(first, loader(8))
    trainer.save_checkpoint(file)
    resumed = trainer_of(half(), max_steps=8, max_epochs=-1)
    resumed.fit(second, loader(8), ckpt_path=file)
    assert resumed.precision_plugin.state_dict() == {
        **resumed.precision_plugin.state_dict(),
        "scale": notes.rows[-1][0],
    }
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in second.state_dict().items())


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_state_of_a_precision_comes_back(name: str) -> None:
    first, second = trainer_of(name), trainer_of(name)
    first.fit(Overflows({0}), loader(2))
    second.fit(Net(), loader(1))
    second.precision_plugin.load_state_dict(copy.deepcopy(first.precision_plugin.state_dict()))
    assert second.precision_plugin.state_dict() == first.precision_plugin.state_dict()
    assert bool(first.precision_plugin.state_dict()) is (name == "16-mixed")


def test_a_second_fit_of_one_trainer_listens_to_the_new_optimizer_only() -> None:
    class Shares(Net):
        def configure_optimizers(self) -> Any:
            return optimizer

    module = Shares()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    trainer = trainer_of("16-mixed")
    for epochs in (1, 2, 3):
        trainer.max_epochs = epochs
        trainer.fit(module, loader(1))
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_every_precision_has_a_dtype_in_this_file() -> None:
    assert DTYPES.keys() == PRECISIONS.keys()
    assert all(isinstance(precision_of(name), (Precision, MixedPrecision, TruePrecision)) for name in DTYPES)


# ---------------------------------------------------------------- what every precision must do
EVERY = sorted(PRECISIONS)


def run_of(precision: Any, epochs: int = 2, **settings: Any) -> tuple[Trainer, Net]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", precision=precision, max_epochs=epochs, enable_checkpointing=False, **{**quiet, **settings}
    )
    module = Net()
    trainer.fit(module, loader(4))
    return trainer, module


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_every_precision_survives_pickling_with_its_state(name: str) -> None:
    trainer, _ = run_of(name)
    for copied in (copy.deepcopy(trainer.precision_plugin), pickle.loads(pickle.dumps(precision_of(name)))):
        assert copied.precision == name
        assert type(copied) is type(trainer.precision_plugin)
    fresh = precision_of(name)
    fresh.attach(trainer.optimizers, torch.device("cpu"))
    fresh.load_state_dict(trainer.precision_plugin.state_dict())
    assert fresh.state_dict() == trainer.precision_plugin.state_dict()


@pytest.mark.parametrize("name", EVERY)
def test_every_precision_runs_twice_and_the_second_run_is_as_the_first(name: str) -> None:
    first, one = run_of(name)
    second = Trainer(
        accelerator="cpu", precision=name, max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    other, again = Net(), Net()
    second.fit(other, loader(4))
    assert equal(one, other)
    second.fit_loop.max_epochs = 4
    second.fit(other, loader(4))  # two more epochs on one Trainer
    first.fit_loop.max_epochs = 4
    first.fit(one, loader(4))
    assert equal(one, other)
    assert not equal(other, again)


@pytest.mark.parametrize("name", EVERY)
def test_every_precision_goes_on_from_a_checkpoint_to_the_same_weights(name: str, tmp_path: Path) -> None:
    _, whole = run_of(name, epochs=3)
    half, _ = run_of(name, epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Trainer(
        accelerator="cpu", precision=name, max_epochs=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    module = Net()
    resumed.fit(module, loader(4), ckpt_path=tmp_path / "half.ckpt")
    assert equal(whole, module)


def test_the_names_of_the_precisions_are_checked() -> None:
    for make in (lambda: MixedPrecision("32-true"), lambda: TruePrecision("16-mixed")):  # type: ignore[arg-type]
        with pytest.raises(MisconfigurationException, match="precision must be"):
            make()
    with pytest.raises(MisconfigurationException, match="needs no scaler"):
        MixedPrecision("bf16-mixed", scaler=torch.amp.GradScaler("cpu"))
