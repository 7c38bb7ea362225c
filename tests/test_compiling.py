"""Trainer(compile=...): the steps are compiled, what they log means what it meant, recompiles are counted and told."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torchmetrics
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.errors import MisconfigurationException

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


class Net(Module):
    """A net with batch statistics and dropout that logs in all ways, and in a module inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Part()
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.25), nn.Linear(8, 1))
        self.error = torchmetrics.MeanSquaredError()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        out = self(x)
        loss = nn.functional.mse_loss(out, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(x))
        self.log_dict({"twice": 2 * loss, "number": 1.5}, on_epoch=True)
        self.error(out, y)
        self.log("error", self.error, on_step=False, on_epoch=True)
        self.log("largest", out.max(), on_step=False, on_epoch=True, reduce_fx="max")
        return {"loss": loss, "out": out}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Part(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        self.log("inside", y.mean())
        return y


class Rows(Callback):
    """What loggers would be told after every batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert not outputs["loss"].requires_grad
        pl_module.log("from_a_hook", outputs["loss"] + batch_idx)
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def loader(samples: int = 24, batch_size: int = 4, shuffle: bool = False) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(1)
    data = [torch.randn(samples, width, generator=random) for width in (8, 1)]
    return DataLoader(TensorDataset(*data), batch_size, shuffle=shuffle)


def trained(make: Callable[[], Module], compile: Any, data: Any = None, **settings: Any) -> tuple[Trainer, Module]:
    torch.manual_seed(0)
    module = make()
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, "compile": compile, **settings})
    trainer.fit(module, loader() if data is None else data)
    return trainer, module


def same(one: Module, other: Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "64-true"},
        {"nan_policy": "skip"},
        {"detect_anomaly": True},
    ],
    ids=str,
)
def test_a_compiled_run_is_the_eager_one_with_everything_that_is_logged(settings: dict[str, Any]) -> None:
    seen = Rows(), Rows()
    counter = CompileCounterWithBackend("eager")
    if settings.get("detect_anomaly"):
        warnings.filterwarnings("ignore", "Anomaly Detection")
    eager, plain = trained(Net, None, loader(shuffle=True), callbacks=[seen[0]], **settings)
    with warnings.catch_warnings():  # torchmetrics counts its updates in a number
        warnings.filterwarnings("ignore", "compile: training_step was compiled again .*_update_count")
        compiled, module = trained(Net, {"backend": counter}, loader(shuffle=True), callbacks=[seen[1]], **settings)
    assert same(plain, module)
    assert seen[0].rows == seen[1].rows
    assert len(seen[1].rows) == 12
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        assert getattr(eager, name) == getattr(compiled, name)
    assert {"loss_epoch", "twice", "number", "error", "largest", "inside", "from_a_hook"} <= seen[1].rows[
        -1
    ].keys() | compiled.callback_metrics.keys()
    assert graph_breaks() == 0
    assert compiled.recompiles == 1
    assert counter.frame_count == 2


class Evaluated(Net):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", nn.functional.mse_loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head(self.body.line(batch[0]))


def test_evaluations_and_predictions_are_compiled_too() -> None:
    counter = CompileCounterWithBackend("eager")
    trainer, module, plain = Trainer(**QUIET, compile={"backend": counter}), Evaluated(), Trainer(**QUIET)
    assert trainer.validate(module, loader(), verbose=False) == plain.validate(module, loader(), verbose=False)
    assert trainer.test(module, loader(), verbose=False) == plain.test(module, loader(), verbose=False)
    compiled = trainer.predict(module, loader())
    assert all(map(torch.equal, compiled or [], plain.predict(module, loader()) or []))
    assert compiled is not None
    assert len(compiled) == 6
    assert counter.frame_count == 3
    assert graph_breaks() == 0


class Asking(Net):
    """Looks at the run in its step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self(batch[0]).pow(2).mean()
        self.log("epoch", float(self.current_epoch))
        self.log("steps", float(self.global_step))
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        self.log("half", batch_idx / 2)
        if self.trainer.is_last_batch:
            loss = 2 * loss
        return loss


def test_the_counters_of_a_run_do_not_compile_a_step_each_time() -> None:
    counter = CompileCounterWithBackend("eager")
    _, plain = trained(Asking, None, loader(40), max_epochs=5)
    with pytest.warns(UserWarning, match="compiled again") as told:
        trainer, module = trained(Asking, {"backend": counter}, loader(40), max_epochs=5)
    # one each: batch_idx with the step count, the last batch, the second epoch, the rate
    assert trainer.recompiles == counter.frame_count - 1 == len(told) <= 6
    assert same(plain, module)
    assert float(trainer.callback_metrics["epoch"]) == 4.0
    assert float(trainer.callback_metrics["steps"]) == 49.0
    assert graph_breaks() == 0


class WithIndex(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).pow(2).mean() * (1 + batch_idx)


class WithoutIndex(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).pow(2).mean()


def test_batch_idx_costs_one_recompile_where_it_is_used_and_none_where_it_is_not() -> None:
    trainer, _ = trained(WithoutIndex, {"backend": "eager"}, loader(40), max_epochs=3)
    assert trainer.recompiles == 0
    with pytest.warns(UserWarning, match=r"compiled again \(recompile 1\).*batch_idx == 0 is no longer so"):
        trainer, _ = trained(WithIndex, {"backend": "eager"}, loader(40), max_epochs=3)
    assert trainer.recompiles == 1


def test_an_odd_last_batch_is_told_of_once_with_the_reason_and_what_helps() -> None:
    with pytest.warns(UserWarning, match=r"size mismatch at index 0. expected 4, actual 2.*drop_last=True") as told:
        trainer, module = trained(WithoutIndex, {"backend": "eager"}, loader(22), max_epochs=3)
    assert trainer.recompiles == len(told) == 1
    assert same(module, trained(WithoutIndex, None, loader(22), max_epochs=3)[1])


def test_dynamic_shapes_need_no_recompile() -> None:
    trainer, _ = trained(WithoutIndex, {"backend": "eager", "dynamic": True}, loader(22), max_epochs=3)
    assert trainer.recompiles == 0


class Printing(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self(batch[0]).pow(2).mean()
        self.print("loss", loss.detach() * 0)
        self.print(f"that is {loss * 0}", end="!\n")
        return loss


def test_what_a_compiled_step_prints_comes_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    trained(Printing, {"backend": "eager", "fullgraph": True}, max_epochs=1)
    assert capsys.readouterr().out == "loss tensor(0.)\nthat is 0.0!\n" * 6
    assert graph_breaks() == 0


class Watched(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        out = self(batch[0])
        self.log("root", (out * 0).abs().sum().sqrt())  # whose gradient is infinite
        return out.pow(2).mean()


def test_a_logged_tensor_takes_no_part_in_backward() -> None:
    _, module = trained(Watched, {"backend": "aot_eager"})
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    _, plain = trained(Watched, None)
    for (name, one), other in zip(plain.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("after", loss * 2)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("gradient", self.body.line.weight.grad.norm())


def test_with_manual_optimization_the_parts_between_updates_are_compiled() -> None:
    counter = CompileCounterWithBackend("eager")
    eager, plain = trained(ByHand, None)
    with warnings.catch_warnings():  # torch asks a tensor that has no gradient whether it has one
        warnings.filterwarnings("ignore", "The .grad attribute")
        compiled, module = trained(ByHand, {"backend": counter})
    assert same(plain, module)
    assert counter.frame_count > 0
    assert compiled.global_step == 12
    assert compiled.callback_metrics == eager.callback_metrics
    assert "gradient" in compiled.callback_metrics


class Strange(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("wrong", batch[0])
        return self(batch[0]).mean()


def test_a_wrong_log_in_a_compiled_step_is_the_same_error() -> None:
    with pytest.raises(ValueError, match="takes a tensor of one element"):
        trained(Strange, {"backend": "eager"})


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("this backend is broken")


def test_auto_goes_on_without_compiling_after_one_warning_that_says_why() -> None:
    _, plain = trained(Net, None, shuffled := loader(shuffle=True))
    from trainkit.compiling import Compiler

    trainer = Trainer(**QUIET, max_epochs=2, compile="auto")
    assert isinstance(trainer.compiler, Compiler)
    trainer.compiler.options["backend"] = broken
    torch.manual_seed(0)
    module = Net()
    with pytest.warns(UserWarning, match='compile="auto": training_step runs as it is.*this backend is broken') as told:
        trainer.fit(module, shuffled)
    assert len(told) == 1
    assert same(plain, module)


def test_true_raises_what_the_compiler_raised_and_says_what_else_there_is() -> None:
    with pytest.raises(RuntimeError, match="this backend is broken") as caught:
        trained(Net, {"backend": broken})
    assert any("'auto' goes on without compiling" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("start", [True, "auto"])
def test_a_machine_without_a_compiler_is_told_what_to_install(start: Any, tmp_path: Path, checkout: Path) -> None:
    script = f"""
import torch, warnings
from trainkit import Module, Trainer
class Net(Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        loss = self.line(batch).pow(2).mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, max_epochs=1, compile={start!r})
trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(12, 3), 4))
print("done", "loss" in trainer.callback_metrics)
"""
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(checkout)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    message = done.stderr.replace("\n", " ")
    assert "a C++ compiler: install g++" in message
    if start == "auto":
        assert done.returncode == 0, message
        assert done.stdout == "done True\n"
        assert message.count('compile="auto"') == 1
    else:
        assert done.returncode == 1
        assert "MisconfigurationException: compile: this machine lacks" in message


def test_a_checkpoint_of_a_compiled_run_is_an_eager_one(tmp_path: Path) -> None:
    names = [trained(WithoutIndex, compile)[0] for compile in (None, {"backend": "eager"})]
    saved = []
    for number, trainer in enumerate(names):
        trainer.save_checkpoint(path := tmp_path / f"{number}.ckpt")
        saved.append(torch.load(path, weights_only=True))
    assert saved[0]["state_dict"].keys() == saved[1]["state_dict"].keys() == Net().state_dict().keys()
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1]["state_dict"][name]) for name, value in saved[0]["state_dict"].items())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch 2.13's inductor
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_resumed_compiled_run_ends_as_the_one_that_went_through(tmp_path: Path, backend: str) -> None:
    def run(resume: Path | None, **settings: Any) -> Module:
        torch.manual_seed(0 if resume is None else 99)
        module = WithoutIndex()
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        quiet = {**QUIET, "enable_checkpointing": True, "callbacks": [keep], **settings}
        Trainer(**quiet, max_epochs=2, compile={"backend": backend}).fit(module, loader(shuffle=True), ckpt_path=resume)
        return module

    whole = run(None)
    assert same(whole, run(tmp_path / "step=4.ckpt"))  # with dropout, and inside an epoch


def test_a_run_gives_torch_its_settings_back() -> None:
    config, before = torch._dynamo.config, torch._dynamo.config.allow_unspec_int_on_nn_module
    callbacks = len(torch._dynamo.callback.callback_handler.end_callbacks)
    trained(Net, {"backend": "eager"}, limit_train_batches=1)
    with pytest.raises(RuntimeError):
        trained(Net, {"backend": broken})
    assert config.allow_unspec_int_on_nn_module == before
    assert len(torch._dynamo.callback.callback_handler.end_callbacks) == callbacks


def test_runs_of_one_class_do_not_use_up_what_torch_compiles_of_a_function() -> None:
    counter = CompileCounterWithBackend("eager")
    for width in range(1, 12):
        data = DataLoader(TensorDataset(torch.randn(8, 8), torch.randn(8, 1)), width % 3 + 2)
        trained(WithoutIndex, {"backend": counter, "dynamic": True}, data, max_epochs=1)
    assert counter.frame_count >= 11


def test_a_second_fit_of_the_same_trainer_compiles_nothing_again() -> None:
    counter = CompileCounterWithBackend("eager")
    trainer, module = trained(WithoutIndex, {"backend": counter})
    trainer.max_epochs = 3
    trainer.fit(module, loader())
    assert counter.frame_count == 1


def test_without_compile_nothing_of_it_is_imported() -> None:
    script = """
import sys
from trainkit import Module, Trainer
import torch
class Net(Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        return self.line(batch).pow(2).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, max_epochs=1)
trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(12, 3), 4))
assert trainer.recompiles == 0
print([name for name in sys.modules if name.startswith(("trainkit.compiling", "trainkit.cuda"))])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("backend", ["nope", "Inductor"])
def test_an_unknown_backend_is_refused_with_those_that_are_known(backend: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"compile=.*inductor"):
        Trainer(**QUIET, compile={"backend": backend})
