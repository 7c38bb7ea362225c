"""Tensors that are spread over processes (DTensors): gathered for one file, and cut from one again.

    whole(state)            DTensors become full tensors on the host of rank 0; all processes call it
    placed(tensor, like)    a full tensor becomes what a module or an optimizer has in its place; no message is sent
    as_held(state, module)  so does every tensor of a checkpoint that has the name of one of the module's
    as_stepped(states, optimizers)   and every tensor that an optimizer keeps of a parameter

A file never says how its tensors were spread: it is the same one whatever strategy wrote it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def is_spread(value: Any) -> bool:
    """Whether a value is a DTensor."""
    spread = sys.modules.get("torch.distributed.tensor")  # not imported: nothing can be one
    return spread is not None and isinstance(value, spread.DTensor)


# ---------------------------------------------------------------------- from processes to a file
@torch.no_grad()
def whole(tree: Any, on_rank_zero: bool = True) -> Any:
    """Return a state whose DTensors are full tensors on the host; all processes call it with the same state.

    They are gathered one after the other, so that a device holds one full tensor at a time.

    Args:
        tree: the state.
        on_rank_zero: keep them on rank 0 only. The others get zeros of the same shape and dtype, which take no memory.
    """
    kept = not on_rank_zero or not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return _mapped(tree, lambda tensor: _gathered(tensor, kept) if is_spread(tensor) else tensor)


def _gathered(tensor: Any, kept: bool) -> Tensor:
    if tensor.device.type != tensor.device_mesh.device_type:  # parameters that wait on the host
        tensor = tensor.to(tensor.device_mesh.device_type)
    full = tensor.detach().full_tensor()
    if kept:
        return full.to("cpu")  # type: ignore[no-any-return]
    return torch.zeros((), dtype=full.dtype).expand(full.shape)


def _mapped(value: Any, change: Any) -> Any:
    """Return a state with each of its tensors changed; the lists and dicts around them are new."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (dict, OrderedDict):
        made = type(value)((key, _mapped(item, change)) for key, item in value.items())
        if hasattr(value, "_metadata"):  # of a module's state_dict
            made._metadata = value._metadata
        return made
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value


# ---------------------------------------------------------------------- from a file to processes
@torch.no_grad()
def placed(loaded: Any, like: Any) -> Any:
    """Return a full tensor as another one is spread: this process takes its part of it.

    Args:
        loaded: a full tensor; a `Stored` one is read only as far as it is needed. A DTensor is returned as it is.
        like: a DTensor of the same shape; for a plain tensor nothing is to be done.
    """
    if hasattr(loaded, "read_like"):
        return loaded.read_like(like)
    if not is_spread(like) or is_spread(loaded) or loaded.shape != like.shape:
        return loaded
    from torch.distributed.tensor import DTensor

    local = _part(loaded.detach(), like).to(like.to_local().device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _part(full: Tensor, like: Any) -> Tensor:
    """Return this process's part of a full tensor, as a view of it.

    A dimension that two dimensions of the mesh divide is divided by the last of them first where `fully_shard` came
    after tensor parallelism: torch calls such a placement a `_StridedShard`.
    """
    coordinate = like.device_mesh.get_coordinate()
    if coordinate is None:  # this process is not one of the mesh
        return full.new_empty(like.to_local().shape)
    divided = [(place, n) for n, place in enumerate(like.placements) if place.is_shard() or _is_strided(place)]
    for place, n in sorted(divided, key=lambda one: _is_strided(one[0])):
        parts = full.chunk(like.device_mesh.size(n), dim=place.dim)
        mine = coordinate[n]
        full = parts[mine] if mine < len(parts) else full.narrow(place.dim, full.shape[place.dim], 0)
    return full


def _is_strided(place: Any) -> bool:
    return type(place).__name__ == "_StridedShard"


def as_held(state: Any, own: Mapping[str, Any]) -> Any:
    """Return a state in which every tensor under the name of one of a module's is spread as that one is.

    So are its weights, wherever they are: in `state_dict`, or as an average in what a callback has kept.

    Args:
        state: what a checkpoint holds.
        own: the module's `state_dict()`.
    """
    spread = {name: tensor for name, tensor in own.items() if is_spread(tensor)}
    if not spread and not _stored_in(state):
        return state
    return _as_held(state, own)


def _as_held(value: Any, own: Mapping[str, Any]) -> Any:
    if type(value) in (dict, OrderedDict):
        made = type(value)()
        for key, item in value.items():
            here = type(key) is str and key in own and _is_tensor(item) and isinstance(own[key], Tensor)
            made[key] = placed(item, own[key]) if here and item.shape == own[key].shape else _as_held(item, own)
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata
        return made
    if type(value) in (list, tuple):
        return type(value)(_as_held(item, own) for item in value)
    return value


def as_stepped(states: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """Return the saved states of optimizers, with what they keep of a parameter spread as that one is.

    The count of a parameter's steps is a tensor of its own: one that several shared would count all their steps.
    """
    return [_as_stepped(state, optimizer) for state, optimizer in zip(states, optimizers, strict=True)]


def _as_stepped(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    indices = [index for group in state["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of = dict(zip(indices, parameters, strict=True))
    if not any(map(is_spread, parameters)) and not _stored_in(state):
        return dict(state)
    kept = {
        index: {name: _kept(name, value, of.get(index)) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": kept}


def _kept(name: str, value: Any, parameter: nn.Parameter | None) -> Any:
    if not _is_tensor(value):
        return value
    if name != "step" and parameter is not None and value.shape == parameter.shape:
        return placed(value, parameter)
    return _read(value).clone()


def _read(value: Any) -> Any:
    return value.read() if hasattr(value, "read") else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "read_like")


def _stored_in(value: Any) -> bool:
    """Whether there are tensors in a state that were left in their files."""
    if isinstance(value, Mapping):
        return any(map(_stored_in, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_stored_in, value))
    return hasattr(value, "read_like")


def read_all(state: Any) -> Any:
    """Return a state with the tensors that were left in their files."""
    if type(state) in (dict, OrderedDict):
        made = type(state)((key, read_all(item)) for key, item in state.items())
        if hasattr(state, "_metadata"):
            made._metadata = state._metadata
        return made
    if type(state) in (list, tuple):
        return type(state)(map(read_all, state))
    return state.read() if hasattr(state, "read_like") else state
