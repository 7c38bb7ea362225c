"""Which sample is at which position of an epoch: a pure function of (seed, epoch, lap, position)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """The order of one data set's samples, epoch by epoch, from any position on.

    Args:
        data: the samples; only their number is looked at, each time an epoch begins.
        shuffle: draw a new order for each epoch; False keeps the data set's own.
        seed: what the orders are drawn from.
    """

    def __init__(self, data: Sized, shuffle: bool, seed: int) -> None:
        self.data, self.shuffle, self.seed = data, shuffle, seed
        self.epoch = 0
        self.lap = 0
        """How often the data were gone through before in this epoch: 0, unless they are cycled beside longer ones."""
        self.start = 0
        self.used = False
        """Whether anybody has iterated over it."""

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        self.used = True
        if not self.shuffle:
            return iter(range(self.start, len(self)))
        generator = torch.Generator().manual_seed(self.epoch_seed())
        return iter(torch.randperm(len(self), generator=generator)[self.start :].tolist())

    def epoch_seed(self) -> int:
        """Return the 63-bit seed of the epoch's lap."""
        lap = f":{self.lap}" if self.lap else ""
        digest = hashlib.sha256(f"{self.seed}:{self.epoch}{lap}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1
