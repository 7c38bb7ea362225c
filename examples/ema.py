"""Average the weights of a run: EMAWeightAveraging on the digits, and what it is worth.

Run it with `trainkit fit --config configs/ema.yaml`. Without YAML, `python -m examples.ema` trains five times with a
learning rate that never falls, and compares the weights at the end of each run with their moving average.
"""

from __future__ import annotations

import torch

from examples.digits import Digits, DigitsCNN
from trainkit import Trainer, seed_everything
from trainkit.callbacks import EMAWeightAveraging


def train(seed: int, callbacks: list[EMAWeightAveraging]) -> float:
    """Return the share of the images held back that is read wrongly after five epochs."""
    seed_everything(seed)
    module = DigitsCNN(lr=0.01, lr_decay=1.0)
    trainer = Trainer(
        max_epochs=5, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, datamodule=Digits())
    return 1 - trainer.validate(module, datamodule=Digits(), verbose=False)[0]["val/acc"]


if __name__ == "__main__":
    plain, averaged = torch.tensor([[train(s, []), train(s, [EMAWeightAveraging(decay=0.98)])] for s in range(5)]).T
    print(f"wrong with the weights at the end: {plain.mean():.2%} (from {plain.min():.2%} to {plain.max():.2%})")
    print(
        f"wrong with their moving average:   {averaged.mean():.2%} (from {averaged.min():.2%} to {averaged.max():.2%})"
    )
