"""Train from several loaders at once: a few labelled digits, and many without labels (FixMatch).

Run it with `trainkit fit --config configs/several_loaders.yaml`, or without YAML with
`python -m examples.several_loaders`, which shows what the images without labels are worth. With four labelled images
of each digit and 40 epochs, 0.91 of the images held back are read right, and 0.94 when the others help without labels;
of images with holes, 0.67 and 0.86 (the script, 43 seconds of one CPU core).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from examples.digits import Digits, DigitsCNN
from trainkit import Trainer, seed_everything


class FewLabels(Digits):
    """The digits, of which only the first images of each are labelled.

    Args:
        per_digit: how many those are.
        batch_size: labelled images in a batch; there are seven times as many without labels beside them.
    """

    def __init__(self, per_digit: int = 4, batch_size: int = 16) -> None:
        super().__init__(batch_size=batch_size)
        self.save_hyperparameters("per_digit")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        labels = torch.tensor([int(label) for _, label in self.train])
        chosen = [place for digit in range(10) for place in (labels == digit).nonzero()[: self.hparams.per_digit, 0]]
        self.labelled = Subset(self.train, [int(place) for place in chosen])

    def train_dataloader(self) -> dict[str, DataLoader[list[Tensor]]]:
        """Return two loaders: a batch is a dict with a batch of each, and the shorter one begins again."""
        size = self.hparams.batch_size
        return {
            "labelled": DataLoader(self.labelled, size, shuffle=True),
            "unlabelled": DataLoader(self.train, 7 * size, shuffle=True),
        }

    def val_dataloader(self) -> list[DataLoader[list[Tensor]]]:
        """Return two loaders that are read one after the other; the second one's images are darkened in places."""
        images, labels = zip(*self.held_back, strict=True)
        torn = [F.dropout(image, 0.25) * 0.75 for image in images]
        return [DataLoader(self.held_back, 128), DataLoader(list(zip(torn, labels, strict=True)), 128)]


class FixMatch(DigitsCNN):
    """What the network is sure of on an image, it must also say when the image is disturbed.

    Sohn et al., FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence, NeurIPS 2020.

    Args:
        sure: from which probability on an answer counts.
        share: the weight of the images without labels; 0 learns nothing from them.
    """

    def __init__(self, lr: float = 0.003, sure: float = 0.9, share: float = 1.0) -> None:
        super().__init__(lr=lr, lr_decay=0.95)
        self.save_hyperparameters("sure", "share")

    def training_step(self, batch: dict[str, list[Tensor]], batch_idx: int) -> Tensor:
        images, labels = batch["labelled"]
        unlabelled, _ = batch["unlabelled"]
        everything = torch.cat([disturbed(images, 0.0), disturbed(unlabelled, 0.0), disturbed(unlabelled, 0.4)])
        on_labelled, easy, hard = self(everything).split([len(images), len(unlabelled), len(unlabelled)])
        probability, answer = easy.detach().softmax(dim=1).max(dim=1)
        counts = (probability >= self.hparams.sure).float()
        losses = F.cross_entropy(on_labelled, labels), (counts * F.cross_entropy(hard, answer, reduction="none")).mean()
        self.log_dict({"train/labelled": losses[0], "train/unlabelled": losses[1], "train/sure": counts.mean()})
        return losses[0] + self.hparams.share * losses[1]

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        right = (self(batch[0]).argmax(dim=1) == batch[1]).float().mean()
        self.log(("val/acc", "val/acc_torn")[dataloader_idx], right, prog_bar=True, add_dataloader_idx=False)


def disturbed(images: Tensor, strength: float) -> Tensor:
    """Move each image by up to a pixel, and make random pixels black, and noise."""
    count = len(images)
    move = torch.eye(2, 3, device=images.device).repeat(count, 1, 1)
    move[:, :, 2] = torch.empty(count, 2, device=images.device).uniform_(-0.25, 0.25)  # 2 is the whole image
    move[:, :, :2] += strength * 0.5 * torch.randn(count, 2, 2, device=images.device)
    moved = F.grid_sample(images, F.affine_grid(move, list(images.shape), align_corners=False), align_corners=False)
    return moved * (torch.rand_like(moved) >= strength / 2) + strength / 4 * torch.randn_like(moved)


if __name__ == "__main__":
    for share in (0.0, 1.0):
        seed_everything(42)
        trainer = Trainer(max_epochs=40, log_every_n_steps=10, default_root_dir="runs/several_loaders")
        trainer.fit(FixMatch(share=share), datamodule=FewLabels())
