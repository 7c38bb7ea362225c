"""Real runs in real processes, killed with SIGKILL at random instants again and again; the slow test is a campaign."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from trainkit import DataModule, Module
from trainkit.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from trainkit.data import CombinedLoader
from trainkit.testing import Certificate, certify_resume


class Augmented(Dataset[Any]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        flip = -1 if random.random() < 0.5 else 1
        return flip * torch.full((4,), index / self.length) + torch.randn(4) * np.random.uniform(0.5, 1.5)


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(0.002)  # or half of all kills would find it starting
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        mixed = float(np.random.beta(1, 1)) + 0.1 * random.random()
        loss = torch.stack([self.body(mixed * part + torch.rand(())).square().mean() for part in parts]).sum()
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(parts[0]))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.body(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Data(DataModule):
    """As many workers as the process number says: another number in each attempt."""

    def loader(self, length: int, **options: Any) -> DataLoader[Any]:
        workers = os.getpid() % 3
        persistent = workers > 0 and os.getpid() % 2 == 0
        return DataLoader(Augmented(length), num_workers=workers, persistent_workers=persistent, **options)

    def train_dataloader(self) -> Any:
        return self.loader(70, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return self.loader(10, batch_size=4)


class TwoLoaders(Data):
    def train_dataloader(self) -> Any:
        loaders = {"a": super().train_dataloader(), "b": self.loader(30, batch_size=3, shuffle=True)}
        return CombinedLoader(loaders, "max_size_cycle")


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation and clipping": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
    "float16, validated inside the epoch": {"precision": "16-mixed", "val_check_interval": 5},
    "the best of a metric": {
        "callbacks": lambda: [
            ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
            EarlyStopping("val_loss", patience=5),
        ],
        "val_check_interval": 0.3,
    },
    "averaged weights": {"callbacks": lambda: [EMAWeightAveraging(decay=0.9)]},
    "two loaders": {"data": TwoLoaders},
}


def certify(name: str, trials: int, kills: int, seed: int = 0) -> Certificate:
    settings = {"max_epochs": 3, "log_every_n_steps": 4, "num_sanity_val_steps": 0, **SETTINGS[name]}
    callbacks, data = settings.pop("callbacks", list), settings.pop("data", Data)

    def trainer() -> Any:
        from trainkit import Trainer

        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(accelerator="cpu", callbacks=callbacks(), **quiet, **settings)

    return certify_resume(Net, data, trainer, trials=trials, kills=kills, seed=seed, save_every=3)


def test_a_run_with_workers_that_come_and_go_survives_two_kills() -> None:
    assert certify("plain", trials=1, kills=2).exact


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_runs_survive_hundreds_of_kills(name: str) -> None:
    certificate = certify(name, trials=12, kills=5, seed=list(SETTINGS).index(name))
    print(f"{name}: {certificate}")  # shown with -s; the counts go into docs/reliability.md
    assert certificate.exact
    assert certificate.kills >= 30
