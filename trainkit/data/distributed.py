"""Samplers that deal one data set's samples out to several processes, for those who put one into a DataLoader.

A run needs none of them: there each process works its part out of the one order of all (`slices`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from trainkit.errors import MisconfigurationException


class UnrepeatedDistributedSampler(DistributedSampler[Any]):
    """Deal every sample out exactly once; the parts of two processes may differ by one.

    For predictions. Training and metrics need equal parts, for which `DistributedSampler` repeats the first samples.

    Args:
        arguments: as for `torch.utils.data.DistributedSampler`.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.total_size = len(self.dataset)  # type: ignore[arg-type]
        self.num_samples = len(range(self.rank, self.total_size, self.num_replicas))
        if self.num_samples == 0 < self.total_size:
            raise MisconfigurationException(
                f"there are {self.total_size} samples for {self.num_replicas} processes, each of which needs one. Use "
                "fewer processes."
            )

    def __iter__(self) -> Iterator[Any]:
        order: Any = range(self.total_size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.total_size, generator=generator).tolist()
        return iter(order[self.rank :: self.num_replicas])


class Drawn:
    """What a sampler gives in one epoch, as a data set to deal out."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.samples: list[Any] = []

    def __len__(self) -> int:
        return len(self.sampler)


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Deal out what another sampler gives, weighted samples for example.

    Every process must get the same from that sampler: it is seeded alike in all of them.
    """

    def __init__(self, sampler: Any, *arguments: Any, **settings: Any) -> None:
        super().__init__(Drawn(sampler), *arguments, **settings)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        samples = list(self.dataset.sampler)  # type: ignore[attr-defined]
        return (samples[index] for index in super().__iter__())


class UnrepeatedDistributedSamplerWrapper(UnrepeatedDistributedSampler):
    """Deal out what another sampler gives, everything exactly once."""

    def __init__(self, sampler: Any, *arguments: Any, **settings: Any) -> None:
        super().__init__(Drawn(sampler), *arguments, **settings)

    def __iter__(self) -> Iterator[Any]:
        samples = list(self.dataset.sampler)  # type: ignore[attr-defined]
        return (samples[index] for index in super().__iter__())


def deals_itself(loader: DataLoader[Any]) -> bool:
    """Whether a sampler of the user's gives each process its part already."""
    batches = loader.batch_sampler
    samplers = (loader.sampler, batches, getattr(batches, "sampler", None))
    return any(
        isinstance(sampler, DistributedSampler) or (hasattr(sampler, "num_replicas") and hasattr(sampler, "rank"))
        for sampler in samplers
    )
