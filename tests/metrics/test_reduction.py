"""What several processes send each other comes to what one process would have, however the values are dealt out."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.metrics import Metrics
from trainkit.metrics.reduction import Share, packed, result, unpacked, without_rounding

CPU = torch.device("cpu")
REDUCTIONS = ("mean", "sum", "min", "max")
NOTHING = {reduce: Share(reduce, None, 0) for reduce in REDUCTIONS}

counts = st.integers(-(2**20), 2**20)
numbers = st.floats(-1e6, 1e6, width=32) | st.sampled_from([math.nan, math.inf, -math.inf])


def reduced(of_each_process: list[list[Share]]) -> list[float]:
    """Return what all shares come to, as the processes work it out: with one sum and one maximum over all."""
    sent = [packed(shares, torch.float64, CPU) for shares in of_each_process]
    added = torch.stack([adding for adding, _ in sent]).sum(0).tolist()
    maxima = torch.stack([extremes for _, extremes in sent]).amax(0).tolist()
    kinds = [share.reduce for share in of_each_process[0]]
    return [result(kind, *found, None) for kind, found in zip(kinds, unpacked(kinds, added, maxima), strict=True)]


def logged(values: list[Any], weights: list[int]) -> list[Share]:
    """Return the shares of a process that has logged these values under a name for each reduction."""
    if not values:
        return list(NOTHING.values())
    metrics = Metrics()
    metrics.begin("validation")
    metrics.begin_loader(0, "validation_step")
    for value, weight in zip(values, weights, strict=True):
        for reduce in REDUCTIONS:
            metrics.log(reduce, value, reduce_fx=reduce, batch_size=weight)
    return [Share(metric.reduce, metric.total, metric.weight) for metric in metrics.table.metrics.values()]


def dealt(items: list[Any], processes: int) -> list[list[Any]]:
    return [items[rank::processes] for rank in range(processes)]


@given(st.lists(st.tuples(counts, st.integers(1, 100)), min_size=1, max_size=30), st.integers(1, 8), st.booleans())
def test_counts_are_the_same_to_the_last_bit_on_any_number_of_processes(
    items: list[tuple[int, int]], processes: int, as_tensors: bool
) -> None:
    shares = [
        logged([torch.tensor(float(value)) if as_tensors else value for value, _ in part], [w for _, w in part])
        for part in dealt(items, processes)
    ]
    mean = math.fsum(value * weight for value, weight in items) / sum(weight for _, weight in items)
    values = [value for value, _ in items]
    assert reduced(shares) == [mean, sum(values), min(values), max(values)]


@given(st.lists(numbers, min_size=1, max_size=20), st.integers(1, 6), st.booleans())
def test_any_numbers_come_to_what_one_process_gets(values: list[float], processes: int, as_tensors: bool) -> None:
    items = [torch.tensor(value) if as_tensors else value for value in values]
    alone = reduced([logged(items, [1] * len(items))])
    together = reduced([logged(part, [1] * len(part)) for part in dealt(items, processes)])
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-9, atol=1e-3, equal_nan=True)
    assert [math.isnan(value) for value in together[2:]] == [any(map(math.isnan, values))] * 2


def test_where_nobody_has_a_value_there_is_none() -> None:
    mean, total, least, most = reduced([list(NOTHING.values())] * 3)
    assert math.isnan(mean)
    assert (total, least, most) == (0, math.inf, -math.inf)


def test_tensors_and_numbers_travel_together_in_one_dtype() -> None:
    shares = [Share("mean", torch.tensor(6.0), torch.tensor(2)), Share("max", 3, 1), Share("min", torch.tensor(4), 1)]
    adding, extremes = packed(shares, torch.float64, CPU)
    assert adding.dtype == extremes.dtype == torch.float64
    assert reduced([shares, [Share("mean", 0.0, 1), Share("max", None, 0), Share("min", -1.0, 1)]]) == [2.0, 3.0, -1.0]


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 64)), min_size=1, max_size=200), st.booleans())
def test_the_accuracy_of_an_epoch_is_that_of_its_counts_to_the_last_bit(
    batches: list[tuple[int, int]], as_tensors: bool
) -> None:
    sizes = [size for _, size in batches]
    right = [min(count, size) for count, size in batches]
    metrics = Metrics()
    metrics.begin("validation")
    metrics.begin_loader(0, "validation_step")
    for count, size in zip(right, sizes, strict=True):
        accuracy = (torch.arange(size) < count).float().mean() if as_tensors else count / size
        metrics.log("accuracy", accuracy, batch_size=size)
    metrics.end_loader(0, len(batches))
    expected = sum(right) / sum(sizes)
    assert metrics.end_evaluation()[0][0]["accuracy"] == (
        torch.tensor(expected, dtype=torch.float64).float().item() if as_tensors else expected
    )


@given(st.floats(-1e9, 1e9), st.sampled_from([torch.float32, torch.float64, None]))
def test_what_is_no_count_stays_within_its_rounding(total: float, dtype: torch.dtype | None) -> None:
    found = without_rounding(total, dtype)
    assert abs(found - total) <= abs(total) * (2**-23 if dtype is torch.float32 else 2**-45)
    assert float(without_rounding(torch.tensor(total, dtype=torch.float64), dtype)) == found
    assert math.isnan(without_rounding(math.nan, dtype))
    assert without_rounding(math.inf, dtype) == math.inf
