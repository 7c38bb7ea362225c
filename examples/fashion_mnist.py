"""Tell ten kinds of clothing apart with a CNN: 0.92 on the test set after five epochs, minutes on two CPU cores.

Run it with `trainkit fit --config configs/fashion_mnist.yaml`, or without YAML with `python examples/fashion_mnist.py`.
The data, and where it comes from, is in data/fashion.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit import Module, Trainer, seed_everything
from trainkit.callbacks import ModelCheckpoint


class FashionCNN(Module):
    """Five convolutions and a linear layer."""

    def __init__(self, lr: float = 0.005, width: int = 24, dropout: float = 0.1, smoothing: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            convolution(1, width, halve=True),
            convolution(width, 2 * width),
            convolution(2 * width, 2 * width, halve=True),
            convolution(2 * width, 4 * width),
            convolution(4 * width, 4 * width, halve=True),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * width * 3 * 3, 10),
        )
        self.to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    def forward(self, images: Tensor) -> Tensor:
        scores = self.layers(images)
        if not self.training:  # a mirrored shoe is a shoe: two looks are better than one
            scores = (scores + self.layers(images.flip(-1))) / 2
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.hparams.smoothing)
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
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.05)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, self.share_left)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def share_left(self, step: int) -> float:
        """Return what part of the run comes after some updates: the learning rate falls in a straight line to 0."""
        batches = self.trainer.max_epochs * self.trainer.num_training_batches
        return max(0.0, 1 - step * self.trainer.accumulate_grad_batches / batches) if batches > 0 else 1.0


def convolution(inputs: int, outputs: int, halve: bool = False) -> nn.Sequential:
    """A 3x3 convolution with batch norm and ReLU; `halve` pools first, so that the rest has a quarter of the work."""
    pool = nn.MaxPool2d(2) if halve else nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), pool, nn.BatchNorm2d(outputs), nn.ReLU())


if __name__ == "__main__":
    from data.fashion import Fashion  # found beside this file

    seed_everything(42)
    best = ModelCheckpoint(monitor="val/acc", mode="max", save_last=True)
    trainer = Trainer(max_epochs=5, callbacks=best, default_root_dir="runs/fashion_mnist")
    data = Fashion()
    trainer.fit(FashionCNN(), datamodule=data)
    trainer.test(datamodule=data, ckpt_path="best")
