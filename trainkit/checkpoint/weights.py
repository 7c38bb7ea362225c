"""Weights in a safetensors file, for programs that are not trainkit; and back, restored exactly.

A safetensors file knows neither tied weights nor strides, and not every dtype. What it does not know is written in its
metadata, under "trainkit": other programs see plain, contiguous tensors, each of tied ones once.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.checkpoint import disk
from trainkit.checkpoint.archive import Sink
from trainkit.checkpoint.plain import DTYPES, check_plain
from trainkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

StrPath = str | os.PathLike[str]

MAX_HEADER = 100 << 20
MAX_NAME = 1000
_NAMES = {
    getattr(torch, ours): theirs
    for ours, theirs in (
        *(("bool", "BOOL"), ("uint8", "U8"), ("int8", "I8"), ("int16", "I16"), ("uint16", "U16"), ("int32", "I32")),
        *(("uint32", "U32"), ("int64", "I64"), ("uint64", "U64"), ("float16", "F16"), ("bfloat16", "BF16")),
        *(("float32", "F32"), ("float64", "F64"), ("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2")),
    )
}


def save(path: StrPath, weights: Mapping[str, Any], replace: bool = True) -> None:
    """Write weights to a safetensors file, whole or not at all.

    Args:
        path: the file.
        weights: tensors by name, as `module.state_dict()` has them.
        replace: whether it takes the place of a file of that name.

    Raises:
        CheckpointError: it could not be written; an earlier file of that name is intact.
        TypeError: there is something else than dense tensors among the weights.
    """
    plain = check_plain(weights, "state_dict")
    for name, tensor in plain.items():
        _check_name(name, "the state_dict")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            what = f"a {type(tensor).__name__}" if not isinstance(tensor, Tensor) else f"a tensor of {tensor.layout}"
            raise TypeError(f"{name} is {what}; a safetensors file holds dense tensors only. Leave it out.")
    disk.publish(path, lambda file: _write(file, plain), replace)


def _write(file: Sink, weights: Mapping[str, Tensor]) -> None:
    first: dict[Any, str] = {}
    notes: dict[str, Any] = {"tied": {}, "stride": {}, "raw": {}}
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            notes["tied"][name] = first[place]
            continue
        stored[name] = tensor
        if not tensor.is_contiguous() and _is_dense(tensor):
            notes["stride"][name] = list(tensor.stride())
        if tensor.dtype not in _NAMES:
            notes["raw"][name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if hasattr(weights, "_metadata"):
        notes["versions"] = dict(weights._metadata)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "trainkit": json.dumps(notes)}}
    position = 0
    order = sorted(stored, key=lambda name: -stored[name].dtype.itemsize)  # keeps every tensor aligned
    for name in order:
        tensor = stored[name]
        size = tensor.numel() * tensor.dtype.itemsize
        kind, shape = _NAMES.get(tensor.dtype, "U8"), list(tensor.shape) if tensor.dtype in _NAMES else [size]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write_all(file, len(text).to_bytes(8, "little") + text)
    for name in order:
        plain = stored[name].resolve_conj().resolve_neg().contiguous().cpu()
        size = plain.numel() * plain.dtype.itemsize
        if size:
            _write_all(file, memoryview((ctypes.c_char * size).from_address(plain.data_ptr())).cast("B"))


def _write_all(file: Sink, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        written = file.write(rest)
        rest = rest[len(rest) if written is None else written :]


def load(path: StrPath) -> OrderedDict[str, Tensor]:
    """Return the weights of a safetensors file, its tensors on the host; tied ones share their memory.

    Raises:
        CheckpointError: there is no such file, or it is none, or its header is refused.
    """
    import safetensors

    name = os.fspath(path)
    try:
        header = _header(name)
        with safetensors.safe_open(name, framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in header if key != "__metadata__"}
    except OSError as error:
        raise CheckpointError(f"{name} could not be read: {disk.reason(error, name)}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{name} is damaged: {error}.") from error
    metadata = header.get("__metadata__") or {}
    try:
        return _restored(stored, json.loads(metadata["trainkit"]) if "trainkit" in metadata else {})
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: its metadata does not fit its tensors.") from error


def _restored(stored: dict[str, Tensor], notes: dict[str, Any]) -> OrderedDict[str, Tensor]:
    for name, raw in notes.get("raw", {}).items():
        stored[name] = stored[name].view(DTYPES[raw["dtype"]]).view(raw["shape"])
    for name, stride in notes.get("stride", {}).items():
        plain = stored[name]
        if math.prod(plain.shape) != 1 + sum((n - 1) * step for n, step in zip(plain.shape, stride, strict=True)):
            raise ValueError(stride)
        stored[name] = torch.empty_strided(plain.shape, stride, dtype=plain.dtype).copy_(plain)
    for name, other in notes.get("tied", {}).items():
        stored[name] = stored[other]
    weights = OrderedDict(stored)
    if notes.get("versions"):
        weights._metadata = {str(k): dict(v) for k, v in notes["versions"].items()}  # type: ignore[attr-defined]
    return weights


def load_into(module: nn.Module, path: StrPath, strict: bool) -> None:
    """Load a safetensors file's weights into a module, comparing names, shapes and dtypes before anything is changed.

    Raises:
        CheckpointError: they do not fit; the message names them.
    """
    from trainkit.checkpoint.restore import load_weights

    weights = load(path)
    own = module.state_dict()
    other = [
        f"{name} (module {own[name].dtype}, file {tensor.dtype})"
        for name, tensor in weights.items()
        if isinstance(own.get(name), Tensor) and own[name].dtype != tensor.dtype
    ]
    if strict and other:
        raise CheckpointError(f"{path} does not fit {type(module).__name__}: the dtypes differ: {', '.join(other)}.")
    load_weights(module, {"state_dict": weights}, path, strict)


def _header(name: str) -> dict[str, Any]:
    """Return a file's header after checking that it can be one; nothing else has been read."""
    with disk.open_to_read(name) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise CheckpointError(f"{name} is not a safetensors file, or is cut off.")
        if length > MAX_HEADER:
            raise CheckpointError(f"{name} is refused: its header has {length:,} bytes, more than {MAX_HEADER:,}.")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not a safetensors file: its header can't be read.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{name} is not a safetensors file: its header is a {type(header).__name__}.")
    for key in header:
        _check_name(key, name, reserved=False)
    return header


def _check_name(name: Any, where: str, reserved: bool = True) -> None:
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= MAX_NAME
        or not name.isprintable()
        or ".." in name
        or name.startswith(("/", "\\"))
        or (reserved and name == "__metadata__")
    ):
        raise CheckpointError(f"{where} is refused: {str(name)[:60]!r} can't be the name of a tensor in a file.")


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a stretch of memory, each once, in whatever order."""
    expected = 1
    for step, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if step != expected:
                return False
            expected *= length
    return True
