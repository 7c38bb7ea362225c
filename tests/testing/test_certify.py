"""certify_resume proves that a run is exact, and finds the first difference of one that is not: with real kills."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainkit import DataModule, Module, Trainer
from trainkit.errors import MisconfigurationException
from trainkit.testing import certify_resume


class Augmented(Dataset[Any]):
    """Samples that all three random sources change."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.rand(3) + np.random.rand() + random.random()
        return torch.full((3,), float(index)) + noise


class Net(Module):
    def __init__(self, seconds: float = 0.002) -> None:
        super().__init__()
        self.seconds = seconds
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(self.seconds)
        loss = self.body(batch).square().mean() * (1 + torch.rand(()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.body(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)}


class Data(DataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Augmented(), batch_size=3, shuffle=True, num_workers=1)

    def val_dataloader(self) -> Any:
        return DataLoader(Augmented(), batch_size=6)


def loader() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=3, shuffle=True)


def test_an_ordinary_run_with_workers_dropout_and_augmentation_is_exact() -> None:
    certificate = certify_resume(
        Net, Data, trials=2, kills=2, max_epochs=3, accumulate_grad_batches=2, val_check_interval=3, log_every_n_steps=2
    )
    assert certificate.exact
    assert certificate.steps == 24
    assert certificate.kills > 0
    assert str(certificate) == f"exact: 2 runs of 24 batches, {certificate.kills} kills, no difference"


def test_state_that_is_in_no_checkpoint_is_found() -> None:
    class Forgetful(Net):
        seen = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen += 1
            return super().training_step(batch, batch_idx) * self.seen

    with pytest.raises(AssertionError, match=r"step .*, output loss: expected .* keeps state that is in no checkpoint"):
        certify_resume(lambda: Forgetful(0.005), loader, trials=10, kills=2, max_epochs=4, save_every=2)


def test_data_that_draw_from_a_generator_of_their_own_are_found() -> None:
    class Own(Augmented):
        def __init__(self) -> None:
            self.generator = np.random.default_rng(0)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.full((3,), float(index) + self.generator.random())

    with pytest.raises(AssertionError, match=r"step .*, batch: expected .* random generator of its own"):
        certify_resume(
            lambda: Net(0.005),
            lambda: DataLoader(Own(), batch_size=3, shuffle=True),
            trials=10,
            max_epochs=4,
            save_every=2,
        )


def test_a_run_that_differs_without_being_killed_is_told_from_one_that_does_not_resume() -> None:
    class Clocked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("seconds", time.perf_counter())
            return super().training_step(batch, batch_idx)

    with pytest.raises(AssertionError, match=r"not deterministic: .* metric seconds"):
        certify_resume(Clocked, loader, max_epochs=1)
    assert certify_resume(Clocked, loader, trials=1, max_epochs=1, ignore=["metric seconds"], logger=False).exact


def test_a_run_that_fails_shows_what_it_printed() -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise KeyError("a mistake of my own")

    with pytest.raises(MisconfigurationException, match=r"exit code 1. It printed:[\s\S]*a mistake of my own"):
        certify_resume(Broken, loader, max_epochs=1)


def test_a_trainer_of_ones_own_can_be_certified_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu", max_steps=12, default_root_dir=tmp_path, enable_progress_bar=False, log_every_n_steps=1
        )

    data = TensorDataset(torch.arange(36.0).view(12, 3))

    class Unpacked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch[0], batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch[0], batch_idx)

    assert certify_resume(
        Unpacked, lambda: (DataLoader(data, 2, shuffle=True), DataLoader(data, 4)), trainer, trials=1
    ).exact
    assert not os.listdir(tmp_path)


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainkit", "certify", *words], cwd=cwd, capture_output=True, text=True, timeout=300
    )


MODULE = """
import torch
from trainkit import Module

class Net(Module):
    def __init__(self, state: bool = False):
        super().__init__()
        self.layer, self.state, self.seen = torch.nn.Linear(2, 1), state, 0

    def training_step(self, batch, batch_idx):
        self.seen += self.state
        return self.layer(batch).square().mean() * (1 + self.seen) + torch.rand(())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(60, 2), batch_size=2, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
"""


def test_the_command_certifies_a_config(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 2, accelerator: cpu}\nmodel: {class_path: mine.Net}\n")
    done = command("--config", "config.yaml", "--trials", "1", "--kills", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "a second one: the same to the last bit"
    assert done.stdout.splitlines()[-1].startswith("exact: 1 runs of 60 batches")
    assert not set(os.listdir(tmp_path)) - {"__pycache__", "config.yaml", "mine.py"}


def test_the_command_says_what_it_cannot_read(tmp_path: Path) -> None:
    assert command("--help", cwd=tmp_path).stdout.startswith("trainkit certify: kill a training run")
    for words, message in [
        ((), "error: certify needs a run"),
        (("--trials", "many"), "error: --trials must be a whole number, not 'many'"),
        (("--config", "x.yaml", "--ckpt_path", "last"), "error: certify begins a run of its own"),
    ]:
        done = command(*words, cwd=tmp_path)
        assert (done.returncode, done.stderr.splitlines()[0]) == (2, message)
    failed = command("--config", "none.yaml", cwd=tmp_path)
    assert failed.returncode == 2
    assert "none.yaml" in failed.stderr


def test_a_misspelt_certify_is_recognised(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "trainkit", "certfy"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'certify'?" in done.stderr
