"""Where the time of a fit goes: real waits, each found in the part that it belongs to."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import CSVLogger, Logger

WAIT = 0.01
STEPS = 30


class Net(Module):
    def __init__(self, slow: str = "") -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)
        self.slow = slow

    def wait(self, where: str) -> None:
        if where == self.slow:
            time.sleep(WAIT)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.wait("step")
        loss = self.line(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.wait("validation")
        self.log("val_loss", self.line(batch).square().mean())

    def on_before_backward(self, loss: Tensor) -> None:
        self.wait("own hook")

    def configure_optimizers(self) -> Any:
        return Slow(self.parameters(), self) if self.slow == "optimizer" else torch.optim.SGD(self.parameters(), 0.01)


class Slow(torch.optim.SGD):
    def __init__(self, parameters: Any, net: Net) -> None:
        super().__init__(parameters, 0.01)
        self.net = net

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.net.wait("optimizer")
        super().step()


class Batches:
    def __init__(self, steps: int = STEPS, slow: bool = False) -> None:
        self.steps, self.slow = steps, slow

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.steps):
            time.sleep(WAIT * self.slow)
            yield torch.ones(2, 3)


class Waits(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(WAIT)


class SlowLogger(Logger):
    name, version = "slow", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        time.sleep(WAIT)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def quiet(**settings: Any) -> Trainer:
    given = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": 1}
    return Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **(given | settings))


# ---------------------------------------------------------------- the split
@pytest.mark.parametrize(
    ("slow", "part"),
    [
        ("step", "forward_backward"),
        ("optimizer", "optimizer"),
        ("data", "data_wait"),
        ("own hook", "callbacks"),
        ("callback", "callbacks"),
        ("logger", "logging"),
        ("validation", "validation"),
    ],
)
def test_a_wait_is_found_in_the_part_that_it_belongs_to(slow: str, part: str) -> None:
    settings: dict[str, Any] = {"log_every_n_steps": 1}
    if slow == "callback":
        settings["callbacks"] = [Waits()]
    if slow == "logger":
        settings["logger"] = SlowLogger()
    trainer = quiet(**settings)
    trainer.fit(Net(slow), Batches(slow=slow == "data"), Batches() if slow == "validation" else None)
    seconds = trainer.report_timing().seconds
    least = WAIT * (STEPS - 3)  # the first step is kept apart, and its data may be loaded one batch ahead
    assert seconds[part] >= least
    assert max(seconds, key=lambda name: seconds[name]) == part


def test_the_parts_make_up_the_whole_and_the_first_step_is_kept_apart() -> None:
    class Warms(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            time.sleep(0.2 if batch_idx == 0 else 0.001)
            return super().training_step(batch, batch_idx)

    trainer = quiet()
    began = time.perf_counter()
    trainer.fit(Warms(), Batches(50))
    passed = time.perf_counter() - began
    report = trainer.report_timing()
    assert report.steps == 49
    assert report.first_step >= 0.2
    assert 0.049 <= report.total <= passed - 0.2
    assert report.seconds["forward_backward"] < 0.2
    assert report.seconds.keys() == {
        "data_wait", "transfer", "forward_backward", "optimizer", "callbacks", "logging", "checkpoint", "validation",
        "other",
    }  # fmt: skip


def test_time_in_a_transfer_hook_is_transfer() -> None:
    class Moves(Net):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            time.sleep(WAIT)
            return batch

    trainer = quiet()
    trainer.fit(Moves(), Batches())
    assert trainer.report_timing().seconds["transfer"] >= WAIT * (STEPS - 1)


def test_writing_a_checkpoint_is_its_own_part(tmp_path: Path) -> None:
    class Heavy(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            time.sleep(0.1)

    trainer = quiet(callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=10)], enable_checkpointing=True)
    trainer.fit(Heavy(), Batches())
    report = trainer.report_timing()
    assert report.seconds["checkpoint"] >= 0.3
    assert report.owners["ModelCheckpoint"] >= 0.3
    assert report.seconds["callbacks"] < 0.1


def test_every_owner_of_hooks_has_its_time() -> None:
    trainer = quiet(callbacks=[Waits(), Waits(), Callback()])
    trainer.fit(Net("own hook"), Batches())
    owners = trainer.report_timing().owners
    assert owners["Waits"] >= 2 * WAIT * STEPS  # callbacks of one class together
    assert owners["Net"] >= WAIT * STEPS
    assert owners.keys() == {"Waits", "Net"}  # nobody who has no hook


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 4}, {"limit_train_batches": 7, "max_epochs": 3}])
def test_every_batch_counts(settings: dict[str, Any]) -> None:
    trainer = quiet(**settings)
    trainer.fit(Net(), Batches())
    assert trainer.report_timing().steps + 1 == trainer.progress.total_batch


def test_an_epoch_that_is_skipped_does_no_harm() -> None:
    class Skips(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 5 else None

    trainer = quiet(max_epochs=3)
    trainer.fit(Skips("step"), Batches())
    report = trainer.report_timing()
    assert report.steps + 1 == 15
    assert report.seconds["forward_backward"] >= 14 * WAIT


def test_many_steps_without_a_log_point_keep_no_more_than_some_of_their_times() -> None:
    trainer = quiet(log_every_n_steps=0)
    kept = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            kept.append(len(trainer.timing.laps))

    trainer.callbacks.append(Looks())
    trainer.fit(Net(), Batches(2500))
    assert max(kept) <= 1000
    assert trainer.report_timing().steps == 2499


def test_the_report_is_that_of_the_last_fit() -> None:
    trainer = quiet()
    assert str(trainer.report_timing()) == "no timing yet: a fit of at least two steps has one"
    trainer.fit(Net(), Batches(10))
    trainer.validate(Net(), Batches(10), verbose=False)
    assert trainer.report_timing().steps == 9
    trainer.fit(Net(), Batches(5))
    assert trainer.report_timing().steps == 0  # max_epochs was reached: nothing was trained


def test_a_running_fit_can_be_asked() -> None:
    class Asks(Callback):
        steps = -1

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 9:
                self.steps = trainer.report_timing().steps

    asks = Asks()
    quiet(callbacks=[asks]).fit(Net(), Batches())
    assert asks.steps == 8  # the first is kept apart, the one that runs is not over


# ---------------------------------------------------------------- the table
def test_the_table_has_a_line_for_every_part_and_fits_80_columns() -> None:
    trainer = quiet(callbacks=[Waits()])
    trainer.fit(Net(), Batches())
    lines = str(trainer.report_timing()).splitlines()
    assert [line[:20].strip() for line in lines[1:11]] == [
        "part", "data wait", "transfer", "forward + backward", "optimizer", "callbacks", "logging", "checkpoint",
        "validation", "the loop",
    ]  # fmt: skip
    assert max(len(line) for line in lines if not line.startswith("advice")) <= 80
    assert any(line.split()[:3] == ["hooks", "of", "Waits"] for line in lines)


# ---------------------------------------------------------------- what is logged
def rows(trainer: Trainer) -> list[dict[str, str]]:
    with (Path(trainer.log_dir or "") / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_split_is_logged_with_the_training_rows(tmp_path: Path) -> None:
    trainer = quiet(logger=CSVLogger(tmp_path), log_every_n_steps=5)
    trainer.fit(Net("step"), Batches(60))
    timed = [row for row in rows(trainer) if row["time/forward_backward"]]
    assert timed
    assert timed[0]["step"] == "44"
    assert timed[0]["loss"]
    assert float(timed[0]["time/forward_backward"]) >= WAIT  # seconds a step
    assert {name for name in timed[0] if name.startswith("time/")} == {
        f"time/{part}"
        for part in ("data_wait", "transfer", "forward_backward", "optimizer", "callbacks", "logging", "checkpoint")
    }
    assert not [name for name in trainer.callback_metrics if name.startswith("time/")]


def test_the_split_is_logged_once_a_second_at_most(tmp_path: Path) -> None:
    trainer = quiet(logger=CSVLogger(tmp_path), log_every_n_steps=1)
    began = time.perf_counter()
    trainer.fit(Net("step"), Batches(200))
    passed = time.perf_counter() - began
    timed = [row for row in rows(trainer) if row["time/optimizer"]]
    assert len(rows(trainer)) == 200
    assert 2 <= len(timed) <= 1 + passed


def test_a_handful_of_steps_logs_what_they_logged_themselves(tmp_path: Path) -> None:
    trainer = quiet(logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Net(), Batches())
    assert rows(trainer)[0].keys() == {"epoch", "step", "loss"}


def test_nothing_is_logged_where_there_are_no_log_points(tmp_path: Path) -> None:
    trainer = quiet(logger=CSVLogger(tmp_path), log_every_n_steps=0)
    trainer.fit(Net(), Batches())
    assert not Path(trainer.log_dir or "", "metrics.csv").exists()


# ---------------------------------------------------------------- cuda
@pytest.mark.gpu
def test_on_a_gpu_the_time_is_the_device_s() -> None:
    class Computes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.big = nn.Linear(4096, 4096)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = torch.ones(4096, 4096, device=self.device)
            for _ in range(10):
                x = self.big(x).relu()
            return self.line(batch[0]).square().mean() + x.mean()

    trainer = Trainer(
        accelerator="gpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Computes(), DataLoader(TensorDataset(torch.ones(200, 3)), 2))
    torch.cuda.synchronize()
    report = trainer.report_timing()
    assert report.share("forward_backward") > 0.5
    assert trainer.timing.idle is not None
