"""What may go into a checkpoint: tensors, numpy's arrays and numbers, and plain values.

Nothing else does, so that a checkpoint can be read anywhere and reading one never runs code from it. What can't be kept
is refused when it is saved, by its path in the state: months later, when somebody needs the file, would be too late.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 100
"""Deeper nesting is refused: nobody needs it, and a list that holds itself has no end."""

LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_NUMPY_TOO = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
]
_TORCH_ONLY = [
    *(torch.bfloat16, torch.complex32, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2),
    *(torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
]
NUMPY_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _NUMPY_TOO}
"""numpy's dtypes that torch has too, by the name that both have."""
DTYPES = NUMPY_DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in _TORCH_ONLY}
"""The dtypes a tensor in a checkpoint may have, by name; names in a file are looked up here and nowhere else."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)


def check_plain(state: Any, path: str = "") -> Any:
    """Return a state as it can be written, with its tensors detached; nothing is copied but the containers.

    Allowed are tensors, numpy's arrays and scalars with numbers in them, None, bool, int, float, complex, str, bytes,
    bytearray, torch.Size, torch.dtype, torch.device, and lists, tuples, sets, frozensets, dicts, OrderedDicts and
    Counters of them.

    Args:
        state: what is to be saved.
        path: where it is in a larger state, for the message.

    Raises:
        TypeError: anything else is in there; the message has its path, as in "callbacks/Mine/history[3]".
    """
    try:
        return _plain(state, 0)
    except _Refused as refused:
        where = path + "".join(reversed(refused.path))
        raise TypeError(f"{where.strip('/') or 'the state'} {refused}") from None


class _Refused(Exception):
    """Carry a value's path up from where it was found, so that it is only spelled out when it is needed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path: list[str] = []


def _plain(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return _plain_tensor(value)
    if depth >= MAX_DEPTH:
        raise _Refused(f"is nested deeper than {MAX_DEPTH} levels, or holds itself.")
    if kind in (list, tuple, set, frozenset):
        items = []
        for index, item in enumerate(value):
            try:
                items.append(_plain(item, depth + 1))
            except _Refused as refused:
                refused.path.append(f"[{index}]" if kind in (list, tuple) else "{}")
                raise
        return kind(items)
    if kind in (dict, OrderedDict, Counter):
        return _plain_dict(value, depth)
    numpy = sys.modules.get("numpy")  # not imported: nothing can be numpy's
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
        return _plain_numpy(value)
    raise _Refused(_advice(value))


def _plain_numpy(value: Any) -> Any:
    dtype = value.dtype
    if dtype.kind == "U" and not isinstance(value, _numpy().ndarray):
        return str(value)
    if type(value) not in (_numpy().ndarray, dtype.type):
        raise _Refused(_advice(value))
    if dtype.name not in NUMPY_DTYPES:
        raise _Refused(
            f"is a {type(value).__module__}.{type(value).__qualname__} with dtype {dtype}, which a checkpoint does not "
            "hold. Save it as numbers of one of torch's dtypes, or it.tolist()."
        )
    if not dtype.isnative:
        raise _Refused(f"is a numpy array in another byte order, {dtype.str}. Save it.astype({dtype.name!r}).")
    return value


def _numpy() -> Any:
    return sys.modules["numpy"]


def _plain_dict(value: dict[Any, Any], depth: int) -> dict[Any, Any]:
    items = type(value)()
    for key, item in value.items():
        try:
            if isinstance(key, Tensor):
                raise _Refused("is a tensor used as a key; use a number or a string.")
            items[_plain(key, depth + 1)] = _plain(item, depth + 1)
        except _Refused as refused:
            refused.path.append(f"/{key}" if type(key) is str else f"[{key!r}]")
            raise
    metadata = getattr(value, "_metadata", None)  # a module's state_dict keeps its modules' versions there
    if metadata is not None:
        try:
            items._metadata = _plain(metadata, depth + 1)  # type: ignore[attr-defined]
        except _Refused as refused:
            refused.path.append("/_metadata")
            raise
    return items


def _plain_tensor(value: Tensor) -> Tensor:
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise _Refused(
            f"is a tensor of the class {type(value).__module__}.{type(value).__qualname__}, which only its own code "
            "can read; save a plain tensor."
        )
    if value.layout not in LAYOUTS:
        raise _Refused(f"is a tensor with layout {value.layout}, which can't be saved.")
    if value.is_meta:
        raise _Refused("is a tensor on the meta device: it has no values to save. Give the module its weights first.")
    if value.is_quantized:
        raise _Refused("is a quantized tensor. Save its int_repr(), and its scales and zero points, as tensors.")
    if value.is_nested:
        raise _Refused("is a nested tensor. Save its parts: list(it.unbind()).")
    if str(value.dtype).removeprefix("torch.") not in DTYPES:
        raise _Refused(f"is a tensor with dtype {value.dtype}, which torch.load can't read.")
    return value.detach()


def _advice(value: Any) -> str:
    """Say what a value is and what to save in its place."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    instead = "Save the numbers, strings and tensors it consists of."
    if isinstance(value, memoryview):
        instead = "Save bytes(it)."
    elif isinstance(value, os.PathLike):
        instead = "Save str(it)."
    elif isinstance(value, dict):
        instead = "Save dict(it)."
    elif isinstance(value, tuple):
        instead = "Save tuple(it), or its fields in a dict."
    elif isinstance(value, list | str | int | float):
        base = next(base for base in (list, str, int, float) if isinstance(value, base))
        instead = f"Save {base.__name__}(it)."
    elif hasattr(value, "state_dict"):
        instead = "Save its state_dict()."
    elif callable(value):
        instead = "Code can't be saved: save the name or the arguments it is made from."
    article = "an" if name[0] in "aeiou" else "a"
    return f"is {article} {name}; a checkpoint holds tensors and plain values only. {instead}"
