"""Cross-validate: train k times, each time with another part of the data held back.

Run all folds with `python -m examples.k_fold`, and one of them with `trainkit fit --config configs/k_fold.yaml`, by
`--data.fold 3`, for folds that are to be trained at the same time or on several machines. The five folds of the
digits give an accuracy of 0.9950, with a standard deviation of 0.0030 (18 seconds of one CPU core).
"""

from __future__ import annotations

import statistics

import torch
from torch.utils.data import ConcatDataset, Subset

from examples.digits import Digits, DigitsCNN
from trainkit import Trainer, seed_everything


class Folds(Digits):
    """The digits in `folds` parts of about one size, of which number `fold` is held back.

    Args:
        fold: which part, from 0.
        folds: how many there are.
        split_seed: which images are in which part; the same for all folds.

    Raises:
        ValueError: there is no such fold.
    """

    def __init__(self, fold: int = 0, folds: int = 5, batch_size: int = 64, split_seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, split_seed=split_seed)
        if not 0 <= fold < folds:
            raise ValueError(f"fold must be from 0 to {folds - 1}. Received: {fold}.")
        self.save_hyperparameters("fold", "folds")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        images = ConcatDataset([self.train, self.held_back])
        parts = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.hparams.split_seed))
        parts = parts.tensor_split(self.hparams.folds)
        others = [part for fold, part in enumerate(parts) if fold != self.hparams.fold]
        self.held_back = Subset(images, parts[self.hparams.fold].tolist())
        self.train = Subset(images, torch.cat(others).tolist())


def cross_validate(folds: int, max_epochs: int) -> list[float]:
    """Return each fold's accuracy. A fold gets a new model and a new Trainer: nothing is carried over."""
    accuracies = []
    for fold in range(folds):
        seed_everything(42)
        module, data = DigitsCNN(), Folds(fold, folds)
        trainer = Trainer(max_epochs=max_epochs, log_every_n_steps=10, default_root_dir=f"runs/k_fold/{fold}")
        trainer.fit(module, datamodule=data)
        accuracies += [result["val/acc"] for result in trainer.validate(module, datamodule=data, verbose=False)]
    return accuracies


if __name__ == "__main__":
    accuracies = cross_validate(folds=5, max_epochs=10)
    print("accuracy of each fold:", ", ".join(f"{accuracy:.4f}" for accuracy in accuracies))
    print(f"mean {statistics.mean(accuracies):.4f}, standard deviation {statistics.stdev(accuracies):.4f}")
