"""Data sets as a DataLoader gets them: the user's own, in everything but how their samples are fetched."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset, StackDataset, Subset

from trainkit.data.failure import named
from trainkit.data.order import Placed
from trainkit.data.seeding import MASK, ODD, seed_all

if TYPE_CHECKING:
    from trainkit.data.fetch import Fetch


class Served:
    """A data set whose batches are fetched by somebody else.

    Args:
        inner: the user's.
        fetch: gives the batch, or the sample, at known places of the run.
    """

    __slots__ = ("__weakref__", "_fetch", "_inner")

    def __init__(self, inner: Any, fetch: Fetch) -> None:
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_fetch", fetch)

    def __getitems__(self, indices: Any) -> Any:
        if type(indices) is Placed:
            return self._fetch(indices)
        if callable(batch := getattr(self._inner, "__getitems__", None)):
            return batch(indices)
        return [self._inner[index] for index in indices]

    def __getitem__(self, index: Any) -> Any:
        return self._fetch(index, single=True) if type(index) is Placed else self._inner[index]

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._inner, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._inner)

    def __repr__(self) -> str:
        return repr(self._inner)

    def __reduce__(self) -> tuple[Any, ...]:
        return Served, (self._inner, self._fetch)


class ByIndex(Served):
    """A data set of a loader that keeps its own order: what is drawn for a sample is a function of epoch and index.

    Worker processes see which epoch begins.

    Args:
        inner: the user's.
        name: how messages call the loader.
    """

    __slots__ = ("_begun", "_by_batch", "_name")

    def __init__(self, inner: Any, name: str) -> None:
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_by_batch", takes_batches(inner))
        object.__setattr__(self, "_begun", torch.zeros(2, dtype=torch.int64).share_memory_())  # type: ignore[no-untyped-call]

    def begin(self, epoch: int, seed: int) -> None:
        """Begin an epoch."""
        self._begun.copy_(torch.tensor([epoch, seed]))

    def __getitems__(self, indices: Any) -> Any:
        if not self._by_batch:
            return [self[index] for index in indices]
        return self._fetched(indices[0], self._inner.__getitems__, indices)

    def __getitem__(self, index: Any) -> Any:
        return self._fetched(index, self._inner.__getitem__, index)

    def _fetched(self, first: Any, fetch: Any, asked: Any) -> Any:
        epoch, seed = self._begun.tolist()
        place = first if isinstance(first, int) else zlib.crc32(repr(first).encode())
        seed_all((seed + place * ODD) & MASK)
        try:
            return fetch(asked)
        except Exception as error:
            failed = named(error, f"{self._name}: loading {asked!r}, an index of the data, failed in epoch {epoch}.")
            if failed is not error:
                raise failed from error
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_index, (self._inner, self._name, self._begun)


def _by_index(inner: Any, name: str, begun: Any) -> ByIndex:
    made = ByIndex(inner, name)
    object.__setattr__(made, "_begun", begun)
    return made


def takes_batches(dataset: Any) -> bool:
    """Whether a data set loads a batch at a time, and does not go through it sample by sample itself."""
    if type(dataset) is Subset:
        return takes_batches(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return hasattr(dataset, "__getitems__") and all(map(takes_batches, dataset.datasets))
    if type(dataset) is StackDataset:
        parts: Any = dataset.datasets
        return all(map(takes_batches, parts.values() if isinstance(parts, dict) else parts))
    return callable(getattr(dataset, "__getitems__", None))
