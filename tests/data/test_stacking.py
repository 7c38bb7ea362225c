"""Samples put together as default_collate does it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from trainkit.data.stacking import collate_of, stacked

Point = namedtuple("Point", "x y")
T = torch.arange(3.0)

SAMPLES: list[list[Any]] = [
    [(T, 1), (T + 1, 2)],
    [(T, T > 1), (T, T > 0)],
    [(T, 1.5, "a", np.ones(2)), [T, 2.5, "b", np.zeros(2)]],
    [(T, (T, {"a": T})), (T, (T + 1, {"a": T - 1}))],
    [{"x": T, "y": 1}, {"y": 2, "x": T, "more": 3}],
    [Point(T, 1), Point(T, 2)],
    [OrderedDict(a=T), OrderedDict(a=T)],
    [[T, 1], [T, 2]],
    [T, T],
    [3, 4],
    [()],
    [(torch.nn.Parameter(T),)] * 2,
]


@pytest.mark.parametrize("samples", SAMPLES, ids=range(len(SAMPLES)))
def test_a_batch_is_what_default_collate_gives(samples: list[Any]) -> None:
    mine, torchs = stacked(samples), default_collate(samples)
    assert type(mine) is type(torchs)
    assert repr(mine) == repr(torchs)


@pytest.mark.parametrize(
    "samples",
    [
        [(T, 1), (T,)],
        [(T,), (torch.zeros(2),)],
        [(T,), (None,)],
        [{"a": T}, {"b": T}],
        [(T.to_sparse(),)] * 2,
        [(None,)],
    ],
    ids=range(6),
)
def test_an_error_is_default_collates(samples: list[Any]) -> None:
    with pytest.raises((TypeError, RuntimeError, KeyError)) as torchs:
        default_collate(samples)
    with pytest.raises(torchs.type) as mine:
        stacked(samples)
    assert str(mine.value) == str(torchs.value)


def test_another_collate_fn_stays_what_it_is() -> None:
    assert collate_of(list) is list
    assert collate_of(default_collate) is stacked
