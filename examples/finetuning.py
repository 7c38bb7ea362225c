"""Fine-tune a torchvision backbone: train a new head first, then the backbone with it.

Run it with `trainkit fit --config configs/finetuning.yaml`, or without YAML with `python -m examples.finetuning`,
which shows what a trained backbone is worth. The task is to read the digits 5 to 9 after seeing only eight images of
each.

Weights trained on ImageNet are torchvision's to download: `--model.weights DEFAULT`. Nobody has measured those here.
The numbers are of a small stand-in that needs no network, a trunk trained on all images of the digits 0 to 4: with
it, 0.84 of the 190 images held back are read right after 16 epochs, and 0.35 when the backbone begins with random
weights (script, 35 seconds of one CPU core for all).
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from examples.digits import Digits
from trainkit import Module, Trainer, seed_everything
from trainkit.callbacks import BackboneFinetuning


class SomeDigits(Digits):
    """The images of some digits only.

    Args:
        digits: which ones; their labels are their places in this list.
        per_digit: how many images of each to train on; None for all. Those held back are always all.
        batch_size: images in a batch of training.
    """

    def __init__(self, digits: list[int], per_digit: int | None = None, batch_size: int = 20) -> None:
        super().__init__(batch_size=batch_size)
        self.save_hyperparameters("digits", "per_digit")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train = self.chosen(self.train, self.hparams.per_digit)
        self.held_back = self.chosen(self.held_back, None)

    def chosen(self, images: Subset[list[Tensor]], per_digit: int | None) -> Subset[tuple[Tensor, int]]:
        places: dict[int, list[int]] = {digit: [] for digit in self.hparams.digits}
        for place, (_, digit) in enumerate(images):
            if int(digit) in places:
                places[int(digit)].append(place)
        return Subset(images, [place for found in places.values() for place in found[:per_digit]])

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        images, digits = batch
        known = torch.tensor(self.hparams.digits, device=digits.device)
        return [images, (digits[:, None] == known).int().argmax(dim=1)]


class FineTuned(Module):
    """A torchvision backbone with a new head. BackboneFinetuning freezes `backbone` and thaws it later.

    Args:
        classes: how many there are to tell apart.
        name: which of torchvision's networks with a last layer `fc`.
        weights: "DEFAULT" downloads torchvision's; None begins with random ones.
        trunk: a checkpoint of this class, whose backbone is taken instead.
        lr: of the head; the backbone's begins at a tenth of it.
    """

    def __init__(
        self,
        classes: int = 5,
        name: str = "resnet18",
        weights: str | None = None,
        trunk: str | None = None,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = torchvision.models.get_model(name, weights=weights)
        self.head = nn.Linear(self.backbone.fc.in_features, classes)
        self.backbone.fc = nn.Identity()
        if trunk is not None:
            trained = FineTuned.load_from_checkpoint(trunk, weights=None, trunk=None)
            self.backbone.load_state_dict(trained.backbone.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        larger = F.interpolate(images, scale_factor=4, mode="bilinear")  # 32x32, in three equal colours
        return self.head(self.backbone(larger.expand(-1, 3, -1, -1)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/acc", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]  # the rest joins later
        return torch.optim.AdamW(trained, self.hparams.lr)


def a_fifth_more(epoch: int) -> float:
    """Return by what the backbone's learning rate is multiplied before each epoch; BackboneFinetuning's own is 2."""
    return 1.2


if __name__ == "__main__":
    for trunk in (None, "digits 0 to 4"):
        seed_everything(42)
        if trunk is not None:
            trainer = Trainer(max_epochs=3, log_every_n_steps=10, default_root_dir="runs/finetuning")
            trainer.fit(FineTuned(), datamodule=SomeDigits([0, 1, 2, 3, 4]))
            trunk = trainer.checkpoint_callback.best_model_path
        schedule = BackboneFinetuning(unfreeze_backbone_at_epoch=6, lambda_func=a_fifth_more, train_bn=False)
        trainer = Trainer(max_epochs=16, callbacks=schedule, log_every_n_steps=1, default_root_dir="runs/finetuning")
        trainer.fit(FineTuned(trunk=trunk), datamodule=SomeDigits([5, 6, 7, 8, 9], per_digit=8))
