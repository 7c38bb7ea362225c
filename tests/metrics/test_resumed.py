"""Half an epoch goes on in another number of processes than it began in."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainkit.metrics import TRAIN_BATCH, Metrics
from trainkit.metrics.resumed import emptied, merged, of_each_part, share_of

torchmetrics = pytest.importorskip("torchmetrics")
REDUCTIONS = ("mean", "sum", "min", "max")


class Parts(nn.Module):
    """Metric objects whose states are added up, put one behind the other, and neither."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torchmetrics.MeanMetric()
        self.auroc = torchmetrics.AUROC(task="binary")
        self.pearson = torchmetrics.PearsonCorrCoef()


def training(module: nn.Module | None = None) -> Metrics:
    metrics = Metrics(module)
    metrics.start_batches(TRAIN_BATCH)
    return metrics


def log(metrics: Metrics, values: Any, only: str = "") -> None:
    for value in values:
        for reduce in REDUCTIONS:
            metrics.log(only + reduce, value, on_step=False, on_epoch=True, reduce_fx=reduce, batch_size=3)


def resumed(state: dict[str, Any], module: nn.Module | None = None) -> Metrics:
    metrics = training(module)
    metrics.load_state_dict(state)
    return metrics


def at_the_end(metrics: Metrics) -> dict[str, float]:
    metrics.end_batches()
    return {name: float(value) for name, value in metrics.end_epoch(whole=True).items()}


@given(
    st.lists(st.integers(-1000, 1000), min_size=4, max_size=24),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
)
def test_nothing_is_lost_and_nothing_counts_twice(values: list[int], before: int, after: int, as_tensors: bool) -> None:
    items = [torch.tensor(float(value)) if as_tensors else value for value in values]
    half = len(items) // 2
    whole = training()
    log(whole, items)

    states = []
    for rank in range(before):
        metrics = training()
        log(metrics, items[:half][rank::before])
        states.append(metrics.state_dict())
    going_on = []
    for part in range(after):
        metrics = resumed(share_of(states, part, after))
        log(metrics, items[half:][part::after])
        going_on.append(metrics.state_dict())
    assert at_the_end(resumed(merged(going_on))) == at_the_end(whole)


def test_what_only_some_processes_have_logged_stays() -> None:
    first, second = training(), training()
    log(first, [1.0])
    log(second, [2.0])
    log(second, [5.0], only="late_")
    values = at_the_end(resumed(merged([first.state_dict(), second.state_dict()])))
    assert values["mean"] == 1.5
    assert values["late_sum"] == 5.0


def test_what_rank_zero_logs_alone_is_not_added_up() -> None:
    states = []
    for rank in range(2):
        metrics = training()
        metrics.log("own", float(rank + 1), on_step=False, on_epoch=True, reduce_fx="sum", rank_zero_only=True)
        states.append(metrics.state_dict())
    assert at_the_end(resumed(merged(states))) == {"own": 1.0}


def test_processes_that_share_a_part_of_the_data_count_once() -> None:
    states = [{"part": part, "train": [], "objects": {}, "rank": rank} for rank, part in enumerate([0, 0, 1, 1])]
    assert [state["rank"] for state in of_each_part(states)] == [0, 2]
    assert share_of(states, 1, 2)["rank"] == 2


def test_the_same_number_of_processes_has_its_own_states_again() -> None:
    states = [{"train": [], "objects": {}, "rank": rank} for rank in range(3)]
    assert [share_of(states, part, 3)["rank"] for part in range(3)] == [0, 1, 2]


def test_a_minimum_with_nan_stays_nan() -> None:
    states = []
    for value in (torch.tensor(float("nan")), torch.tensor(1.0)):
        metrics = training()
        log(metrics, [value])
        states.append(metrics.state_dict())
    values = at_the_end(resumed(merged(states)))
    assert all(value != value for value in values.values())


def updated(module: Parts, x: Tensor) -> Metrics:
    metrics = training(module)
    for batch in x.split(4):
        module.mean.update(batch)
        module.auroc.update(torch.sigmoid(batch), (batch > 0.3).long())
        metrics.log("mean", module.mean, on_step=False, on_epoch=True)
        metrics.log("auroc", module.auroc, on_step=False, on_epoch=True)
    return metrics


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_metric_objects_go_on_with_what_all_processes_updated_them_with(processes: int) -> None:
    x = torch.linspace(-1, 1, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    whole = at_the_end(updated(Parts(), x))
    states = [updated(Parts(), x[:16][rank::processes]).state_dict() for rank in range(processes)]
    module = Parts()
    resumed(merged(states, module), module)
    assert module.mean.update_count == sum(state["objects"]["mean"]["_update_count"] for state in states)
    assert at_the_end(updated(module, x[16:])) == pytest.approx(whole, abs=1e-6)


def test_a_state_that_cannot_be_made_one_says_so() -> None:
    states = []
    for seed in range(2):
        module = Parts()
        module.pearson.update(*torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)))
        states.append(training(module).state_dict())
    module = Parts()
    with pytest.warns(UserWarning, match="pearson: PearsonCorrCoef"):
        state = merged(states, module)
    assert torch.equal(state["objects"]["pearson"]["mean_x"], states[0]["objects"]["pearson"]["mean_x"])


def test_the_others_begin_with_the_same_names_and_nothing_in_them() -> None:
    module = Parts()
    metrics = updated(module, torch.linspace(-1, 1, 8))
    log(metrics, [1.0], only="a_")
    state = emptied(metrics.state_dict())
    assert state["objects"] == {}
    assert [metric["name"] for metric in state["train"]] == ["mean", "auroc", "a_mean", "a_sum", "a_min", "a_max"]
    assert all(metric["total"] is None for metric in state["train"] if "total" in metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics computes without updates
        assert resumed(emptied(training().state_dict())).end_epoch(whole=True) == {}
