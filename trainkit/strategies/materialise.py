"""Modules made on the meta device, where parameters have a shape and no memory: they get both it and their values.

Each part draws its values by its own `reset_parameters`, parts before their owner, in the order in which the owner has
them. That is the order in which most modules are made, so the values are those that the seed gives without a meta
device.
At most one part's parameters are whole at a time; where they are spread over processes, each then keeps its piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.errors import MisconfigurationException
from trainkit.pieces import is_spread, piece_of

RESETS = ("reset_parameters", "_reset_parameters")
"""What draws a part's values; the second one is what nn.MultiheadAttention and nn.Transformer call it."""
Same = Callable[[Iterable[Tensor]], None]


def is_on_meta(module: nn.Module) -> bool:
    """Whether some of a module's own or its parts' tensors have no memory."""
    return any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))


def materialise(
    module: nn.Module,
    device: torch.device,
    same: Same | None = None,
    finished: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give all parts of a module memory and values.

    Args:
        module: is changed in place; what is not on the meta device stays as it is.
        device: where the memory is.
        same: gives all processes the values that one of them has drawn.
        finished: called with each part when it and its own parts are complete.

    Raises:
        MisconfigurationException: parts that have no `reset_parameters`; the message names them.
    """
    lacking = [
        f"{name or 'the module itself'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if any(map(_is_meta, _own(part))) and _reset_of(part) is None
    ]
    if lacking:
        raise MisconfigurationException(
            f"{', '.join(lacking)}: made on the meta device, without a reset_parameters() method that gives parameters "
            "and buffers their first values. Write one that sets all of them, or make that part outside of "
            "`torch.device('meta')` and `init_module(empty_init=True)`."
        )
    known: dict[Tensor, nn.Parameter] = {}
    for part in parts_before_owners(module):
        if any(map(_is_meta, _own(part))):
            _materialise_own(part, device, same, known)
        if finished is not None:
            finished(part)


def parts_before_owners(module: nn.Module) -> list[nn.Module]:
    """Return all parts of a module, each once and behind its own parts, and the module last."""
    found: dict[nn.Module, None] = {}

    def visit(part: nn.Module) -> None:
        for child in part.children():
            if child not in found:
                visit(child)
        found.setdefault(part)

    visit(module)
    return list(found)


def _materialise_own(
    part: nn.Module, device: torch.device, same: Same | None, known: dict[Tensor, nn.Parameter]
) -> None:
    before = {name: p for name, p in part._parameters.items() if p is not None and p.is_meta}
    for name, parameter in before.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        part._parameters[name] = nn.Parameter(whole, parameter.requires_grad)
    buffers = [name for name, buffer in part._buffers.items() if buffer is not None and buffer.is_meta]
    for name in buffers:
        part._buffers[name] = torch.empty_like(part._buffers[name], device=device)  # type: ignore[arg-type]
    reset = _reset_of(part)
    assert reset is not None
    reset()
    for name, old in before.items():
        drawn = part._parameters[name]
        assert drawn is not None
        if old not in known:  # else another part has it, too, and has drawn it
            if same is not None:
                same([drawn])
            known[old] = nn.Parameter(piece_of(drawn.detach(), old), old.requires_grad) if is_spread(old) else drawn
        part._parameters[name] = known[old]
    if same is not None:
        same(buffer for name in buffers if (buffer := part._buffers[name]) is not None)


def _own(part: nn.Module) -> Iterable[Tensor]:
    return chain(part.parameters(recurse=False), part.buffers(recurse=False))


def _is_meta(tensor: Tensor) -> bool:
    return tensor.is_meta


def _reset_of(part: nn.Module) -> Callable[[], Any] | None:
    return next((method for name in RESETS if callable(method := getattr(part, name, None))), None)
