"""Which sample is at which position of an epoch: a pure function of (seed, epoch, position)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """The order of one data set's samples, epoch by epoch, from any position on.

    Args:
        size: how many samples there are.
        shuffle: draw a new order for each epoch; False keeps the data set's own.
        seed: what the orders are drawn from.
    """

    def __init__(self, size: int, shuffle: bool, seed: int) -> None:
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.start, self.size))
        generator = torch.Generator().manual_seed(self.epoch_seed())
        return iter(torch.randperm(self.size, generator=generator)[self.start :].tolist())

    def epoch_seed(self) -> int:
        """Return the 63-bit seed of the epoch."""
        digest = hashlib.sha256(f"{self.seed}:{self.epoch}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1
