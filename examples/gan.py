"""Draw digits with a GAN: two optimizers that take turns, in manual optimization.

Run it with `trainkit fit --config configs/gan.yaml`, or without YAML with `python -m examples.gan`, which shows what
it draws. `val/distance` tells how far that is from real digits (see `frechet`): 10.5 before training, 0.62 after the
config's 100 epochs (19 seconds of one CPU core). The images trained on are at 0.10, noise is at 9.9.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.digits import Digits
from trainkit import Module, Trainer, seed_everything


class DigitsGAN(Module):
    """A generator that draws 8x8 images and a discriminator that tells them from real ones.

    Args:
        noise: how many random numbers a drawing is made from.
        width: of the hidden layers.
        lr: of both optimizers, in the first epoch; it falls in a straight line to 0 over the run.
    """

    automatic_optimization = False  # training_step does what the loop does otherwise

    def __init__(self, noise: int = 16, width: int = 256, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.generator = nn.Sequential(
            nn.Linear(noise, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, 64),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, 8, 8)),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, 1),
        )

    def forward(self, count: int) -> Tensor:
        """Draw so many images."""
        return self.generator(torch.randn(count, self.hparams.noise, device=self.device))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, _ = batch
        generator, discriminator = self.optimizers()

        with generator.toggle_model():  # the discriminator gets no gradients here
            loss = F.softplus(-self.discriminator(self(len(images)))).mean()
            generator.zero_grad()
            self.manual_backward(loss)
            generator.step()
            self.log("train/generator", loss, prog_bar=True)

        with discriminator.toggle_model():
            real = F.softplus(-self.discriminator(images)).mean()
            drawn = F.softplus(self.discriminator(self(len(images)).detach())).mean()
            discriminator.zero_grad()
            self.manual_backward(real + drawn)
            discriminator.step()
            self.log("train/discriminator", real + drawn, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():
            schedule.step()

    def on_validation_epoch_start(self) -> None:
        self.seen: list[Tensor] = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen.append(batch[0])

    def on_validation_epoch_end(self) -> None:
        self.log("val/distance", frechet(torch.cat(self.seen), self(1000)), prog_bar=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        parts, epochs = (self.generator, self.discriminator), self.trainer.max_epochs
        optimizers = [torch.optim.Adam(part.parameters(), self.hparams.lr, betas=(0.5, 0.99)) for part in parts]
        return optimizers, [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=epochs) for o in optimizers]


def frechet(real: Tensor, drawn: Tensor) -> Tensor:
    """The Fréchet distance of two sets of images, from the means and covariances of their 64 pixels.

    FID (Heusel et al., NeurIPS 2017) is the same on the features of a network.
    """
    a, b = real.flatten(1).double(), drawn.flatten(1).double()
    joint = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * joint


if __name__ == "__main__":
    seed_everything(42)
    module = DigitsGAN()
    Trainer(max_epochs=100, log_every_n_steps=20, default_root_dir="runs/gan").fit(module, datamodule=Digits())
    with torch.no_grad():
        row = torch.cat([*module.eval()(10)[:, 0]], dim=1)
    print("\n".join("".join(" .:-=+*#%@"[int(9.99 * ink)] * 2 for ink in line) for line in row))
