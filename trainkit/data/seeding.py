"""The random sources that a data set draws from, python's, numpy's and torch's, given and taken back in microseconds.

All three are Mersenne twisters, so a state is 624 words and a place in them. torch gives and takes its own in a
microsecond. `random.getstate` and `np.random.get_state` build Python objects of the words (9 and 31 microseconds), so
the words are copied where they lie, if they are found to lie there: each source is tried once, and what does not agree
with its own `getstate` is asked the long way.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch

from trainkit.random import MAX_SEED, numpy_random

WORDS = 624
NUMPYS, PYTHONS = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""What tells their seeds from torch's: from one and the same seed all three would draw the same numbers."""
NO_NORMAL = bytes(16)
MASK = 2**63 - 1
ODD = 0x1E3779B97F4A7C15
"""The step between the seeds of two samples; odd, so that no two of 2**32 have a seed's low 32 bits in common."""


class TorchSource:
    """torch's default generator on the host."""

    def __init__(self) -> None:
        generator = torch.default_generator
        self.get: Callable[[], Any] = generator.get_state
        self.set: Callable[[Any], Any] = generator.set_state
        self.seed: Callable[[int], Any] = generator.manual_seed

    def moved(self, since: Any) -> bool:
        """Whether anybody has drawn since it had that state."""
        now = self.get()  # to compare its bytes costs a sixth of torch.equal
        return ctypes.string_at(now.data_ptr(), now.numel()) != ctypes.string_at(since.data_ptr(), since.numel())


class NumpySource:
    """numpy's legacy global generator, that of `np.random.rand`."""

    def __init__(self) -> None:
        self._shared: Any = numpy_random().mtrand._rand
        self._engine = self._shared._bit_generator
        self.get, self.set = self._get_slowly, self._set_slowly
        self._words = self._normal = (ctypes.c_char * 0).from_address(0)
        where = _spare_normal(type(self._shared))
        if where is not None and type(self._engine).__name__ == "MT19937":
            self._words = (ctypes.c_char * (4 * WORDS + 4)).from_address(self._engine.ctypes.state_address)
            self._normal = (ctypes.c_char * 16).from_address(id(self._shared) + where)
            key, place = self._shared.get_state()[1:3]
            if self._words.raw == key.tobytes() + struct.pack("i", place):
                self.get, self.set = self._get, self._set

    def seed(self, seed: int) -> None:
        """Begin with the numbers that a seed stands for."""
        if self.get == self._get and self._shared._bit_generator is self._engine:
            self._engine._legacy_seeding((seed ^ NUMPYS) & MAX_SEED)  # what the line below does, with less around it
            self._normal.raw = NO_NORMAL
        else:
            self._shared.seed((seed ^ NUMPYS) & MAX_SEED)

    def moved(self, since: Any) -> bool:
        """Whether anybody has drawn since it had that state."""
        return bool(self.get() != since)

    def _get(self) -> Any:
        if self._shared._bit_generator is not self._engine:  # np.random.set_bit_generator
            return self._get_slowly()
        return self._words.raw, self._normal.raw

    def _set(self, state: Any) -> None:
        if len(state) != 2:
            self._set_slowly(state)
        else:
            self._words.raw, self._normal.raw = state

    def _get_slowly(self) -> Any:
        kind, key, place, has_normal, normal = self._shared.get_state()
        return kind, key.tobytes(), place, has_normal, normal

    def _set_slowly(self, state: Any) -> None:
        import numpy as np

        kind, key, place, has_normal, normal = state
        self._shared.set_state((kind, np.frombuffer(key, np.uint32), place, has_normal, normal))


class PythonSource:
    """The generator behind the functions of `random`."""

    def __init__(self) -> None:
        self._shared: Any = random._inst
        self.get, self.set, self.seed = self._get_slowly, self._shared.setstate, self._seed_slowly
        address = id(self._shared) + object.__basicsize__
        size = type(self._shared).__mro__[1].__basicsize__ - object.__basicsize__
        if size not in (4 * WORDS + 4, 4 * WORDS + 8):
            return
        self._all = (ctypes.c_char * (4 * WORDS + 4)).from_address(address)
        *words, place = self._shared.getstate()[1]
        if self._all.raw != struct.pack(f"i{WORDS}I", place, *words):
            return
        self.get, self.set = self._get, self._set
        self._engine = numpy_random().MT19937()
        if hasattr(self._engine, "_legacy_seeding"):
            # numpy's way to spread a seed over the words takes a third of the time of python's
            words = (ctypes.c_uint32 * WORDS).from_address(self._engine.ctypes.state_address)
            self._fresh, self._spread = struct.pack("i", WORDS), memoryview(words).cast("B")
            self._place, self._words = memoryview(self._all).cast("B")[:4], memoryview(self._all).cast("B")[4:]
            self.seed = self._seed

    def moved(self, since: Any) -> bool:
        """Whether anybody has drawn since it had that state."""
        return bool(self.get() != since)

    def _get(self) -> Any:
        return self._all.raw, self._shared.gauss_next

    def _set(self, state: Any) -> None:
        self._all.raw, self._shared.gauss_next = state

    def _seed(self, seed: int) -> None:
        self._engine._legacy_seeding((seed ^ PYTHONS) & MAX_SEED)
        self._words[:], self._place[:], self._shared.gauss_next = self._spread, self._fresh, None

    def _get_slowly(self) -> Any:
        return self._shared.getstate()

    def _seed_slowly(self, seed: int) -> None:
        self._shared.seed(seed ^ PYTHONS)


def _spare_normal(kind: Any) -> int | None:
    """Return where a RandomState keeps whether it has a normal number to spare, followed by that number."""
    made, size = kind(0), getattr(kind, "__basicsize__", 0)
    number = 0.72873214569871
    made.set_state((*made.get_state()[:3], 1, number))
    found = ctypes.string_at(id(made), size)
    where = found.find(struct.pack("d", number)) - 8
    if where < 0 or found[where : where + 4] != struct.pack("i", 1):
        return None
    made.set_state((*made.get_state()[:3], 0, 0.0))
    return where if ctypes.string_at(id(made) + where, 16) == bytes(16) else None


Source = TorchSource | NumpySource | PythonSource


@cache
def sources() -> tuple[Source, ...]:
    """Return the host's three sources."""
    return TorchSource(), NumpySource(), PythonSource()


def seed_all(seed: int) -> None:
    """Seed the host's three sources; devices are left alone."""
    for source in sources():
        source.seed(seed)


def states() -> list[Any]:
    """Return the state of each source."""
    return [source.get() for source in sources()]


def moved(which: Iterable[int], since: list[Any]) -> list[int]:
    """Return which of these sources anybody has drawn from since they had those states."""
    own = sources()
    return [at for at in which if own[at].moved(since[at])]


def give_back(taken: list[Any]) -> None:
    """Give each source a state back."""
    for source, state in zip(sources(), taken, strict=True):
        source.set(state)


def kept(seed: int, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call gives with seeded sources, which all have their state back after."""
    outside = states()
    seed_all(seed)
    try:
        return call(*arguments)
    finally:
        give_back(outside)


def own_stream(seed: int, iterable: Iterable[Any], at_once: int = 1) -> Iterator[list[Any]]:
    """Iterate with random sources that nobody else draws from, and give lists of so many items."""
    outside = states()
    seed_all(seed)
    items = None
    while True:
        try:
            if items is None:
                items = iter(iterable)
            taken = list(itertools.islice(items, at_once))
            inside = states()
        finally:
            give_back(outside)
        if not taken:
            return
        yield taken
        outside = states()
        give_back(inside)
