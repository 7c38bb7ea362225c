"""Whether weights are numbers: one pass over them at memory speed, and one transfer from the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.checkpoint.layout import is_spread

_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weights_are_finite(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's weights, the floating-point tensors of its "state_dict", have no nan and no infinity.

    A checkpoint without weights has none that are not finite. Of a tensor that is spread over processes only what this
    one has is looked at.
    """
    bounds: dict[torch.device, list[Tensor]] = {}
    for tensor in _floating(state.get("state_dict")):
        if tensor.numel():
            # much faster than torch.isfinite, which makes a tensor of its answers; a nan wins over every number
            bounds.setdefault(tensor.device, []).extend(bound.double() for bound in torch.aminmax(tensor))
    return all(bool(torch.stack(found).isfinite().all()) for found in bounds.values())


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _floating(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _floating(inner)
    elif isinstance(value, Tensor) and not value.is_meta:
        tensor = value.detach().to_local() if is_spread(value) else value.detach()  # type: ignore[attr-defined]
        if tensor.layout != torch.strided:
            tensor = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if tensor.is_floating_point():
            yield tensor if tensor.dtype in _WIDE else tensor.float()
