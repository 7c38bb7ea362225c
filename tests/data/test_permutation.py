"""A shuffled order of any size, worked out where it is looked at."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.permutation import LARGE, Drawn, Feistel, Permutation, permutation

KINDS = (Feistel, Drawn, Permutation)


def whole(kind: type[Permutation], n: int, seed: int) -> list[int]:
    return kind(n, seed).indices(torch.arange(n)).tolist()


def chi_square(counts: torch.Tensor) -> float:
    """Return how far counts are from being all alike, in standard deviations of what chance gives."""
    expected = counts.double().mean()
    value = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return (value - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_is_mapped_one_to_one_and_back(kind: type[Permutation]) -> None:
    for n in [*range(1, 150), *range(251, 262), *range(150, 2000, 97), 1023, 1024, 1025, 1999, 4099, 65537]:
        made = kind(n, 7 * n + 1)
        indices = made.indices(torch.arange(n))
        assert torch.equal(indices.sort().values, torch.arange(n)), n
        assert torch.equal(made.positions(indices), torch.arange(n)), n


@given(st.sampled_from([2, 3, 5, 17, 1000, 10**6 + 3, 10**9, 2**40, 2**61 + 1]), st.integers(0, 2**63 - 1), st.data())
def test_a_position_and_its_index_are_each_others(n: int, seed: int, data: st.DataObject) -> None:
    made = Feistel(n, seed)
    position = data.draw(st.integers(0, n - 1))
    index = made.index(position)
    assert 0 <= index < n
    assert made.position(index) == position
    assert type(index) is int
    assert Feistel(n, seed).index(position) == index


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [-1, 5])
def test_what_lies_outside_is_refused(kind: type[Permutation], number: int) -> None:
    with pytest.raises(IndexError, match=f"positions 0 to 4. Received: {number}"):
        kind(5, 1).index(number)
    with pytest.raises(IndexError, match="a permutation of 5"):
        kind(5, 1).position(number)


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.sampled_from(KINDS), st.data())
def test_blocks_are_the_order_from_any_position_on(
    n: int, seed: int, kind: type[Permutation], data: st.DataObject
) -> None:
    start, step = data.draw(st.integers(0, n + 2)), data.draw(st.integers(1, 3))
    blocks = itertools.chain.from_iterable(kind(n, seed).blocks(start, n + 5, step))
    assert list(blocks) == whole(kind, n, seed)[start::step]


def test_an_order_is_the_same_on_every_day() -> None:
    """A checkpoint's position means nothing if this changes."""
    assert whole(Feistel, 12, 5) == [7, 5, 9, 2, 10, 3, 8, 6, 0, 4, 11, 1]
    assert [Feistel(10**9, 1234).index(p) for p in (0, 1, 999_999_999)] == [190139938, 128438607, 635870861]
    assert type(permutation(LARGE - 1, 0)) is Drawn
    assert type(permutation(LARGE, 0)) is Feistel


def test_seeds_give_orders_of_their_own() -> None:
    assert len({tuple(whole(Feistel, 40, seed)) for seed in range(200)}) == 200
    counts = torch.tensor([whole(Feistel, 4, seed) for seed in range(1200)])
    places = (counts * torch.tensor([64, 16, 4, 1])).sum(1).bincount(minlength=256)
    assert abs(chi_square(places[places > 0])) < 5  # all 24 orders of 4, each as often
    assert int((places > 0).sum()) == 24


@pytest.mark.parametrize("n", [10**6, 10**9, 3 * 2**30])
def test_a_large_order_shows_no_more_structure_than_randperm(n: int) -> None:
    """Where neighbours lie, how far apart, and what their low bits are."""
    made = Feistel(n, 99)
    for start in (0, n // 3, n - 40_000):
        indices = made.indices(torch.arange(start, start + 40_000))
        assert abs(chi_square((indices * 100 // n).bincount(minlength=100))) < 5
        assert abs(chi_square((indices % 64).bincount(minlength=64))) < 5
        steps = (indices[1:] - indices[:-1]) % n
        assert abs(chi_square((steps * 50 // n).bincount(minlength=50))) < 5
        pairs = (indices[:-1] * 10 // n) * 10 + indices[1:] * 10 // n
        assert abs(chi_square(pairs.bincount(minlength=100))) < 5
        rising = float((steps < n // 2).double().mean())
        assert abs(rising - 0.5) < 0.02
    other = Feistel(n, 100).indices(torch.arange(40_000))
    assert int((other == made.indices(torch.arange(40_000))).sum()) <= 2  # two seeds do not meet


def test_every_index_comes_to_every_position() -> None:
    counts = torch.zeros(16, 16)
    for seed in range(1000):
        counts[torch.arange(16), whole(Feistel, 16, seed)] += 1
    assert abs(chi_square(counts.flatten())) < 5


def test_the_middle_of_a_huge_order_costs_no_memory() -> None:
    permutation(10**9, 1).index(5)
    tracemalloc.start()
    try:
        made = permutation(10**9, 7)
        first = next(made.blocks(5 * 10**8, 10**9))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(first) == 256
    assert most < 200_000
