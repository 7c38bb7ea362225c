"""Where the three random sources stand, noted before a batch and given back after it in about a microsecond.

A draw moves a Mersenne twister's place in its 624 words, and replaces all of the words at once when they are used up.
So the place and a few words tell whether anybody has drawn, and the words have to be copied again only when those few
have changed; 2.5 kilobytes a source and batch would cost most for what they push out of the caches. The sources are
read where they lie in memory, if they are found to lie there; else they are asked for all they have.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from trainkit.data.seeding import WORDS, NumpySource, PythonSource, give_back, moved, sources, states

Mark = tuple[Any, ...]
PARTS = (slice(0, 2), slice(2, 5), slice(5, 8))
"""What of a mark is torch's, numpy's and python's."""
SOME, LAST = 36, 16
"""So many bytes of the words are looked at: some at the beginning, which may have one that is always the same, and
the last."""
PLACE, SPARE = 20, 28
"""So many bytes before torch's words say which place of them is next, and so many after them keep spare numbers."""
SPARE_IS_THERE = PLACE + 4 * WORDS + 20


class Standing:
    """Where the sources stood: a mark, and the words they had; without a mark all of their states."""

    __slots__ = ("mark", "whole")

    def __init__(self, mark: Mark | None, whole: list[Any]) -> None:
        self.mark, self.whole = mark, whole

    def moved(self, which: Iterable[int]) -> list[int]:
        """Return which of these sources anybody has drawn from since."""
        if self.mark is None:
            return moved(which, self.whole)
        now = ground().mark()
        if now is None:
            return list(which)
        return [at for at in which if now[PARTS[at]] != self.mark[PARTS[at]]] if now != self.mark else []

    def give_back(self) -> None:
        """Put the sources where they stood."""
        if self.mark is None:
            give_back(self.whole)
        else:
            ground().put(self.mark, self.whole)


def standing() -> Standing:
    """Note where the sources stand."""
    return ground().note()


@cache
def ground() -> Ground:
    """Return the sources as they lie in this process's memory."""
    return Ground()


def _at(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


class Ground:
    """The sources, read and written where they lie."""

    def __init__(self) -> None:
        self._known: Mark = ()  # the words that the states below have
        self._whole: list[Any] = []
        torchs, numpys, pythons = _torchs_words(), _numpys_words(), _pythons_words()
        self.found = False
        """Whether all three are found."""
        if torchs is None or numpys is None or pythons is None:
            return
        self.found = True
        words, numpy, python = torchs, numpys[0], pythons
        self._shared, self._engine = numpys[2]._shared, numpys[2]._engine
        self._python: Any = sources()[2]._shared  # type: ignore[union-attr]
        end = 4 * WORDS
        self._torch_head, self._torch_tail = _at(words - PLACE, PLACE + SOME), _at(words + end - LAST, LAST + SPARE)
        self._numpy_head, self._numpy_tail = _at(numpy, SOME), _at(numpy + end - LAST, LAST + 4)
        self._normal = _at(numpys[1], 16)
        self._python_head, self._python_tail = _at(python, 4 + SOME), _at(python + 4 + end - LAST, LAST)

    def mark(self) -> Mark | None:
        """Return what tells whether anybody draws from now on; None when the sources can't be read."""
        if not self.found or self._shared._bit_generator is not self._engine:  # np.random.set_bit_generator
            return None
        return (
            self._torch_head.raw, self._torch_tail.raw,
            self._numpy_head.raw, self._numpy_tail.raw, self._normal.raw,
            self._python_head.raw, self._python_tail.raw, self._python.gauss_next,
        )  # fmt: skip

    def note(self) -> Standing:
        """Return where the sources stand."""
        mark = self.mark()
        if mark is None:
            return Standing(None, states())
        words = (mark[0][PLACE:], mark[1][:LAST], mark[2], mark[3][:LAST], mark[5][4:], mark[6])
        if words != self._known:
            self._known, self._whole = words, states()
        return Standing(mark, self._whole)

    def put(self, mark: Mark, whole: list[Any]) -> None:
        """Put the sources where a mark says, with the words that they had."""
        now = self.mark()
        for source, state, part in zip(sources(), whole, PARTS, strict=True):
            if now is None or now[part] != mark[part]:
                source.set(state)
        self._torch_head.raw, self._torch_tail.raw = mark[0], mark[1]
        self._numpy_head.raw, self._numpy_tail.raw, self._normal.raw = mark[2], mark[3], mark[4]
        self._python_head.raw, self._python_tail.raw, self._python.gauss_next = mark[5], mark[6], mark[7]


def _numpys_words() -> tuple[int, int, NumpySource] | None:
    """Return where numpy's words and its spare normal number lie."""
    source = sources()[1]
    if not isinstance(source, NumpySource) or source.get != source._get:
        return None
    return ctypes.addressof(source._words), ctypes.addressof(source._normal), source


def _pythons_words() -> int | None:
    """Return where python's place lies, followed by its words."""
    source = sources()[2]
    found = isinstance(source, PythonSource) and source.get == source._get
    return ctypes.addressof(source._all) if found else None  # type: ignore[union-attr]


def _torchs_words() -> int | None:
    """Return where the words of torch's default generator lie, after its seed and place and before spare numbers."""
    generator: Any = torch.default_generator
    base = getattr(generator, "_cdata", None)
    if type(generator) is not torch.Generator or not isinstance(base, int):
        return None
    tried: Any = torch.Generator()  # a source that nobody draws from shows where things are
    tried.manual_seed(12)
    torch.randn(1, generator=tried, device="cpu", dtype=torch.float64)  # one more to spare
    state = tried.get_state().numpy().tobytes()
    if len(state) < 24 + 8 * WORDS + 40:
        return None
    seed, left, seeded, place, *words = struct.unpack_from(f"Qiiq{WORDS}Q", state)
    packed = struct.pack(f"{WORDS}I", *words)
    where: int = ctypes.string_at(address := tried._cdata, 4 * WORDS).find(packed[:256])
    if where < PLACE:
        return None
    lies = _at(address + where - PLACE, PLACE + 4 * WORDS + SPARE)
    if struct.unpack_from("QiB", lies.raw) != (seed, left, seeded):
        return None
    if lies.raw[PLACE - 4 : PLACE + 4 * WORDS] != struct.pack("I", place) + packed or lies.raw[SPARE_IS_THERE] != 1:
        return None
    torch.randn(1, generator=tried, device="cpu", dtype=torch.float64)
    return base + where if lies.raw[SPARE_IS_THERE] == 0 else None
