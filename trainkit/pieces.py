"""Tensors that are spread over processes (torch's DTensor): the piece of each, and the norm of all of them.

torch.distributed.tensor is imported where such tensors are made, and not here: without them nobody waits for it.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is spread over processes."""
    spread = sys.modules.get("torch.distributed.tensor")
    return spread is not None and isinstance(tensor, spread.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the numbers that this process has of a tensor, in their own memory."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its numbers; all processes that have a piece of it call this."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def piece_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor spread as another one is: each process, which has all of it, keeps its piece of it."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import _StridedShard

    assert isinstance(like, DTensor)
    mesh, coordinate, piece = like.device_mesh, like.device_mesh.get_coordinate(), tensor
    assert coordinate is not None
    cuts = [(at, p) for at, p in enumerate(like.placements) if p.is_shard() or isinstance(p, _StridedShard)]
    cuts.sort(key=lambda cut: isinstance(cut[1], _StridedShard))  # those are cuts of the others' pieces
    for at, placement in cuts:
        dim: int = placement.dim  # type: ignore[attr-defined]
        parts = piece.chunk(mesh.size(at), dim)
        mine = coordinate[at]
        piece = parts[mine] if mine < len(parts) else piece.narrow(dim, 0, 0)
    piece = piece.contiguous() if piece is not tensor and piece.numel() < tensor.numel() else piece.clone()
    return DTensor.from_local(piece, mesh, like.placements, run_check=False, shape=like.size(), stride=like.stride())


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module was made of: torch's `fully_shard` gives it one that derives from that."""
    fsdp, kind = sys.modules.get("torch.distributed.fsdp"), type(module)
    known = fsdp is not None and issubclass(kind, fsdp.FSDPModule)
    return kind.__mro__[2] if known else kind  # behind the new class and FSDPModule


def copy_parts(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of those parts that FSDP spreads into a deep copy's memo: FSDP refuses to be copied.

    A copy keeps its piece of the parameters, as a tensor that is spread, and is of the part's own class.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    spread = [part for part in module.modules() if fsdp is not None and isinstance(part, fsdp.FSDPModule)]
    for part in reversed(spread):  # parts before their owners
        if id(part) in memo or part is module:
            continue
        kind = class_of(part)
        twin: nn.Module = kind.__new__(kind)
        memo[id(part)] = twin
        state = {name: value for name, value in vars(part).items() if not name.startswith("__composable_api")}
        hooks: dict[str, Any] = {
            name: OrderedDict() for name in state if "_hooks" in name and isinstance(state[name], OrderedDict)
        }
        vars(twin).update(copy.deepcopy({**state, **hooks}, memo))


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return tensors in groups that torch's functions for many tensors can take: of one mesh, or on no mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if is_spread(tensor) else None, []).append(tensor)  # type: ignore[attr-defined]
    return list(groups.values())


def norm_of(tensor: Tensor, norm_type: float) -> Tensor:
    """Return a tensor's norm; of one that is spread it is spread, too: a part that `whole` makes one of all."""
    if not is_spread(tensor) or norm_type != math.inf:
        plain: Tensor = torch.linalg.vector_norm(tensor, norm_type)
        return plain
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(tensor, DTensor)
    own = local(tensor)
    largest = own.abs().amax() if own.numel() else own.new_zeros(())  # a process may have nothing of a small one
    placements = [Replicate() if p.is_replicate() else Partial("max") for p in tensor.placements]
    return DTensor.from_local(largest, tensor.device_mesh, placements, run_check=False)


def total_norm(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of all gradients together; those of one mesh take one message.

    Gradients that are not spread are the same in all processes, or this process's own.
    """
    norms = [whole(torch.nn.utils.get_total_norm(group, norm_type)) for group in by_kind(gradients)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)


@torch.no_grad()
def clip_norm(parameters: Iterable[Tensor], limit: float) -> Tensor | None:
    """Scale gradients so that the 2-norm of all of them is at most the limit, and return what it was."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    norm = total_norm(gradients)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    return norm


@torch.no_grad()
def clip_value(parameters: Iterable[Tensor], limit: float) -> None:
    """Bring each number of the gradients into [-limit, limit]."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)
