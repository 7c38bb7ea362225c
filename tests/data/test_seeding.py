"""The random sources a data set draws from, given and taken back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.data.seeding import NumpySource, PythonSource, TorchSource, give_back, kept, own_stream, seed_all, states


def drawn() -> list[Any]:
    """Draw from each source, of each an odd number of normal numbers: all three keep the spare one."""
    return [
        (random.random(), random.gauss(0, 1), random.randrange(10**9)),
        (np.random.rand(), np.random.randn(), np.random.randint(10**9)),
        (torch.rand(1).item(), torch.randn(1).item(), torch.randn(3).tolist()),
    ]


def slow(source: Any) -> Any:
    """Return a source as it is where its words are not found in memory."""
    source.get, source.set = source._get_slowly, getattr(source, "_set_slowly", random.setstate)
    if isinstance(source, PythonSource):
        source.seed = source._seed_slowly
    return source


KINDS: list[Any] = [
    TorchSource,
    NumpySource,
    PythonSource,
    lambda: slow(NumpySource()),
    lambda: slow(PythonSource()),
]
DRAWS: list[Any] = [
    [lambda: torch.rand(2).tolist(), lambda: torch.randn(1).tolist(), lambda: torch.randperm(5).tolist()],
    [np.random.rand, np.random.randn, lambda: np.random.permutation(5).tolist()],
    [random.random, lambda: random.gauss(0, 1), lambda: random.sample(range(9), 3)],
]
CASES = [(kind, DRAWS[of]) for kind, of in zip(KINDS, [0, 1, 2, 1, 2], strict=True)]


def test_the_words_are_found_where_they_lie_here() -> None:
    """Elsewhere each source is asked the long way, which gives the same; this machine's Python and numpy are known."""
    assert NumpySource().get.__name__ == "_get"
    assert PythonSource().get.__name__ == "_get"


@pytest.mark.parametrize(("kind", "draws"), CASES)
def test_a_state_comes_back_and_any_draw_is_noticed(kind: Any, draws: Any) -> None:
    source = kind()
    for draw in draws:
        draw()  # the first may leave a normal number to spare, which is part of the state, too
        state = source.get()
        assert not source.moved(state)
        first = draw()
        assert source.moved(state)
        draw()
        source.set(state)
        assert not source.moved(state)
        assert draw() == first


@pytest.mark.parametrize(("kind", "draws"), CASES)
def test_a_seed_stands_for_its_numbers_whatever_was_drawn_before(kind: Any, draws: Any) -> None:
    source = kind()
    seen = []
    for seed in (0, 1, 2**32 + 1, 2**63 - 1):
        source.seed(seed)
        numbers = [draw() for draw in draws]
        draws[1]()  # leaves a normal number to spare
        source.seed(seed)
        assert [draw() for draw in draws] == numbers
        seen.append(str(numbers))
    assert len(set(seen)) >= 3


def test_the_numbers_of_the_sources_have_nothing_in_common() -> None:
    for seed in range(200):
        seed_all(seed)
        uniform = {round(random.random(), 6), round(np.random.rand(), 6), round(torch.rand(1).item(), 6)}
        assert len(uniform) == 3


def test_neighbouring_seeds_give_numbers_that_are_spread_evenly() -> None:
    numbers: dict[str, list[float]] = {"python": [], "numpy": [], "torch": []}
    for seed in range(3000):
        seed_all(seed)
        for name, number in zip(numbers, (random.random(), np.random.rand(), torch.rand(1).item()), strict=True):
            numbers[name].append(number)
    for drawn_first in numbers.values():
        values = torch.tensor(drawn_first)
        assert abs(values.mean() - 0.5) < 0.03
        assert (values * 10).long().bincount(minlength=10).min() > 220  # 300 expected
        together = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]
        assert abs(together) < 0.08
    assert abs(torch.corrcoef(torch.tensor(list(numbers.values())))[[0, 0, 1], [1, 2, 2]]).max() < 0.08


def test_what_a_call_draws_is_the_seeds_and_what_the_caller_draws_its_own() -> None:
    seed_all(1)
    alone = drawn()
    seed_all(9)
    np.random.randn(), random.gauss(0, 1)
    before = states()
    following = drawn()
    give_back(before)
    assert kept(1, drawn) == alone
    with pytest.raises(ZeroDivisionError):
        kept(1, lambda: [drawn(), 1 / 0])
    assert drawn() == following


def test_an_iterable_has_the_sources_to_itself() -> None:
    def numbers() -> Any:
        for _ in range(3):
            yield drawn()

    alone = list(own_stream(5, numbers()))
    among = []
    seed_all(77)
    for item in own_stream(5, numbers()):
        among.append(item)
        drawn()
        seed_all(len(among))
    assert among == alone
    assert len({str(item) for item in alone}) == 3


def test_another_engine_behind_numpys_functions_is_asked_the_long_way() -> None:
    before = np.random.get_bit_generator()
    source = NumpySource()
    try:
        np.random.set_bit_generator(np.random.MT19937(3))
        state = source.get()
        first = np.random.rand()
        assert source.moved(state)
        source.set(state)
        assert np.random.rand() == first
        source.seed(4)
        first = np.random.rand()
        source.seed(4)
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(before)
