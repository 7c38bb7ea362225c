"""Which sizes are tried, and which is found."""

from __future__ import annotations

from typing import Any

import pytest

from trainkit.batch_size import bisected, doubled


@pytest.mark.parametrize(
    ("search", "start", "limit", "tried"),
    [
        (doubled, 2, 10, [2, 4, 8, 16]),
        (doubled, 2, 1000, [2, 4, 8, 16, 32, 64]),  # `most`
        (doubled, 2, 64, [2, 4, 8, 16, 32, 64]),
        (doubled, 500, 100, [500, 250, 125, 62, 64]),
        (doubled, 500, 400, [500, 250]),
        (bisected, 2, 10, [2, 4, 8, 16, 12, 10, 11]),
        (bisected, 2, 1000, [2, 4, 8, 16, 32, 64]),
        (bisected, 2, 1, [2, 1]),
        (bisected, 40, 10, [40, 20, 10, 15, 12, 11]),
    ],
)
def test_sizes_are_tried_in_this_order(search: Any, start: int, limit: int, tried: list[int]) -> None:
    sizes = []

    def fits(size: int) -> bool:
        sizes.append(size)
        return size <= limit

    found = search(fits, start, 64 if start <= 64 else 250 if limit == 400 else 64, 25)
    assert sizes == tried
    assert found == max(size for size in tried if size <= limit)


@pytest.mark.parametrize("search", [doubled, bisected])
def test_the_number_of_tries_is_limited(search: Any) -> None:
    sizes = []
    assert search(lambda size: sizes.append(size) or True, 2, 8192, 3) == 8
    assert sizes == [2, 4, 8]


def test_sizes_that_do_not_fit_are_tries_of_doubling_only() -> None:
    assert doubled(lambda size: False, 64, 8192, 2) == 16  # the one that would have been next
    assert bisected(lambda size: size <= 50, 2, 8192, 6) == 48  # 2, 4, 8, 16, 32 fit, 64 does not, 48 fits


@pytest.mark.parametrize("limit", range(1, 40))
def test_bisecting_finds_exactly_the_largest(limit: int) -> None:
    assert bisected(lambda size: size <= limit, 2, 8192, 25) == limit
