"""A run that a signal ends, wherever it comes, goes on to the same end as one that nobody ended."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from trainkit.loggers import CSVLogger


class Noisy(Dataset[Any]):
    """Samples that are drawn anew each time."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index / 24, random.random(), np.random.rand()]).float() + 0.1 * torch.rand(3)


class Net(Module):
    """Dropout, a running mean, a metric of half an epoch, a validation that draws: all the state that a run has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch + 0.01 * torch.rand(3)) - batch.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.net(batch + 0.01 * torch.rand(3)).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sends(Callback):
    """Send a signal from a hook, once."""

    def __init__(self, hook: str, count: int, number: int = signal.SIGTERM) -> None:
        self.validated = 0

        def sends(trainer: Trainer, *arguments: Any) -> None:
            nonlocal count
            count -= 1
            if count == 0 and not trainer.sanity_checking:
                os.kill(os.getpid(), number)

        setattr(self, hook, sends)

    def on_validation_end(self, trainer: Trainer, module: Module) -> None:
        self.validated += not trainer.sanity_checking


def run(root: Path, *also: Callback, resume: bool = False, several: bool = False, **settings: Any) -> Trainer:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    metric = "val_loss/dataloader_idx_0" if several else "val_loss"
    best = ModelCheckpoint(monitor=metric, every_n_train_steps=settings.pop("every_n_train_steps", None))
    trainer = Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 3, "logger": CSVLogger(root), "log_every_n_steps": 1,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "val_check_interval": 3, "default_root_dir": root,
            "callbacks": [EarlyStopping(metric, patience=50), best, *also], **settings,
        }
    )  # fmt: skip
    train, val = (DataLoader(Noisy(), 4, shuffle=shuffle) for shuffle in (True, False))
    trainer.fit(Net(), train, [val, val] if several else val, ckpt_path="last" if resume else None)
    return trainer


def state(trainer: Trainer) -> dict[str, Any]:
    """Everything that two runs must end with."""
    rows = (Path(trainer.log_dir or "") / "metrics.csv").read_text()
    best = trainer.checkpoint_callback
    return {
        "weights": {k: v.tolist() for k, v in trainer.module.state_dict().items()},
        "optimizer": repr(trainer.optimizers[0].state_dict()),
        "schedule": repr(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
        "progress": trainer.progress.state_dict(),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "rows": rows,
        "seen": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "early": trainer.early_stopping_callback.state_dict(),
        "best": (Path(best.best_model_path).name, float(best.best_model_score)),
    }


def check_exact(tmp_path: Path, sends: Sends, *also: Callable[[], Callback], **settings: Any) -> None:
    """Compare a run that a signal ends and that is resumed with one that nobody ends."""
    whole = state(run(tmp_path / "whole", *[make() for make in also], **settings))
    with pytest.raises(SystemExit) as left:
        run(tmp_path / "cut", *[make() for make in also], sends, **settings)
    assert left.value.code == 143
    again = state(run(tmp_path / "cut", *[make() for make in also], resume=True, **settings))
    for key, value in whole.items():
        assert again[key] == value, key


HOOKS = [
    ("on_train_start", 1),
    ("on_train_epoch_start", 2),
    ("on_train_batch_start", 3),
    ("on_before_optimizer_step", 5),
    ("on_train_batch_end", 6),
    ("on_train_batch_end", 16),
    ("on_validation_start", 2),
    ("on_validation_start", 4),
    ("on_validation_batch_start", 4),
    ("on_validation_batch_end", 15),
    ("on_validation_batch_end", 24),
    ("on_validation_end", 3),
    ("on_train_epoch_end", 1),
    ("on_save_point", 4),
    ("on_save_checkpoint", 2),
]


@pytest.mark.parametrize(("hook", "count"), HOOKS)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "max_steps": 8}])
def test_a_run_ended_at_any_moment_goes_on_exactly(
    tmp_path: Path, hook: str, count: int, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    check_exact(tmp_path, Sends(hook, count), **settings)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 13])
def test_a_validation_is_left_at_once_and_begun_again_on_resume(
    tmp_path: Path, several: bool, batch: int, capfd: pytest.CaptureFixture[str]
) -> None:
    sends = Sends("on_validation_batch_end", batch)
    check_exact(tmp_path, sends, several=several, every_n_train_steps=3)
    per_validation = 12 if several else 6
    assert sends.validated == (batch - 1) // per_validation  # the one that was cut short did not count


def test_a_validation_that_changed_the_weights_is_finished(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sends = Sends("on_validation_batch_end", 3)  # the average of the weights is in their place
    check_exact(tmp_path, sends, EMAWeightAveraging)
    assert sends.validated == 1


class Counts(Callback):
    """Keep a number that validation batches change."""

    def __init__(self) -> None:
        self.batches = 0

    def on_validation_batch_end(self, trainer: Trainer, module: Module, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        assert self.batches == 36


def test_a_validation_that_a_callback_keeps_something_of_is_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sends = Sends("on_validation_batch_start", 3)
    check_exact(tmp_path, sends, Counts)
    assert sends.validated == 1


def test_a_schedule_that_waits_for_the_validation_of_a_step_has_it_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plateau(module: Net) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        settings = {"scheduler": schedule, "interval": "step", "frequency": 3, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    monkeypatch.setattr(Net, "configure_optimizers", plateau)
    sends = Sends("on_validation_batch_end", 8)
    check_exact(tmp_path, sends)
    assert sends.validated == 2
