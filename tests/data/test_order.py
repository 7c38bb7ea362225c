"""Which sample is at which position of an epoch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.order import EpochOrder

SEEDS = st.integers(0, 2**63 - 1)


def order(size: int, seed: int, epoch: int = 0, start: int = 0, shuffle: bool = True) -> list[int]:
    made = EpochOrder(range(size), shuffle, seed)
    made.epoch, made.start = epoch, start
    return list(made)


@given(st.integers(1, 200), SEEDS, st.integers(0, 10**6))
def test_an_epoch_has_every_sample_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(order(size, seed, epoch)) == list(range(size))


@given(st.integers(1, 200), SEEDS, st.integers(0, 1000), st.data())
def test_from_any_position_on_it_is_the_rest_of_the_epoch(
    size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, size + 3))
    assert order(size, seed, epoch, start) == order(size, seed, epoch)[start:]
    assert order(size, seed, epoch, start, shuffle=False) == list(range(size))[start:]


def test_epochs_and_seeds_give_orders_of_their_own() -> None:
    orders = [tuple(order(50, seed, epoch)) for seed in range(10) for epoch in range(10)]
    assert len(set(orders)) == 100


def test_every_sample_comes_everywhere() -> None:
    firsts = torch.tensor([order(10, 1, epoch)[0] for epoch in range(2000)]).bincount(minlength=10)
    assert firsts.min() > 150  # 200 expected, standard deviation 13
    assert firsts.max() < 250


def test_an_order_is_the_same_on_every_day() -> None:
    assert order(10, 1234, 5) == [1, 4, 3, 5, 6, 0, 7, 8, 2, 9]  # a checkpoint's position means nothing if this changes


def test_drawing_an_order_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    order(100, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_has_the_size_that_the_data_have_when_it_begins() -> None:
    data = [1, 2]
    made = EpochOrder(data, True, 0)
    assert (len(made), sorted(made)) == (2, [0, 1])
    data.append(3)
    assert (len(made), sorted(made)) == (3, [0, 1, 2])


def test_it_knows_whether_anybody_has_asked() -> None:
    made = EpochOrder(range(3), True, 0)
    assert not made.used
    list(made)
    assert made.used
