"""Half an epoch's running values on another number of processes: nothing of them is lost, and nothing counts twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.metrics.gathered import merged_states
from trainkit.metrics.objects import object_at

State = dict[str, Any]
NAMED = ("name", "hook", "suffix", "loader")


def share_of(states: Sequence[State], part: int, parts: int, module: nn.Module | None = None) -> State:
    """Return what one process loads of the states that `Metrics.state_dict` returned in each process of another run.

    As many parts of the data as before: each has its own again. Another number: the first has everything, the others
    begin with the same names and nothing in them.

    Args:
        states: one of each process, by rank.
        part: which part of the data the process has now, as `strategy.shard` says.
        parts: how many there are now.
        module: where the metric objects are.
    """
    states = of_each_part(states)
    if len(states) == parts:
        return states[part]
    return merged(states, module) if part == 0 else emptied(merged(states))


def merged(states: Sequence[State], module: nn.Module | None = None) -> State:
    """Return the states of several processes as that of one: totals and weights added up, extremes compared.

    Metric objects go by their `dist_reduce_fx`; states that can't be made one stay what they are on the first process,
    with a warning.

    Args:
        states: one of each process, by rank.
        module: where the metric objects are; without it they stay what they are on the first process.
    """
    states = of_each_part(states)
    by_name: dict[tuple[Any, ...], list[State]] = {}
    for state in states:
        for metric in state["train"]:
            by_name.setdefault(tuple(metric[part] for part in NAMED), []).append(metric)
    places = dict.fromkeys(where for state in states for where in state["objects"])
    objects = {
        where: merged_states(
            object_at(module, where), where, [state["objects"][where] for state in states if where in state["objects"]]
        )
        for where in places
    }
    return {**states[0], "train": [_merged_metric(of_one) for of_one in by_name.values()], "objects": objects}


def emptied(state: State) -> State:
    """Return a state with the same names and nothing in them."""
    return {**state, "train": [_emptied_metric(metric) for metric in state["train"]], "objects": {}}


def of_each_part(states: Sequence[State]) -> list[State]:
    """Return one state of each part of the data: processes that share one have the same."""
    first: dict[int, State] = {}
    for rank, state in enumerate(states):
        first.setdefault(state.get("part", rank), state)
    return [first[part] for part in sorted(first)]


def _merged_metric(metrics: Sequence[State]) -> State:
    first = metrics[0]
    if first.get("alone") or "total" not in first:
        return first
    totals = [metric["total"] for metric in metrics if metric["total"] is not None]
    lasts = [metric["last"] for metric in metrics if metric["last"] is not None]
    return {
        **first,
        "total": _combined(first["reduce"], totals) if totals else None,
        "weight": sum(metric["weight"] for metric in metrics),
        "last": lasts[0] if lasts else None,
    }


def _combined(reduce: str, totals: Sequence[Any]) -> Any:
    if reduce in ("mean", "sum"):
        return sum(totals[1:], totals[0])
    if any(isinstance(total, Tensor) for total in totals):
        column = torch.stack([torch.as_tensor(total, dtype=torch.float64) for total in totals])
        return column.amin() if reduce == "min" else column.amax()  # a NaN stays
    return math.nan if any(map(math.isnan, totals)) else min(totals) if reduce == "min" else max(totals)


def _emptied_metric(metric: State) -> State:
    return {**metric, "total": None, "weight": 0.0} if "total" in metric else metric
