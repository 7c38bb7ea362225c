"""Which samples of an epoch's one order each of several processes takes: worked out, and never told.

```text
epoch     0 ........................................ n    one order, the same in all processes
batch k   [k * size, (k + 1) * size)                      what one process with that batch size would take
part r    its piece of a batch                            the pieces' sizes differ by at most one
```
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Slices:
    """One process's pieces of the batches of all.

    Args:
        part: which process, from 0. In a batch that can't be dealt out evenly the first ones have a sample more.
        parts: how many processes there are.
        size: how many samples all of them together take at once.
        first_batch: the batch that begins at the position `first`; in an epoch that was begun with another size.
        first: the position where that batch begins.
    """

    part: int = 0
    parts: int = 1
    size: int = 1
    first_batch: int = 0
    first: int = 0

    @property
    def whole(self) -> bool:
        """Whether a batch is all this process's, and the epoch's first one begins with its first sample."""
        return self.parts == 1 and not self.first

    def begin(self, batch_idx: int) -> int:
        """Return the position where a batch begins."""
        return self.first + (batch_idx - self.first_batch) * self.size

    def batch_at(self, position: int) -> int:
        """Return the batch that a position is in."""
        return self.first_batch + (position - self.first) // self.size

    def count(self, total: int, drop_last: bool) -> int:
        """Return how many batches an epoch of `total` samples has: the same number for all parts."""
        whole, rest = divmod(max(0, total - self.first), self.size)
        return self.first_batch + whole + (rest > 0 and not drop_last)

    def own_count(self, total: int, drop_last: bool) -> int:
        """Return how many of them this part has a sample of: all, or all but the last."""
        whole, rest = divmod(max(0, total - self.first), self.size)
        return self.first_batch + whole * (self.size > self.part) + (rest > self.part and not drop_last)

    def pieces(self, start: int, total: int, drop_last: bool) -> Iterator[range]:
        """Return this part's piece of each batch from the position `start` on."""
        stop = self.begin(self.count(total, drop_last))
        return (self.piece(begin, min(self.size, total - begin)) for begin in range(start, stop, self.size))

    def piece(self, begin: int, length: int) -> range:
        """Return the positions that this part takes of the batch at `begin` with `length` samples."""
        each, more = divmod(length, self.parts)
        start = begin + self.part * each + min(self.part, more)
        return range(start, start + each + (self.part < more))

    def length(self, batch_idx: int, total: float) -> int:
        """Return how many samples a batch has in all parts."""
        return int(max(0, min(self.size, total - self.begin(batch_idx))))

    def share(self, batch_idx: int, total: float) -> float:
        """Return this part's samples of a batch as a multiple of the mean over parts: the shares' mean is 1."""
        length = self.length(batch_idx, total)
        return len(self.piece(0, length)) * self.parts / length if length else 0.0
