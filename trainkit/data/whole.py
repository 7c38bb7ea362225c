"""Data that lie in tensors, fetched a batch at a time: one `index_select` a tensor in place of a sample at a time.

What torch's own data sets give sample by sample and `default_collate` stacks again is the same as the rows of their
tensors, taken at once. A `gather` does so where that is sure: TensorDataset, a tensor itself, and Subset (what
random_split gives), ConcatDataset and StackDataset of those, and subclasses that load their samples as these do. It
looks at the data each time: what it was made for may be exchanged or changed in place at any time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

from trainkit.data.stacking import is_default

Gather = Callable[[Tensor], Any]
Select = Callable[[Tensor, int, Tensor], Tensor]
NOTHING = torch.empty(0, dtype=torch.int64, device="cpu")


class Changed(Exception):
    """The data are no longer what a gather was made for."""


def gather_of(dataset: Any, collate_fn: Any, pinned: bool = False) -> Gather | None:
    """Return what gives the batch of the samples at some indices; None where another batch might come out.

    A gather raises when it can't take the indices, and whoever called it loads them one by one.

    Args:
        dataset: the user's.
        collate_fn: the user's.
        pinned: gather into pinned memory, for a CUDA device.
    """
    return _gather(dataset, pinned_select if pinned else torch.index_select) if is_default(collate_fn) else None


def pinned_select(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Select rows of a tensor of the host into pinned memory."""
    out = torch.empty((len(indices), *tensor.shape[1:]), dtype=tensor.dtype, device="cpu", pin_memory=True)
    return torch.index_select(tensor, dim, indices, out=out)


class Whole:
    """Give batches by their indices, one after the other; those that can't be gathered are loaded sample by sample.

    Args:
        dataset: the user's.
        collate_fn: the user's.
        batch_idx: of the first batch.
        one_by_one: loads the batch with these indices, whose index this is, and names what fails.
        pinned: gather into pinned memory.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Any,
        batch_idx: int,
        one_by_one: Callable[[list[Any], int], Any],
        pinned: bool = False,
    ) -> None:
        self.dataset, self.collate_fn, self.batch_idx, self.one_by_one = dataset, collate_fn, batch_idx, one_by_one
        self.pinned = pinned
        self.gather = gather_of(dataset, collate_fn, pinned)

    def __call__(self, indices: Any) -> Any:
        self.batch_idx += 1
        try:
            return self.gather(indices if type(indices) is Tensor else as_indices(indices))  # type: ignore[misc]
        except Exception:
            return self._otherwise(indices)

    def _otherwise(self, indices: Any) -> Any:
        if type(indices) is Tensor:
            indices = indices.tolist()
        self.gather = gather_of(self.dataset, self.collate_fn, self.pinned)  # the data may be others than before
        return self.one_by_one(indices, self.batch_idx - 1)


def _gather(data: Any, select: Select) -> Gather | None:
    if type(data) is Tensor:
        return _of_tensor(data, select)
    for kind, gather in KINDS.items():
        if _loads_as(data, kind):
            return gather(data, select)
    return None


def _loads_as(data: Any, kind: type) -> bool:
    """Whether a data set is of torch's kind, in how it loads its samples at least."""
    own: Any = type(data)
    return isinstance(data, kind) and all(
        getattr(own, name, None) is getattr(kind, name, None) for name in ("__getitem__", "__getitems__")
    )


def _of_tensor(tensor: Any, select: Select) -> Gather | None:
    """Return the gather of one tensor; None for one that stacked rows would not look like in the end."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return None
    laid_out = tensor.dim() > 0 and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if not laid_out or tensor.requires_grad or tensor.is_meta:
        return None
    if tensor.device.type == "cpu":
        return lambda indices: select(tensor, 0, indices)

    def gather(indices: Tensor) -> Tensor:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(tensor):
            raise IndexError  # which must not happen on the device: it would be lost
        indices = indices.pin_memory() if tensor.is_cuda else indices
        return tensor.index_select(0, indices.to(tensor.device, non_blocking=True))

    return gather


def _of_tensors(data: TensorDataset, select: Select) -> Gather | None:
    tensors = data.tensors
    if type(tensors) is not tuple:
        return None
    gathers = [_of_tensor(tensor, select) for tensor in tensors]
    if data.tensors is not tensors or None in gathers:
        return None
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return _each(data, "tensors", tensors, gathers)
    count, dims = len(tensors), (0,) * len(tensors)

    def gather(indices: Tensor) -> Any:
        if data.tensors is not tensors:
            raise Changed
        return list(map(select, tensors, dims, (indices,) * count))

    return gather


def _of_stack(data: StackDataset[Any], select: Select) -> Gather | None:
    parts: Any = data.datasets
    if type(parts) is dict:
        known, named = dict(parts), {name: _gather(part, select) for name, part in parts.items()}
        if None in named.values():
            return None

        def gather(indices: Tensor) -> Any:
            if data.datasets is not parts or [*parts] != [*known] or not all(map(is_, parts.values(), known.values())):
                raise Changed
            return {name: one(indices) for name, one in named.items()}  # type: ignore[misc]

        return gather
    return _each(data, "datasets", parts, [_gather(part, select) for part in parts]) if type(parts) is tuple else None


def _each(data: Any, attribute: str, parts: Any, gathers: list[Gather | None]) -> Gather | None:
    """Return the gather of several things that are a sample together."""
    several = [gather for gather in gathers if gather is not None]
    if len(several) < len(gathers):
        return None

    def gather(indices: Tensor) -> Any:
        if getattr(data, attribute) is not parts:
            raise Changed
        return [one(indices) for one in several]

    return gather


def _of_subset(data: Subset[Any], select: Select) -> Gather | None:
    dataset, chosen = data.dataset, data.indices
    inner, pick = _gather(dataset, select), _picker(chosen)
    if inner is None or pick is None:
        return None

    def gather(indices: Tensor) -> Any:
        if data.dataset is not dataset or data.indices is not chosen:
            raise Changed
        return inner(pick(indices))

    return gather


def _picker(chosen: Any) -> Gather | None:
    """Return what takes entries of a Subset's indices, as they are at that moment."""
    if type(chosen) is Tensor:
        return (
            _of_tensor(chosen, torch.index_select)
            if chosen.dtype is torch.int64 and chosen.dim() == 1 and not chosen.is_cuda
            else None
        )
    import numpy as np  # torch has imported it already when it is installed

    if type(chosen) is np.ndarray:
        plain = chosen.ndim == 1 and chosen.dtype == np.int64
        return (lambda indices: torch.from_numpy(chosen[indices.numpy()])) if plain else None
    if type(chosen) not in (list, tuple, range):
        return None

    def pick(indices: Tensor) -> Tensor:
        places = indices.tolist()
        return as_indices(itemgetter(*places)(chosen) if len(places) > 1 else [chosen[place] for place in places])

    return pick


def as_indices(numbers: Iterable[Any]) -> Tensor:
    """Return whole numbers as a tensor.

    Raises:
        TypeError: something else is among them.
    """
    numbers = list(numbers)
    if bool in set(map(type, numbers)):
        raise TypeError  # True is no index of a tensor, but a mask
    packed = array("q", numbers)  # which takes a third of torch.tensor's time
    return torch.frombuffer(packed, dtype=torch.int64) if packed else NOTHING


def _of_concatenation(data: ConcatDataset[Any], _: Select) -> Gather | None:
    parts, sizes = list(data.datasets), list(data.cumulative_sizes)
    gathers = [_gather(part, torch.index_select) for part in parts]  # and put together after
    several = [gather for gather in gathers if gather is not None]
    try:
        alike = len({_look(gather(NOTHING)) for gather in several}) == 1
    except Exception:
        return None
    if len(several) < len(parts) or not alike:
        return None
    ends, begins = torch.tensor(sizes, device="cpu"), [0, *sizes[:-1]]

    def gather(indices: Tensor) -> Any:
        if data.cumulative_sizes != sizes or not all(map(is_, data.datasets, parts)):
            raise Changed
        which = torch.bucketize(indices, ends, right=True)
        places = [(which == part).nonzero()[:, 0] for part in range(len(parts))]
        if len(indices) != sum(map(len, places)) or bool((indices < 0).any()):
            raise IndexError
        found = [(at, several[part](indices[at] - begins[part])) for part, at in enumerate(places) if len(at)]
        return found[0][1] if len(found) == 1 else _merged(len(indices), found)

    return gather


def _look(batch: Any) -> Any:
    """Return what has to be equal for batches to be stacked together."""
    if isinstance(batch, Tensor):
        return batch.dtype, batch.device, batch.shape[1:]
    if isinstance(batch, dict):
        return tuple((name, _look(part)) for name, part in batch.items())
    return tuple(map(_look, batch))


def _merged(count: int, found: list[tuple[Tensor, Any]]) -> Any:
    """Return the batch that parts of it make, each with its rows' places."""
    one = found[0][1]
    if isinstance(one, dict):
        return {name: _merged(count, [(at, part[name]) for at, part in found]) for name in one}
    if isinstance(one, list):
        return [_merged(count, [(at, part[place]) for at, part in found]) for place in range(len(one))]
    merged = one.new_empty((count, *one.shape[1:]))
    for at, part in found:
        merged[at if merged.device.type == "cpu" else at.to(merged.device)] = part
    return merged


KINDS: dict[type, Callable[[Any, Select], Gather | None]] = {
    TensorDataset: _of_tensors, Subset: _of_subset, ConcatDataset: _of_concatenation, StackDataset: _of_stack,
}  # fmt: skip
