"""Whether a checkpoint's weights are numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainkit.checkpoint import format

pytestmark = [  # torch says once that these are new
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex32]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_among_the_weights_is_found(dtype: torch.dtype, bad: float) -> None:
    weight = torch.full((7, 5), 3.0).to(dtype)
    state = {"state_dict": {"steps": torch.tensor(3), "empty": torch.zeros(0), "w": weight.t()}}
    assert format.weights_are_finite(state)
    weight[3, 2] = bad
    assert not format.weights_are_finite(state)


def test_the_largest_numbers_are_finite_and_sparse_weights_are_looked_at() -> None:
    largest = torch.full((4,), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert format.weights_are_finite({"state_dict": {"w": largest}})
    sparse = torch.eye(3)
    for bad in (1.0, math.nan):
        sparse[1, 1] = bad
        for made in (sparse.to_sparse(), sparse.to_sparse_csr()):
            assert format.weights_are_finite({"state_dict": {"w": made}}) is (bad == 1.0)


@pytest.mark.parametrize(
    "state", [{}, {"state_dict": {}}, {"state_dict": {"note": "x"}, "loss": torch.tensor(math.nan)}]
)
def test_only_weights_count(state: dict[str, Any]) -> None:
    assert format.weights_are_finite(state)


def test_weights_in_a_nested_state_dict_are_looked_at() -> None:
    assert not format.weights_are_finite({"state_dict": {"ema": {"w": [torch.tensor(math.inf)]}}})
