"""Which index is at which position of a shuffled order, and the other way round, for any number of samples.

Both kinds are a pure function of (n, seed). Up to LARGE samples a seeded `torch.randperm` costs least; above it
would take seconds and gigabytes before the first sample, so a counter-based permutation is worked out where it is
looked at: it begins anywhere at once, and holds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from trainkit.random import derived_seed

LARGE = 2**20
"""From so many samples on the order is worked out block by block. Orders of a checkpoint change if this does."""
ROUNDS = 8
FIRST_BLOCK, LARGEST_BLOCK = 256, 2**16
MOST_BATCHES = 1024
"""So many batches of indices are there at once at most."""


def permutation(n: int, seed: int) -> Permutation:
    """Return the shuffled order of n samples that a seed stands for."""
    return Drawn(n, seed) if n < LARGE else Feistel(n, seed)


class Permutation:
    """A one-to-one mapping of positions 0 to n-1 to indices 0 to n-1; this one maps each to itself.

    Args:
        n: how many there are.
        seed: what the mapping is drawn from.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed

    def __len__(self) -> int:
        return self.n

    def indices(self, positions: Tensor) -> Tensor:
        """Return the index at each position, both as int64."""
        return positions

    def positions(self, indices: Tensor) -> Tensor:
        """Return the position of each index, both as int64."""
        return indices

    def index(self, position: int) -> int:
        """Return the index at a position."""
        return int(self.indices(torch.tensor([self._checked(position)], device="cpu"))[0])

    def position(self, index: int) -> int:
        """Return the position of an index."""
        return int(self.positions(torch.tensor([self._checked(index)], device="cpu"))[0])

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.n:
            raise IndexError(f"a permutation of {self.n} has the positions 0 to {self.n - 1}. Received: {number}.")
        return number

    def blocks(self, start: int, stop: int, step: int = 1) -> Iterator[list[int]]:
        """Yield the indices at positions start, start + step, ... below stop, in lists that grow as one goes on."""
        size, stop = FIRST_BLOCK, min(stop, self.n)
        while start < stop:
            end = min(start + size * step, stop)
            yield self.indices(torch.arange(start, end, step, device="cpu")).tolist()
            start += size * step
            size = min(2 * size, LARGEST_BLOCK)

    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the indices at positions start to stop in tensors of `size`, many at once; the last may be smaller."""
        count, stop = max(1, FIRST_BLOCK // size), min(stop, self.n)
        while start < stop:
            end = min(start + count * size, stop)
            for several in torch.split(self.between(start, end), MOST_BATCHES * size):
                yield torch.split(several, size)
            start, count = end, min(2 * count, max(1, LARGEST_BLOCK // size))

    def between(self, start: int, stop: int) -> Tensor:
        """Return the indices at positions start to stop."""
        return self.indices(torch.arange(start, stop, device="cpu"))

    def pieces(self, pieces: Iterable[range]) -> Iterator[tuple[range, Tensor]]:
        """Yield each range of positions with the indices there, which are looked up many ranges at once."""
        waiting, most = iter(pieces), FIRST_BLOCK
        while several := _some(waiting, most):
            positions = [torch.arange(piece.start, piece.stop, device="cpu") for piece in several]
            indices = torch.split(self.indices(torch.cat(positions)), list(map(len, several)))
            yield from zip(several, indices, strict=True)
            most = min(2 * most, LARGEST_BLOCK)


def _some(waiting: Iterator[range], most: int) -> list[range]:
    """Take ranges that have about so many positions together."""
    several: list[range] = []
    count = 0
    while count < most and len(several) < MOST_BATCHES:
        piece = next(waiting, None)
        if piece is None:
            break
        several.append(piece)
        count += len(piece)
    return several


class Drawn(Permutation):
    """A `torch.randperm`, drawn when it is made."""

    def __init__(self, n: int, seed: int) -> None:
        super().__init__(n, seed)
        self._order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
        self._inverse: Tensor | None = None

    def indices(self, positions: Tensor) -> Tensor:
        """Return the index at each position."""
        return self._order[positions]

    def between(self, start: int, stop: int) -> Tensor:
        """Return the indices at positions start to stop."""
        return self._order[start:stop]

    def positions(self, indices: Tensor) -> Tensor:
        """Return the position of each index."""
        if self._inverse is None:
            self._inverse = torch.empty_like(self._order)
            self._inverse[self._order] = torch.arange(self.n, device="cpu")
        return self._inverse[indices]


class Feistel(Permutation):
    """A Feistel network over the smallest even number of bits that holds n, walked until it lands below n.

    Each round mixes one half of the bits into the other, which can be undone; so the whole maps one to one, whatever
    the mixing is. What lands at n or above is mapped again, which also is one to one (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). The domain is at most four times n, so that takes four times on average at most.
    """

    def __init__(self, n: int, seed: int) -> None:
        super().__init__(n, seed)
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = [derived_seed("order", seed, n, place) for place in range(ROUNDS)]

    def indices(self, positions: Tensor) -> Tensor:
        """Return the index at each position."""
        return self._walked(positions, self._keys, turned=False)

    def positions(self, indices: Tensor) -> Tensor:
        """Return the position of each index."""
        return self._walked(indices, self._keys[::-1], turned=True)

    def _walked(self, numbers: Tensor, keys: list[int], turned: bool) -> Tensor:
        numbers = self._mapped(numbers, keys, turned)
        while True:
            outside = (numbers >= self.n).nonzero()[:, 0]
            if len(outside) == 0:
                return numbers
            numbers[outside] = self._mapped(numbers[outside], keys, turned)

    def _mapped(self, numbers: Tensor, keys: list[int], turned: bool) -> Tensor:
        """Go through the rounds once; the way back is the same with the keys and the halves turned round."""
        left, right = numbers >> self._half, numbers & self._mask
        if turned:
            left, right = right, left
        for key in keys:
            left, right = right, left ^ self._mix(right, key)
        if turned:
            left, right = right, left
        return (left << self._half) | right

    def _mix(self, half: Tensor, key: int) -> Tensor:
        """Scramble the bits of a half: two multiplications modulo 2**64, whose high bits depend on all lower ones."""
        mixed = (half ^ key).mul_(-0x61C8864680B583EB)
        mixed ^= (mixed >> 32) & 0xFFFFFFFF  # the mask: a shift of a negative number brings its sign in
        mixed.mul_(-0x4B47D0C5A2A0E9A5)
        return mixed.bitwise_right_shift_(64 - self._half).bitwise_and_(self._mask)
