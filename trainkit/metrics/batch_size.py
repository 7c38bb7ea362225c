"""The size of a batch: the first dimension of its first tensor that has one. The way to that tensor is found once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from trainkit.errors import MisconfigurationException, warn
from trainkit.tree import follow

Path = tuple[Any, ...] | None


class BatchSize:
    """Sizes of batches that look alike."""

    def __init__(self) -> None:
        self._path: Path = ()
        self._warned = False

    def of(self, batch: Any) -> int:
        """Return a batch's size.

        Raises:
            MisconfigurationException: there is no tensor in it.
        """
        if self._path is not None:
            try:
                size: int = follow(batch, self._path).shape[0]
                return size
            except (KeyError, IndexError, TypeError, AttributeError):  # the first batch, or of another structure
                pass
        return self._search(batch)

    def _search(self, batch: Any) -> int:
        found = list(_tensors(batch, ()))
        sizes = [tensor.shape[0] for _, tensor in found if tensor.ndim]
        self._path = next((path for path, tensor in found if tensor.ndim), None)
        if not found:
            raise MisconfigurationException(
                "the mean over an epoch is weighted by the batch size, and there is no tensor in this batch to take it "
                f"from. Received: a {type(batch).__name__}. Give it: self.log(..., batch_size=...)."
            )
        if len(set(sizes)) > 1 and not self._warned:
            self._warned = True
            warn(
                f"the batch's tensors differ in their first dimension; {sizes[0]}, that of the first, is taken as the "
                "batch size in means over the epoch. If it is another one, give it: self.log(..., batch_size=...)."
            )
        return sizes[0] if sizes else 1


def _tensors(tree: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    """Yield every tensor with the keys that lead to it; None where something can only be iterated over."""
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(tree, Tensor):
        yield path, tree
        return
    if isinstance(tree, Mapping):
        pairs = tree.items()
    elif isinstance(tree, (tuple, list)):
        pairs = enumerate(tree)
    elif isinstance(tree, Iterable) and not isinstance(tree, (str, bytes)):
        pairs, path = ((None, item) for item in tree), None
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        pairs = [(("attribute", field.name), getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    else:
        return
    for key, value in pairs:
        yield from _tensors(value, None if path is None else (*path, key))
