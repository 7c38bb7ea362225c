"""What a DataLoader takes its samples from, and what that says about their order."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return what decides the order of a DataLoader's samples."""
    batches = loader.batch_sampler
    return batches.sampler if type(batches) is BatchSampler else loader.sampler


def set_epoch(iterable: Any, epoch: int) -> None:
    """Tell the samplers that want to know it which epoch begins."""
    batch_sampler = getattr(iterable, "batch_sampler", None)
    samplers = (getattr(iterable, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    for sampler in {id(sampler): sampler for sampler in samplers}.values():  # one of them may be there twice
        if callable(tell := getattr(sampler, "set_epoch", None)):
            tell(epoch)


def is_shuffled(loader: Any) -> bool:
    """Whether a DataLoader surely gives another order each time."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    sampler = sampler_of(loader)
    return isinstance(sampler, RandomSampler) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)


def in_sequence(loader: Any) -> Any:
    """Return a copy of a DataLoader that takes its data set's samples in order; what does so already, as it is."""
    if not isinstance(loader, DataLoader) or hasattr(loader, "load_state_dict"):
        return loader
    batches = loader.batch_sampler
    unsized = isinstance(loader.dataset, IterableDataset) or length_of(loader.dataset) == math.inf
    if (
        unsized
        or isinstance(sampler_of(loader), SequentialSampler)
        or type(batches) not in (BatchSampler, type(None))  # it has ideas of its own
    ):
        return loader
    ordered = copy.copy(loader)
    attributes = vars(ordered)  # DataLoader refuses assignment to most of these after its construction
    attributes["_iterator"] = None
    attributes["sampler"] = sampler = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    if isinstance(batches, BatchSampler):
        attributes["batch_sampler"] = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    return ordered


def without_state(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a DataLoader over the samples of torchdata's, which keeps the order and the position by itself."""
    plain: DataLoader[Any] = object.__new__(DataLoader)
    attributes = vars(plain)
    attributes.update(vars(loader), _iterator=None)
    sampler, batches = sampler_of(loader), loader.batch_sampler
    if isinstance(batches, BatchSampler) and _is_torchdatas(batches):
        sampler = batches.sampler
    if type(sampler).__name__ == "RandomSampler" and _is_torchdatas(sampler):
        attributes["sampler"] = sampler = RandomSampler(
            sampler.data_source, sampler.replacement, sampler._num_samples, sampler.generator
        )
    if isinstance(batches, BatchSampler) and _is_torchdatas(batches):
        attributes["batch_sampler"] = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    return plain


def can_do_without_state(loader: Any) -> bool:
    """Whether a loader is torchdata's DataLoader over data with indices."""
    return isinstance(loader, DataLoader) and _is_torchdatas(loader) and not isinstance(loader.dataset, IterableDataset)


def _is_torchdatas(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "torchdata"


def draws_nothing(loader: DataLoader[Any]) -> bool:
    """Whether making a batch surely draws no random number: torch's own data sets, put together in torch's own way."""
    data, plain = [loader.dataset], (TensorDataset, torch.Tensor, list, tuple, range)
    while data:
        part: Any = data.pop()
        if type(part) is Subset:
            data.append(part.dataset)
        elif type(part) is ConcatDataset:
            data.extend(part.datasets)
        elif type(part) not in plain:
            return False
    return loader.collate_fn in (default_collate, default_convert)


def length_of(source: Any) -> int | float:
    """Return the number of batches a source claims to have, infinity when it does not say."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return math.inf
