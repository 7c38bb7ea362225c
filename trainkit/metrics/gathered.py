"""Metric objects over several processes: they compute what all processes have updated them with.

torchmetrics would bring its states together inside `compute`, a collective for each state; a process that was given no
batch has lists without tensors there, of no dtype and no number of dimensions, and the others wait for it or fail. So
the states travel here, all of them at once, and `compute` finds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.errors import warn
from trainkit.metrics.objects import copied

COUNT = "_update_count"
State = dict[str, Any]


def computed_alone(metric: Any) -> Any:
    """Return what a metric object computes from this process's updates alone."""
    with _not_synchronizing(_parts(metric)):
        return metric.compute()


def own_states(metric: Any) -> list[State] | None:
    """Return the states of a metric object and of those inside it, on the host; None: it is left to itself.

    That is one which is not torchmetrics', or was told to synchronize in another way, or not at all.
    """
    parts = _parts(metric)
    if not parts or not all(_by_default(part) for part in parts):
        return None
    states = [{key: copied(getattr(part, key), "cpu") for key in part._defaults} for part in parts]
    return [{**state, COUNT: part._update_count} for state, part in zip(states, parts, strict=True)]


def updated(states: Sequence[State] | None) -> bool:
    """Whether there was any update."""
    return states is not None and any(state[COUNT] for state in states)


def computed_from(metric: Any, everyone: Sequence[Sequence[State]]) -> Any:
    """Return what a metric object computes from the states of several processes; its own stay as they are."""
    parts = _parts(metric)
    kept = [{key: getattr(part, key) for key in (*part._defaults, COUNT)} for part in parts]
    with _not_synchronizing(parts):
        try:
            for index, part in enumerate(parts):
                for key, value in combined(part, [states[index] for states in everyone]).items():
                    setattr(part, key, value)
            return metric.compute()
        finally:
            for part, state in zip(parts, kept, strict=True):
                for key, value in state.items():
                    setattr(part, key, value)


def combined(part: Any, states: Sequence[State]) -> State:
    """Return several processes' states of one torchmetrics metric as one, as its `dist_reduce_fx` say."""
    states = [state for state in states if state[COUNT]] or list(states[:1])
    counted = {COUNT: sum(state[COUNT] for state in states)}
    if len(states) == 1:
        return {key: copied(value, part.device) for key, value in states[0].items()}
    return {key: _reduced(part, key, [state[key] for state in states]) for key in part._defaults} | counted


def _reduced(part: Any, key: str, values: list[Any]) -> Any:
    reduction: Callable[..., Any] | None = part._reductions[key]
    device = "cpu" if getattr(part, "compute_on_cpu", False) and isinstance(values[0], list) else part.device
    if isinstance(values[0], list):
        items = [copied(item, device) for value in values for item in value]
        return items if reduction is None or _concatenates(reduction) or not items else reduction(items)
    tensors = [value.to(device) for value in values]
    if reduction is not None and _concatenates(reduction):
        return torch.cat([tensor.reshape(1) if not tensor.ndim else tensor for tensor in tensors])
    return reduction(torch.stack(tensors)) if reduction is not None else torch.stack(tensors)


def mergeable(part: Any, key: str) -> bool:
    """Whether updates can go on from several processes' states as one: not where `compute` has to see each of them."""
    return part._reductions[key] is not None or isinstance(part._defaults[key], list)


def merged_states(metric: Any, where: str, states: Sequence[State]) -> State:
    """Return saved states of one metric object, a process's each, as one that updates can go on from."""
    counting = [state for state in states if state.get(COUNT)]
    defaults = getattr(metric, "_defaults", {})
    if len(counting) < 2 or metric is None:
        return dict(counting[0] if counting else states[0])
    if not all(mergeable(metric, key) for key in defaults):
        warn(
            f"{where}: {type(metric).__name__} has states of which several processes' can't be made one. Of the epoch "
            "that is resumed on another number of processes, it has what the first one had."
        )
        return dict(counting[0])
    merged = {**counting[0], **combined(metric, counting)}
    if "_num_vals_seen" in merged:
        merged["_num_vals_seen"] = sum(state["_num_vals_seen"] for state in counting)
    return merged


def _concatenates(reduction: Callable[..., Any]) -> bool:
    return getattr(reduction, "__name__", "") == "dim_zero_cat"


def _parts(metric: Any) -> list[Any]:
    """Return the torchmetrics metrics in an object: itself, and those that a wrapper has inside."""
    inside = metric.modules() if isinstance(metric, nn.Module) else [metric]
    return [part for part in inside if hasattr(part, "_defaults") and hasattr(part, "_reductions")]


def _by_default(part: Any) -> bool:
    given = (getattr(part, name, None) for name in ("dist_sync_fn", "process_group"))
    return bool(getattr(part, "sync_on_compute", True)) and not any(one is not None for one in given)


@contextmanager
def _not_synchronizing(parts: Sequence[Any]) -> Iterator[None]:
    before = [part._to_sync for part in parts]
    for part in parts:
        part._to_sync, part._computed = False, None
    try:
        yield
    finally:
        for part, synchronizes in zip(parts, before, strict=True):
            part._to_sync = synchronizes


def on_host(value: Any) -> Any:
    """Return what was computed in a form that can be sent to another process."""
    return value.detach().cpu() if isinstance(value, Tensor) else value
