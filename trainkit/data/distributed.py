"""Deal one data set's samples out to several processes, each its part."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

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


def needs_dealing(loader: Any) -> bool:
    """Whether every process would read all the samples: a DataLoader over data with indices, not dealt out yet."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return not any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def dealt(loader: DataLoader[Any], seed: int, repeat: bool, **which: int) -> DataLoader[Any]:
    """Return a copy of a DataLoader that gives one process's part of the samples.

    Args:
        loader: shuffled or in order, which the parts are, too.
        seed: what a shuffled order is drawn from, the same in every process.
        repeat: give each process as many samples, some of them twice; False for predictions.
        which: `num_replicas` and `rank`.

    Raises:
        TypeError: it has a batch sampler that does not say where its samples come from.
    """
    batches = loader.batch_sampler
    inner = loader.sampler if batches is None else getattr(batches, "sampler", None)
    if inner is None:
        raise TypeError(
            f"{type(batches).__name__} has no attribute `sampler`, so its samples can't be dealt out to "
            f"{which['num_replicas']} processes. Let it deal them out itself, and set use_distributed_sampler=False."
        )
    plain = type(inner) is SequentialSampler or (type(inner) is RandomSampler and not inner.replacement)
    shuffle = plain and type(inner) is RandomSampler
    kinds = (DistributedSampler, DistributedSamplerWrapper) if repeat else (
        UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper
    )  # fmt: skip
    source: Any = loader.dataset if plain else inner
    kind: Any = kinds[not plain]
    sampler = kind(source, shuffle=shuffle, seed=seed, **which)
    copied = copy.copy(loader)
    attributes = vars(copied)  # DataLoader refuses assignment to most of these after its construction
    attributes["_iterator"] = None
    if batches is None:
        attributes["sampler"] = sampler
    elif type(batches) is BatchSampler:
        attributes["sampler"] = sampler
        attributes["batch_sampler"] = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    else:
        attributes["batch_sampler"] = copy.copy(batches)
        attributes["batch_sampler"].sampler = sampler
    return copied
