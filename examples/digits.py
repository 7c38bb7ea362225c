"""Read hand-written digits with a small CNN: the first training run, seconds on a CPU, nothing to download.

Run it with `trainkit fit --config configs/digits.yaml`, or without YAML with `python examples/digits.py`.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from trainkit import DataModule, Module, Trainer, seed_everything
from trainkit.callbacks import ModelCheckpoint
from trainkit.errors import MisconfigurationException


class Digits(DataModule):
    """1,797 images of 8x8 pixels, 1,438 to train on and 359 held back; see examples/data/README.md.

    Args:
        root: the folder of digits.csv.gz; None: the one beside this file.
        batch_size: images in a batch of training.
        num_workers: processes that load batches; 0 loads them in the training process.
        split_seed: chooses the images held back. Not the run's seed, so that all runs are measured on the same ones.
    """

    def __init__(
        self, root: str | None = None, batch_size: int = 64, num_workers: int = 0, split_seed: int = 0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        folder = Path(self.hparams.root or Path(__file__).parent / "data")
        images = TensorDataset(*read_digits(folder / "digits.csv.gz"))
        generator = torch.Generator().manual_seed(self.hparams.split_seed)
        self.train, self.held_back = random_split(images, [0.8, 0.2], generator)

    def train_dataloader(self) -> DataLoader[list[Tensor]]:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, num_workers=self.hparams.num_workers)

    def val_dataloader(self) -> DataLoader[list[Tensor]]:
        return DataLoader(self.held_back, self.hparams.batch_size, num_workers=self.hparams.num_workers)

    test_dataloader = predict_dataloader = val_dataloader  # so small a data set has no third part


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images, (N, 1, 8, 8) from 0 to 1, and the digits they show, (N,)."""
    advice = "Get it back with `git checkout examples/data/digits.csv.gz`, or give its folder as the data's root."
    try:
        with gzip.open(path, "rt") as lines:
            rows = torch.tensor([[int(value) for value in line.split(",")] for line in lines])
        if rows.shape[1:] != (65,) or rows[:, :64].max() > 16 or rows[:, 64].max() > 9 or rows.min() < 0:
            raise ValueError("expected rows of 64 pixels (0 to 16) and a digit (0 to 9)")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise MisconfigurationException(f"can't read {path}: {error}. {advice}") from None
    return rows[:, :64].float().reshape(-1, 1, 8, 8) / 16, rows[:, 64]


class DigitsCNN(Module):
    """Three convolutions and a linear layer."""

    def __init__(self, lr: float = 0.003, lr_decay: float = 0.8, width: int = 24, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            *convolution(1, width),
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *convolution(2 * width, 2 * width),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * 4 * 4, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=0.1)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate("val", *batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate("test", *batch)

    def evaluate(self, stage: str, images: Tensor, labels: Tensor) -> None:
        scores = self(images)
        self.log(f"{stage}/loss", F.cross_entropy(scores, labels), prog_bar=True)
        self.log(f"{stage}/acc", (scores.argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=self.hparams.lr_decay)  # once an epoch
        return {"optimizer": optimizer, "lr_scheduler": decay}


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


if __name__ == "__main__":
    seed_everything(42)
    best = ModelCheckpoint(monitor="val/acc", mode="max", save_last=True)
    trainer = Trainer(max_epochs=10, log_every_n_steps=10, callbacks=best, default_root_dir="runs/digits")
    trainer.fit(DigitsCNN(), datamodule=Digits())
