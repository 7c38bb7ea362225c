"""Which samples of a data set a batch is made of, noted while the DataLoader draws them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from trainkit.data.loader import Loader


class Noted:
    """A sampler that also puts each thing it yields into a queue; in everything else it is the sampler it wraps."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.drawn: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.drawn.clear()
        for drawn in self.inner:
            self.drawn.append(
                list(drawn[:]) if isinstance(drawn, (list, tuple)) else [drawn]
            )  # SeededIndices: not iterated
            yield drawn

    def whole(self) -> Iterator[Any]:
        """Iterate over plain indices, where the batches are gathered."""
        self.drawn.clear()
        for drawn in self.inner.whole():
            self.drawn.append(drawn.tolist() if isinstance(drawn, Tensor) else list(drawn))
            yield drawn

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # asked for before __init__ when it is copied
            raise AttributeError(name)
        return getattr(self.inner, name)


def note_indices(loader: Loader) -> deque[list[int]] | None:
    """Note from the next epoch on which samples each batch has; whoever gets a batch takes the leftmost entry.

    The queue is as long as the DataLoader reads ahead. None where it can't be known: data without indices, a
    DataLoader with an `__iter__` of its own, workers that may change the order, and anything that is no DataLoader.
    """
    source = loader.iterable
    if source is loader.source or not isinstance(source, DataLoader):  # the user's own object is left as it is
        return None
    reordered = source.num_workers > 0 and not source.in_order
    if isinstance(source.dataset, IterableDataset) or type(source).__iter__ is not DataLoader.__iter__ or reordered:
        return None
    kind = "sampler" if source.batch_sampler is None else "batch_sampler"
    noted = Noted(getattr(source, kind))
    vars(source)[kind] = noted  # DataLoader refuses the assignment
    return noted.drawn
