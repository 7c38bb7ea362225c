"""What holds for every callback. One that is exported and not in the table below fails the first test."""

from __future__ import annotations

import copy
import fcntl
import io
import os
import pickle
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, DataModule, Module, Trainer, seed_everything
from trainkit import callbacks as C
from trainkit.loggers import CSVLogger

torch.set_num_threads(1)


# ---------------------------------------------------------------------- what they are tried on
class Net(Module):
    """A backbone and a head, with batch normalization and dropout, so that a wrong batch or random number shows."""

    def __init__(self, batch_size: int = 4, lr: float = 0.05) -> None:
        super().__init__()
        self.batch_size, self.lr, self.flops_per_batch = batch_size, lr, 100
        self.backbone = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.2))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.backbone(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


class Data(DataModule):
    """Four shuffled batches of four to train on, two to validate and to predict."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        self.samples = TensorDataset(x, x.sum(1, keepdim=True))

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.samples[:8]), self.batch_size)

    def predict_dataloader(self) -> Any:
        return self.val_dataloader()


class Saver(Callback):
    """Save inside the second epoch and after it."""

    STEPS = (6, 8)

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.progress.total_batch in self.STEPS:
            trainer.save_checkpoint(f"at-{trainer.progress.total_batch}.ckpt")


# ---------------------------------------------------------------------- the table
class UnfreezeHead(C.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.head)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.head, optimizer)


class FreezeNothing(UnfreezeHead):
    def freeze_before_training(self, pl_module: Any) -> None:
        """Leave all as it is."""

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Leave all as it is."""


class Never(C.WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return False


class Writer(getattr(C, "BasePredictionWriter", Callback)):  # type: ignore[misc]
    def write_on_batch_end(self, *_: Any) -> None:
        Path("predictions.txt").write_text("written")


def one(epoch: int) -> float:
    return 1.0


def look(*_: Any) -> None:
    """Do nothing, where a function is wanted that can be pickled."""


def size_of(batch: list[Tensor]) -> int:
    return len(batch[0])


Make = Callable[[], Callback]


@dataclass
class Case:
    """One callback, and what may be expected of it.

    Args:
        make: makes it so that it has something to do in three epochs.
        idle: makes it so that training must not feel it; None: there is no such way.
        prints: whether it must write something.
        moves_cursor: whether it does so in a file, too.
        states: what is the same in the states of an uninterrupted and a resumed run.
    """

    make: Make
    idle: Make | None
    prints: bool = False
    moves_cursor: bool = False
    states: Callable[[dict[str, Any]], Any] = dict


def case(make: Make, **expected: Any) -> Case:
    """Return the case of a callback that training must never feel."""
    return Case(make, make, **expected)


CASES = {
    "BackboneFinetuning": Case(
        lambda: C.BackboneFinetuning(1, verbose=True), lambda: C.BackboneFinetuning(0, one, 1.0), prints=True
    ),
    "BaseFinetuning": Case(UnfreezeHead, FreezeNothing),
    "BasePredictionWriter": case(lambda: Writer("batch")),
    "BatchSizeFinder": Case(lambda: C.BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=2), None),
    "Callback": case(Callback),
    "Checkpoint": case(C.Checkpoint),
    "DeviceStatsMonitor": case(lambda: C.DeviceStatsMonitor(cpu_stats=False)),
    "EMAWeightAveraging": Case(
        lambda: C.EMAWeightAveraging(decay=0.7), lambda: C.EMAWeightAveraging(update_every_n_steps=0)
    ),
    "EarlyStopping": Case(
        lambda: C.EarlyStopping("val_loss", min_delta=9.0, patience=2, verbose=True),
        lambda: C.EarlyStopping("val_loss", patience=9),
        prints=True,
    ),
    "GradientAccumulationScheduler": Case(
        lambda: C.GradientAccumulationScheduler({1: 2}), lambda: C.GradientAccumulationScheduler({1: 1})
    ),
    "LambdaCallback": case(lambda: C.LambdaCallback(on_train_batch_end=look, on_exception=look)),
    "LearningRateFinder": Case(
        lambda: C.LearningRateFinder(num_training_steps=5), lambda: C.LearningRateFinder(update_attr=False)
    ),
    "LearningRateMonitor": case(lambda: C.LearningRateMonitor(log_momentum=True, log_weight_decay=True)),
    "ModelCheckpoint": case(lambda: C.ModelCheckpoint("checkpoints", monitor="val_loss"), states=sorted),
    "ModelPruning": Case(
        lambda: C.ModelPruning("l1_unstructured", amount=0.3, verbose=2),
        lambda: C.ModelPruning("l1_unstructured", amount=0),
        prints=True,
    ),
    "ModelSummary": case(C.ModelSummary, prints=True),
    "OnExceptionCheckpoint": case(lambda: C.OnExceptionCheckpoint("rescued")),
    "ProgressBar": case(C.ProgressBar),
    "RichModelSummary": case(lambda: C.RichModelSummary(), prints=True),
    "RichProgressBar": case(C.RichProgressBar, prints=True),
    "SpikeDetection": case(lambda: C.SpikeDetection(warmup=99)),
    "StochasticWeightAveraging": Case(
        lambda: C.StochasticWeightAveraging(0.02, swa_epoch_start=2),
        lambda: C.StochasticWeightAveraging(0.02, swa_epoch_start=9),
    ),
    "TQDMProgressBar": case(lambda: C.TQDMProgressBar(), prints=True, moves_cursor=True),
    "ThroughputMonitor": case(lambda: C.ThroughputMonitor(batch_size_fn=size_of, window_size=2)),
    "Timer": case(lambda: C.Timer("00:01:00:00"), states=sorted),  # it measures
    "WeightAveraging": Case(C.WeightAveraging, Never),
}
NO_CALLBACKS = {"RichProgressBarTheme"}  # exported beside the callbacks that take them
COMING = {"BatchSizeFinder", "LearningRateFinder"}
"""What is in the table before it is exported."""
NAMES = sorted(CASES.keys() & set(C.__all__))


def fit(
    *callbacks: Callback,
    module: Module | None = None,
    seed: int = 1,
    ckpt_path: str | None = None,
    epochs: int = 3,
    **settings: Any,
) -> tuple[Module, Trainer]:
    """Train for three epochs, from the same weights and in the same order for the same seed."""
    seed_everything(seed, verbose=False)
    module = module or Net()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=CSVLogger("logs"),
        log_every_n_steps=1,
        enable_progress_bar=any(isinstance(callback, C.ProgressBar) for callback in callbacks),
        enable_model_summary=any(isinstance(callback, C.ModelSummary) for callback in callbacks),
        enable_checkpointing=any(callback.saves for callback in callbacks),
        **settings,
    )
    trainer.fit(module, datamodule=Data(), ckpt_path=ckpt_path)
    return module, trainer


def same(one: Any, other: Any) -> bool:
    """Whether two states have the same values, tensors bit for bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


# ---------------------------------------------------------------------- what holds for all
def test_every_exported_callback_is_in_the_table() -> None:
    exported = set(C.__all__) - NO_CALLBACKS
    assert exported - CASES.keys() == set()
    assert CASES.keys() - exported <= COMING


@pytest.mark.parametrize("name", NAMES)
def test_training_does_not_feel_it_when_it_should_not(name: str) -> None:
    idle = CASES[name].idle
    if idle is None:
        pytest.skip("it always changes something")
    settings = {"fused_optimizers": False}  # a group that BackboneFinetuning adds has torch's own update
    (with_it, trainer), (without, plain) = fit(idle(), **settings), fit(**settings)
    assert same(with_it.state_dict(), without.state_dict())
    optimizers = [run.optimizers[0].state_dict()["state"] for run in (trainer, plain)]
    assert len(optimizers[0]) == len(optimizers[1])
    assert trainer.global_step == plain.global_step == 12
    assert trainer.callback_metrics["train_loss"] == plain.callback_metrics["train_loss"]


@pytest.mark.parametrize("name", NAMES)
def test_its_state_makes_the_round_trip_as_plain_data(name: str) -> None:
    callback, other = CASES[name].make(), CASES[name].make()
    fit(callback)
    state = callback.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(loaded, state)
    if state:
        other.load_state_dict(copy.deepcopy(loaded))
        assert same(other.state_dict(), state)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_does_the_same_before_and_after_a_fit(name: str) -> None:
    callback = CASES[name].make()
    early = pickle.loads(pickle.dumps(callback))
    first, _ = fit(callback)
    late = pickle.loads(pickle.dumps(copy.deepcopy(callback)))
    assert same(CASES[name].states(late.state_dict()), CASES[name].states(callback.state_dict()))
    for copy_of_it in (early, late):
        again, _ = fit(copy_of_it)
        assert same(again.state_dict(), first.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_one_instance_serves_two_fits_in_a_row(name: str) -> None:
    callback = CASES[name].make()
    fit(callback)
    second, trainer = fit(callback, seed=2)
    fresh, plain = fit(CASES[name].make(), seed=2)
    assert same(second.state_dict(), fresh.state_dict())
    assert trainer.global_step == plain.global_step


@pytest.mark.filterwarnings("ignore:[\\s\\S]*set up differently")  # the seed, on purpose
@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_inside_or_after_an_epoch_ends_bit_identical(name: str) -> None:
    make, states = CASES[name].make, CASES[name].states
    callback = make()
    whole, trainer = fit(callback, Saver())
    for batch in Saver.STEPS:
        resuming = make()
        resumed, run = fit(resuming, Saver(), seed=5, ckpt_path=f"at-{batch}.ckpt")
        assert same(resumed.state_dict(), whole.state_dict()), f"from batch {batch}"
        assert run.global_step == trainer.global_step
        assert same([o.state_dict() for o in run.optimizers], [o.state_dict() for o in trainer.optimizers])
        assert same(states(resuming.state_dict()), states(callback.state_dict()))


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_part_in_all_four_methods(name: str) -> None:
    callback = CASES[name].make()
    module, trainer = fit(callback, epochs=1)
    weights = copy.deepcopy(module.state_dict())
    trainer.validate(module, datamodule=Data(), verbose=False)
    trainer.predict(module, datamodule=Data())
    assert same(module.state_dict(), weights)


@pytest.mark.parametrize("terminal", [True, False])
def test_it_writes_for_a_terminal_and_for_a_file(terminal: bool, in_tmp_path: Path) -> None:
    text = played(terminal)
    scenes = dict(scene.split("\n", 1) for scene in text.replace("\r\n", "\n").split("=== ")[1:])
    scenes.pop("end")
    assert sorted(scenes) == NAMES
    silent = [name for name in NAMES if CASES[name].prints and not scenes[name].strip()]
    assert not silent
    if not terminal:
        assert not [name for name in NAMES if "\x1b" in scenes[name] and not CASES[name].moves_cursor]
    assert "Traceback" not in text
    assert "Warning" not in text


def played(terminal: bool) -> str:
    """Run this file as a program, which plays a scene for each callback, and return what it wrote."""
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("CI", "NO_COLOR"):
        environment.pop(name, None)
    command = [sys.executable, __file__]
    if not terminal:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        written = bytearray()
        while chunk := _read(master):
            written += chunk
    os.close(master)
    assert process.returncode == 0, written.decode()
    return written.decode()


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # how Linux says that nobody holds the other end
        return b""


def play() -> None:
    for name in NAMES:
        print(f"=== {name}", flush=True)
        fit(CASES[name].make())
    print("=== end", flush=True)


if __name__ == "__main__":
    play()
