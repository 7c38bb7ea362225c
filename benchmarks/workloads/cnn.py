"""(c) A CNN on Fashion-MNIST, an epoch end to end, against the best that a loop by hand can do: with a fused optimizer.

To keep the run short, 30 of the epoch's 469 batches are trained. The epoch is everything that was measured outside the
steps (start, first steps, end), and 469 times the step.
"""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.case import ALL, STEP, Case, Metric
from benchmarks.job import Clock, Job
from benchmarks.training import train

TITLE = "(c) CNN on Fashion-MNIST"
ROUNDS = (5, 2)
CASES = [Case("epoch", "everything off", ALL, (Metric("epoch", "CPU time of an epoch end to end", "s"), STEP))]
BATCH, WARM_UP, STEPS, EPOCH = 128, 5, 30, 469


class CNN(nn.Module):
    """Five convolutions with batch norm, and a linear layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 2 * width, 4 * width, 4 * width]
        blocks = []
        for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            pool = nn.MaxPool2d(2) if place % 2 == 0 else nn.Identity()
            blocks += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), pool, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * width * 3 * 3, 10))
        self.to(memory_format=torch.channels_last)  # faster on a CPU

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def load_images(count: int) -> tuple[TensorDataset, str]:
    """Return images and labels, and what they are: Fashion-MNIST where it was found, else noise of the same shape."""
    folder = os.environ.get("BENCH_FASHION")
    if folder is None:
        images, labels, name = torch.rand(count, 1, 28, 28), torch.randint(10, (count,)), "noise of its shape"
    else:
        from torchvision.datasets import FashionMNIST

        found = FashionMNIST(folder)
        images, labels, name = found.data[:count, None] / 255, found.targets[:count], "Fashion-MNIST"
    return TensorDataset((images - 0.286) / 0.353, labels), name


def make_job(folder: Path, steps: int) -> tuple[Job, str]:
    torch.manual_seed(0)
    net = CNN()
    images, name = load_images(BATCH * steps)
    loader = DataLoader(images, BATCH)  # in the files' order, which is a random one: the same batches for all peers
    adamw = partial(torch.optim.AdamW, lr=0.005, weight_decay=0.05)
    loss = partial(nn.functional.cross_entropy, label_smoothing=0.05)
    return Job(net, loss, adamw, loader, Clock(WARM_UP, steps), folder, best=True), name


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    steps = 8 if quick else STEPS
    job, name = make_job(folder, steps)
    measured = train(peer, job)
    return measured | {"epoch": measured["whole_cpu"] + (EPOCH - steps) * measured["cpu"], "data": name}
