"""nan_policy: what is not finite does not reach the weights, on the host and as a device decides it."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.errors import MisconfigurationException, NonFiniteError
from trainkit.loggers import CSVLogger

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["host", "device"])
def guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test as on the cpu, and as on a device whose memory can't be looked at."""
    if request.param == "device":
        monkeypatch.setattr("trainkit.nonfinite.looks_at_memory", lambda device: False)
    return str(request.param)


class Net(Module):
    """A network with state everywhere. A batch with a NaN or an infinite number has a loss of NaN."""

    def __init__(self, make: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.make = make or (lambda parameters: torch.optim.AdamW(parameters, lr=0.01))

    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - 1).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class BadGradient(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * NAN


class BadGradientNet(Net):
    """A network of whose gradients those of the first layer are not finite for a batch that begins with 9."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.net[0](batch)
        if float(batch[0, 0]) == 9:
            hidden = BadGradient.apply(hidden)
        return (self.net[2](self.net[1](hidden)) - 1).square().mean()


def batches(*bad: int, value: float = NAN, count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(4, 3, generator=generator) for _ in range(count)]
    for index in bad:
        made[index][0, 0] = value
    return made


def loader(*bad: int, value: float = NAN, count: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.cat(batches(*bad, value=value, count=count)), 4)  # type: ignore[arg-type]


def trainer_of(root: Path, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": root,
            "fused_optimizers": False,  # the last bits of a plain loop
            **settings,
        }
    )  # fmt: skip


def by_hand(module: Net, data: list[Tensor], bad: tuple[int, ...], accumulate: int = 1) -> list[torch.optim.Optimizer]:
    """Train in a loop of one's own that leaves windows with bad batches out, forward and all."""
    made = module.make(module.parameters())
    optimizers = made if isinstance(made, list) else [made]
    for start in range(0, len(data), accumulate):
        window = range(start, min(start + accumulate, len(data)))
        if set(window) & set(bad):
            continue
        for optimizer in optimizers:
            optimizer.zero_grad()
        for index in window:
            (module.loss(data[index]) / accumulate).backward()
        for optimizer in optimizers:
            optimizer.step()
    return optimizers


def same(module: Net, other: Net) -> bool:
    ours, theirs = module.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def same_state(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    ours, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    return all(torch.equal(ours[p][name], value) for p in theirs for name, value in theirs[p].items())


# ---------------------------------------------------------------- skip
MAKE: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
}
MAKE["two"] = lambda parameters: (
    lambda all_of_them: [torch.optim.SGD(all_of_them[:2], lr=0.01), torch.optim.AdamW(all_of_them[2:], lr=0.01)]
)(list(parameters))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("bad", [(0,), (3, 4), (7,)])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_skipped_update_is_as_if_its_batch_had_not_been_there(
    tmp_path: Path, guard: str, make: Callable[[Any], Any], bad: tuple[int, ...], value: float
) -> None:
    module, other = Net(make), Net(make)
    trainer = trainer_of(tmp_path, nan_policy="skip")
    trainer.fit(module, loader(*bad, value=value))
    optimizers = by_hand(other, batches(*bad, value=value), bad)
    assert same(module, other)
    assert all(map(same_state, trainer.optimizers, optimizers))
    assert trainer.skipped_updates == len(bad)
    assert trainer.global_step == 8  # as an update that float16 holds, a skipped one counts


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}])
def test_the_whole_window_is_skipped_and_clipping_does_not_hide_it(
    tmp_path: Path, guard: str, settings: dict[str, Any]
) -> None:
    module, other = Net(), Net()
    trainer = trainer_of(tmp_path, nan_policy="skip", **settings)
    trainer.fit(module, loader(3))
    if "accumulate_grad_batches" in settings:
        by_hand(other, batches(3), (3,), accumulate=2)
        assert same(module, other)
    assert trainer.skipped_updates == 1
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped(tmp_path: Path, guard: str) -> None:
    module, other = BadGradientNet(), BadGradientNet()
    trainer = trainer_of(tmp_path, nan_policy="skip")
    trainer.fit(module, loader(2, value=9.0))
    by_hand(other, batches(2, value=9.0), (2,))
    assert same(module, other)
    assert trainer.skipped_updates == 1


def test_a_schedule_does_not_move_with_a_skipped_update(tmp_path: Path) -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer = trainer_of(tmp_path, nan_policy="skip")
    trainer.fit(Scheduled(), loader(2, 5, count=6))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**4


def test_skipped_updates_are_told_and_logged_at_log_points(
    tmp_path: Path, guard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(tmp_path, nan_policy="skip", logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(Net(), loader(2, 4, 5))
    assert [line for line in capsys.readouterr().out.splitlines() if "skip" in line] == [
        'nan_policy="skip": no update for step 2 (epoch 0, batch 2): the loss is nan, and the gradient of net.0.weight '
        "is not finite; skipped so far: 1",
        'nan_policy="skip": no update for step 4 (epoch 0, batch 4): the loss is nan, and the gradient of net.0.weight '
        "is not finite and 1 more; skipped so far: 3",
    ]
    lines = (Path(trainer.log_dir or "") / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("skipped_updates")
    assert [line.split(",")[column] for line in lines[1:]] == ["", "1.0", "3.0", "3.0"]


def test_what_is_left_to_tell_is_told_at_the_end(
    tmp_path: Path, guard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_of(tmp_path, nan_policy="skip").fit(Net(), loader(7))
    assert "skipped so far: 1\n" in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run(tmp_path: Path, guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.nonfinite.MOST_IN_A_ROW", 3)
    trainer = trainer_of(tmp_path, nan_policy="skip", log_every_n_steps=1)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row were skipped. No update for step 5 "):
        trainer.fit(Net(), loader(0, 1, 3, 4, 5))
    assert trainer.skipped_updates == 5


def test_the_counters_are_resumed(tmp_path: Path, guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.nonfinite.MOST_IN_A_ROW", 3)
    saves = {"enable_checkpointing": True, "nan_policy": "skip", "log_every_n_steps": 1}

    def save() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "ck", every_n_train_steps=1, save_top_k=-1)

    trainer_of(tmp_path, max_steps=6, callbacks=save(), **saves).fit(Net(), loader(1, 4, 5))
    trainer = trainer_of(tmp_path, callbacks=save(), **saves)
    with pytest.raises(NonFiniteError, match="3 updates in a row"):
        trainer.fit(Net(), loader(6), ckpt_path=str(tmp_path / "ck" / "epoch=0-step=6.ckpt"))
    assert trainer.skipped_updates == 4


# ---------------------------------------------------------------- raise
@pytest.mark.parametrize(("value", "loss"), [(NAN, "nan"), (INF, "nan")])
def test_raise_names_everything_and_the_weights_stay(tmp_path: Path, guard: str, value: float, loss: str) -> None:
    module, other = Net(), Net()
    trainer = trainer_of(tmp_path, nan_policy="raise", max_epochs=3, log_every_n_steps=1)
    data = batches(5, value=value)
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit(module, DataLoader(torch.cat(data), 4))
    error = raised.value
    path = tmp_path / "nonfinite-step=5.json"
    assert str(error) == (
        f'nan_policy="raise": No update for step 5 (epoch 0, batch 5): the loss is {loss}, and the gradient of '
        "net.0.weight is not finite. Weights and optimizer state are as before it. "
        f"trainer.replay({str(path)!r}) fetches the batch again, with the same draws."
    )
    assert (error.step, error.epoch, error.batch_idx, error.parameter) == (5, 0, 5, "net.0.weight")
    assert error.loss != error.loss
    assert isinstance(error, FloatingPointError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    optimizers = by_hand(other, data[:5], ())
    assert same(module, other)
    assert same_state(trainer.optimizers[0], optimizers[0])
    assert torch.equal(trainer.replay(path)[1:], data[5][1:])


def test_raise_says_when_the_loss_itself_is_fine(tmp_path: Path, guard: str) -> None:
    trainer = trainer_of(tmp_path, nan_policy="raise", accumulate_grad_batches=2, log_every_n_steps=1)
    with pytest.raises(NonFiniteError, match=r"the loss is \d\.\d+, but the gradient of net.0.weight is not finite"):
        trainer.fit(BadGradientNet(), loader(2, value=9.0))
    written = json.loads((tmp_path / "nonfinite-step=1.json").read_text())
    assert written["window"] == [2, 3]
    assert float(written["loss"]) == written["loss"] or isinstance(written["loss"], str)


def test_a_device_holds_all_updates_from_the_first_fault_to_the_log_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainkit.nonfinite.looks_at_memory", lambda device: False)
    module, other = Net(), Net()
    trainer = trainer_of(tmp_path, nan_policy="raise", log_every_n_steps=5)
    with pytest.raises(NonFiniteError, match="No update for step 2 "):
        trainer.fit(module, loader(2))
    assert trainer.global_step == 4
    by_hand(other, batches(2)[:2], ())
    assert same(module, other)


def test_nothing_bad_is_saved_before_a_device_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.nonfinite.looks_at_memory", lambda device: False)
    saves = ModelCheckpoint(tmp_path / "ck", every_n_train_steps=2, save_top_k=-1)
    trainer = trainer_of(tmp_path, nan_policy="raise", callbacks=saves, enable_checkpointing=True)
    with pytest.raises(NonFiniteError, match="No update for step 2 "):
        trainer.fit(Net(), loader(2))
    assert os.listdir(tmp_path / "ck") == ["epoch=0-step=2.ckpt"]


def test_what_an_optimizer_counts_on_the_host_is_set_right_when_flags_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainkit.nonfinite.looks_at_memory", lambda device: False)
    monkeypatch.setattr("trainkit.nonfinite.is_on_another_side", lambda value, flag: value.ndim == 0)
    trainer = trainer_of(tmp_path, nan_policy="skip", log_every_n_steps=5)
    counts = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Module, *_: Any) -> None:
            counts.append(float(trainer.optimizers[0].state[module.net[0].weight]["step"]))

    trainer.callbacks.append(Looks())
    trainer.fit(Net(), loader(0, 2))
    assert counts == [1, 2, 3, 4, 3, 4, 5, 6]  # read in the fifth update


# ---------------------------------------------------------------- whoever updates in another way
def test_manual_optimization_is_checked_at_each_step(tmp_path: Path, guard: str) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(MAKE["two"])
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

    module, other = Manual(), Net(MAKE["two"])
    trainer = trainer_of(tmp_path, nan_policy="skip")
    trainer.fit(module, loader(3))
    by_hand(other, batches(3), (3,))
    assert same(module, other)
    assert trainer.skipped_updates == 2


def test_an_optimizer_step_of_the_modules_own_is_not_called_or_taken_back(tmp_path: Path, guard: str) -> None:
    class Own(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    module, other = Own(), Net()
    trainer = trainer_of(tmp_path, nan_policy="skip")
    trainer.fit(module, loader(3))
    by_hand(other, batches(3), (3,))
    assert same(module, other)
    assert trainer.skipped_updates == 1


@pytest.mark.parametrize("bad_evaluation", [1, 2])
def test_an_optimizer_that_computes_the_loss_again_is_taken_back(
    tmp_path: Path, guard: str, bad_evaluation: int
) -> None:
    class Bfgs(Net):
        evaluations = 0

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.evaluations += batch_idx == 1
            return loss * NAN if batch_idx == 1 and self.evaluations == bad_evaluation else loss

    module, other = (Bfgs(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)) for _ in range(2))
    trainer = trainer_of(tmp_path, nan_policy="skip")
    trainer.fit(module, loader(count=3))
    other.evaluations = 100
    made = batches(count=3)
    trainer_of(tmp_path).fit(other, DataLoader(torch.cat([made[0], made[2]]), 4))  # type: ignore[arg-type]
    assert same(module, other)
    assert trainer.skipped_updates == 1


def test_a_float16_overflow_is_the_scalers_and_a_bad_loss_is_a_fault(tmp_path: Path, guard: str) -> None:
    class Overflows(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            output = self.net[0](batch)
            return (output.float() * 60000).mean() if batch_idx < 2 else output.float().square().mean()

    trainer = trainer_of(tmp_path, nan_policy="raise", precision="16-mixed", log_every_n_steps=1)
    module = Overflows()
    before = copy.deepcopy(module.state_dict())
    trainer.fit(module, loader(count=1))
    assert torch.equal(module.state_dict()["net.0.weight"], before["net.0.weight"])  # the scaler held it
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        trainer_of(tmp_path, nan_policy="raise", precision="16-mixed", log_every_n_steps=1).fit(module, loader(3))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_are_checked_too(tmp_path: Path, guard: str, precision: str) -> None:
    trainer = trainer_of(tmp_path, nan_policy="skip", precision=precision)
    module = Net()
    trainer.fit(module, loader(3))
    assert trainer.skipped_updates == 1
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_sparse_and_complex_gradients_are_looked_into(tmp_path: Path, guard: str) -> None:
    class Odd(Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)
            self.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.table(batch.long()) * self.turn).abs().sum() * (NAN if batch_idx == 1 else 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = trainer_of(tmp_path, nan_policy="skip")
    module = Odd()
    trainer.fit(module, DataLoader(torch.arange(4).repeat(3), 4))
    assert trainer.skipped_updates == 1
    assert bool(torch.view_as_real(module.turn).isfinite().all())


# ---------------------------------------------------------------- what it costs
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal")


class Reads(TorchDispatchMode):
    """Count what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in READS or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_nothing_is_read_from_a_device_between_log_points(tmp_path: Path, guard: str, policy: str) -> None:
    class Watches(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:  # the first update makes the optimizer's state
                reads.__enter__()
            elif batch_idx == 7:
                reads.__exit__(None, None, None)

    reads = Reads()
    bad = (4,) if policy == "skip" else ()
    trainer_of(tmp_path, nan_policy=policy, callbacks=Watches()).fit(Net(MAKE["momentum"]), loader(*bad))
    assert not reads.counts


def test_off_adds_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.fit(Net(), loader(3))
    assert trainer.nan_policy == "off"
    assert trainer.update.guard is None
    assert trainer.update.step == trainer.precision_plugin.step


def test_another_word_is_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"nan_policy must be 'off' or 'raise' or 'skip'. Received: 'x'"
    ):
        Trainer(nan_policy="x")  # type: ignore[arg-type]


def test_a_directory_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NonFiniteError, match="Which samples were in the batch could not be written"):
        trainer_of(tmp_path / "file", nan_policy="raise").fit(Net(), loader(1))
