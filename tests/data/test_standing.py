"""Where random sources stand, noted and given back, whatever was drawn meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.data.standing import ground, standing

DRAWS: list[list[Callable[[], Any]]] = [
    [
        lambda: torch.rand(()).item(),
        lambda: torch.randn(1).item(),
        lambda: torch.randn(1, dtype=torch.double).item(),
        lambda: torch.randn(20).tolist(),
        lambda: torch.rand(624).tolist(),
        lambda: torch.randperm(2000).tolist(),
    ],
    [
        np.random.rand,
        np.random.randn,
        lambda: np.random.rand(312).tolist(),
        lambda: np.random.randint(0, 9, 5000).tolist(),
    ],
    [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: random.getrandbits(8),
        lambda: [random.random() for _ in range(312)],
        lambda: [random.getrandbits(32) for _ in range(3 * 624)],
    ],
]


def test_the_sources_are_found_where_they_lie_here() -> None:
    assert ground().found


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2], ids=["torch", "numpy", "python"])
def test_any_draw_is_noticed_and_taken_back(at: int, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground(), "found", found)
    for _ in range(40):
        for draw in DRAWS[at]:
            stood = standing()
            assert stood.moved((0, 1, 2)) == []
            first = draw()
            assert stood.moved((0, 1, 2)) == [at]
            assert stood.moved([other for other in (0, 1, 2) if other != at]) == []
            DRAWS[at][0](), draw()
            stood.give_back()
            assert stood.moved((0, 1, 2)) == []
            assert draw() == first


def test_where_they_stood_earlier_is_not_forgotten_when_it_is_noted_again() -> None:
    stood, numbers = [], []
    for turn in range(30):
        stood.append(standing())
        numbers.append([draw() for draws in DRAWS for draw in draws])
        np.random.seed(turn), random.seed(turn), torch.manual_seed(turn)
    for then, drawn in list(zip(stood, numbers, strict=True))[::-1]:
        then.give_back()
        assert [draw() for draws in DRAWS for draw in draws] == drawn


def test_another_engine_behind_numpys_functions_is_followed() -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937(3))
        stood = standing()
        first = np.random.rand()
        assert stood.moved((0, 1, 2)) == [1]
        stood.give_back()
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(before)


def test_an_engine_that_comes_in_between_counts_as_a_draw() -> None:
    before, stood = np.random.get_bit_generator(), standing()
    first = torch.rand(1)
    try:
        np.random.set_bit_generator(np.random.MT19937(3))
        assert stood.moved((0, 1, 2)) == [0, 1, 2]
        stood.give_back()
        assert torch.rand(1) == first
    finally:
        np.random.set_bit_generator(before)
