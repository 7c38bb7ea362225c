"""(e) The data path: samples a second through each loop, with a step that does next to nothing, and without a step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.case import ALL, Case, Metric
from benchmarks.job import Clock, Job
from benchmarks.training import train

TITLE = "(e) Data path, shuffled: CPU time without workers, wall time with them"
ROUNDS = (3, 1)
TOGETHER = True  # all cases of a peer in one process
WARM_UP = 20  # batches
SETS = {
    "tensors": "TensorDataset of 60,000 x 784",
    "items": "a map data set with a cheap __getitem__",
    "images": "an image folder with transforms",
}
RATE = Metric("rate", "through the loop", "samples/s")
ALONE = Metric("alone", "the loader alone", "samples/s")
CASES = [
    Case(f"{name}-{workers}", f"{title}, {workers} workers", ALL, (RATE, ALONE), same_work=False)
    for name, title in SETS.items()
    for workers in (0, 2)
]


class Items(Dataset[tuple[Tensor, Tensor]]):
    """Rows of a tensor, each with a cheap change."""

    def __init__(self, count: int) -> None:
        self.rows, self.labels = torch.rand(count, 784), torch.randint(10, (count,))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index] * 2 - 1, self.labels[index]


def image_folder(folder: Path, count: int) -> Dataset[Any]:
    """JPEGs of 96 x 96 pixels in two classes, as ImageFolder reads them."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from torchvision.io import write_jpeg

    for index in range(count):
        place = folder / "images" / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        smooth = nn.functional.interpolate(torch.rand(1, 3, 12, 12), size=96, mode="bilinear")[0]
        write_jpeg((smooth * 255).byte(), str(place / f"{index}.jpg"))
    augment = [transforms.RandomResizedCrop(64), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return ImageFolder(folder / "images", transforms.Compose(augment))


def make_data(name: str, quick: bool, folder: Path) -> Dataset[Any]:
    torch.manual_seed(0)
    if name == "tensors":
        count = 6_000 if quick else 60_000
        return TensorDataset(torch.rand(count, 784), torch.randint(10, (count,)))
    if name == "items":
        return Items(6_000 if quick else 60_000)
    return image_folder(folder, 32 * (24 if quick else 64))


class Nothing(nn.Module):
    """One parameter; the data are not looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.number


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    name, _, workers = case.partition("-")
    data = make_data(name, quick, folder)
    batch = 32 if name == "images" else 128
    loader = DataLoader(data, batch, shuffle=True, num_workers=int(workers))
    clock = Clock(WARM_UP, len(loader) - 1)  # the last batch may be a small one
    sgd = partial(torch.optim.SGD, lr=0.0)
    job = Job(Nothing(), lambda outputs, targets: outputs * 1, sgd, loader, clock, folder)
    measured = train(peer, job)
    measured["rate"] = batch / measured["wall" if loader.num_workers else "cpu"]
    batches = alone(peer, loader)
    if batches is not None:
        measured["alone"] = batch * batches_a_second(batches, len(loader), clock_for(loader))
    return measured


def alone(peer: str, loader: DataLoader[Any]) -> Iterable[Any] | None:
    """Return what hands out the peer's batches without its loop, where it has something of its own."""
    if peer == "hand":
        return loader
    if peer == "trainkit":
        from trainkit.data.loader import Loader

        return Loader(loader, name="train_dataloader", argument="limit_train_batches").epoch(0)
    return None


def clock_for(loader: DataLoader[Any]) -> Callable[[], float]:
    return time.perf_counter if loader.num_workers else time.process_time


def batches_a_second(batches: Iterable[Any], count: int, clock: Callable[[], float]) -> float:
    """Batches a second after the warm-up, without the last one, which may be small."""
    iterator: Iterator[Any] = iter(batches)
    for _ in itertools.islice(iterator, WARM_UP):
        pass
    start = clock()
    for _ in itertools.islice(iterator, count - WARM_UP - 1):
        pass
    return (count - WARM_UP - 1) / (clock() - start)
