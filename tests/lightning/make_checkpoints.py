"""Make the files in checkpoints/ with Lightning itself: `pip install lightning`, then `python make_checkpoints.py`.

Each run is three epochs of five batches in a fixed order. expected.json has the weights that the uninterrupted run ends
with, which a run resumed from one of its files must end with too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).parent / "checkpoints"


class Line(lightning.LightningModule):
    def __init__(self, lr: float = 0.1, optimizer: str = "Adam", betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.hparams.optimizer)(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"answer": 42}


class Numbers(lightning.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen = 0

    def train_dataloader(self) -> Any:
        x = torch.arange(40.0).reshape(20, 2) / 40
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) * 2 - 1), batch_size=self.hparams.batch_size)

    val_dataloader = train_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 7}


class Save(Callback):
    """Save after a batch of an epoch, or after an epoch."""

    def __init__(self, path: Path, epoch: int, batch: int | None, weights_only: bool = False) -> None:
        self.path, self.epoch, self.batch, self.weights_only = path, epoch, batch, weights_only

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            trainer.save_checkpoint(self.path, self.weights_only)


def run(name: str, save: Save | None = None, callbacks: list[Any] | None = None, **settings: Any) -> list[float]:
    module = Line(**settings.pop("module", {}))
    trainer = lightning.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [*([save] if save else []), *(callbacks or [])],
            "enable_checkpointing": bool(callbacks),
            "num_sanity_val_steps": 0,
            **settings,
        }
    )
    trainer.fit(module, datamodule=Numbers())
    return [*module.layer.weight.flatten().tolist(), *module.layer.bias.tolist()]


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    expected = {}
    expected["middle"] = run("middle", Save(HERE / "middle.ckpt", 1, 2))
    run("weights", Save(HERE / "weights.ckpt", 1, 2, weights_only=True))
    expected["accumulate"] = run("accumulate", Save(HERE / "accumulate.ckpt", 1, 3), accumulate_grad_batches=2)
    scaled = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))}
    expected["scaled"] = run("scaled", Save(HERE / "scaled.ckpt", 1, 2), **scaled)
    expected["bf16"] = run("bf16", Save(HERE / "bf16.ckpt", 1, 2), precision="bf16-mixed")
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, "best-{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
        expected["callbacks"] = run("callbacks", callbacks=[EarlyStopping("val_loss", patience=5), best])
        shutil.copy(Path(folder) / "best-epoch=1.ckpt", HERE / "callbacks.ckpt")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
