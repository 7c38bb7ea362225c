"""State as typed JSON, and back: what JSON has stays as it is, everything else is an object with one "$" key.

    (1, nan)                  {"$tuple": [1, {"$float": "7ff8000000000000"}]}
    {1: "a"}                  {"$dict": [[1, "a"]]}
    a tensor                  {"$tensor": {"record": "data/0", "dtype": "float32", "shape": [2, 3], "stride": [3, 1],
                               "offset": 0}}

A tensor is where it lies: tensors that share memory point at the same record. Reading builds values out of a fixed list
of kinds; no string in a file chooses code.
"""

from __future__ import annotations

import base64
import math
import struct
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from trainkit.checkpoint.plain import DTYPES, MAX_DEPTH, NUMPY_DTYPES

_COMPRESSED = {
    "csr": (torch.sparse_csr, "crow_indices", "col_indices"),
    "bsr": (torch.sparse_bsr, "crow_indices", "col_indices"),
    "csc": (torch.sparse_csc, "ccol_indices", "row_indices"),
    "bsc": (torch.sparse_bsc, "ccol_indices", "row_indices"),
}
_LAYOUT_NAMES = {layout: name for name, (layout, _, _) in _COMPRESSED.items()}
_LONGEST_INT = 255 * 8 - 1  # bits that torch.load reads


class Malformed(ValueError):
    """Tell what in a file is not as typed JSON has to be."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, and as what."""

    record: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool = False
    neg: bool = False


# ---------------------------------------------------------------------- writing
class Encoder:
    """Turn a state that `check_plain` let pass into typed JSON, and into what torch.load is to find.

    The two differ where torch's reader knows less: numpy's arrays are tensors there and its scalars numbers, a
    frozenset is a tuple, an integer of more than 2039 bits its hexadecimal text.
    """

    def __init__(self) -> None:
        self.storages: list[UntypedStorage] = []
        self._names: dict[int, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._arrays: dict[int, tuple[Any, Tensor]] = {}

    def name_of(self, storage: UntypedStorage) -> str:
        """Return the record that holds a storage, a new one if it is new."""
        name = self._names.get(storage._cdata)
        if name is None:
            name = self._names[storage._cdata] = f"data/{len(self.storages)}"
            self.storages.append(storage)
        return name

    def encode(self, value: Any) -> tuple[Any, Any]:
        """Return a value as torch.load is to find it, and as JSON."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value, value
        if kind is int:
            return (hex(value) if value.bit_length() > _LONGEST_INT else value), _int(value)
        if kind is float:
            return value, _float(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind is list:
            pairs = [self.encode(item) for item in value]
            return [theirs for theirs, _ in pairs], [ours for _, ours in pairs]
        if kind in (tuple, set, frozenset):
            pairs = [self.encode(item) for item in value]
            made = (set if kind is set else tuple)(theirs for theirs, _ in pairs)
            return made, {f"${kind.__name__}": [ours for _, ours in pairs]}
        if kind in (dict, OrderedDict, Counter):
            return self._dict(value)
        if kind is complex:
            return value, {"$complex": [_float(value.real), _float(value.imag)]}
        if kind is bytes or kind is bytearray:
            theirs = _NoBytes() if value == b"" and kind is bytes else value
            return theirs, {f"${kind.__name__}": base64.b64encode(value).decode()}
        if kind is torch.Size:
            return value, {"$size": list(value)}
        if kind is torch.dtype:
            return value, {"$dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return value, {"$device": str(value)}
        return self._numpy(value)

    def _dict(self, value: dict[Any, Any]) -> tuple[Any, Any]:
        kind = type(value)
        theirs, pairs = kind(), []
        for key, item in value.items():
            their_key, our_key = self.encode(key)
            theirs[their_key], ours = self.encode(item)
            pairs.append([our_key, ours])
        named = all(type(key) is str for key in value)
        if kind is dict and named and not any(key.startswith("$") for key in value):
            return theirs, dict(pairs)
        typed = {_DICTS[kind]: dict(pairs) if named else pairs}
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            theirs._metadata, typed["$metadata"] = self.encode(metadata)  # type: ignore[attr-defined]
        return theirs, typed

    def _tensor(self, tensor: Tensor) -> tuple[Tensor, Any]:
        if tensor.layout == torch.sparse_coo:
            parts = {"indices": tensor._indices(), "values": tensor._values()}
            more = {"layout": "coo", "shape": list(tensor.shape), "coalesced": tensor.is_coalesced()}
        elif tensor.layout != torch.strided:
            name = _LAYOUT_NAMES[tensor.layout]
            _, compressed, plain = _COMPRESSED[name]
            parts = {part: getattr(tensor, part)() for part in (compressed, plain, "values")}
            more = {"layout": name, "shape": list(tensor.shape)}
        else:
            return self._strided(tensor)
        return tensor, {"$sparse": {**more, **{part: self._strided(inner)[1] for part, inner in parts.items()}}}

    def _strided(self, tensor: Tensor) -> tuple[Tensor, Any]:
        if tensor._is_zerotensor():  # has no memory yet
            tensor = tensor.clone()
        theirs, record = tensor, self.name_of(tensor.untyped_storage())
        if self._dtypes.setdefault(record, tensor.dtype) != tensor.dtype:
            theirs = tensor.clone()  # torch.load reads all tensors of one storage as one dtype
        typed = {
            "record": record,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
        }
        flags = {name: True for name in ("conj", "neg") if getattr(tensor, f"is_{name}")()}
        return theirs, {"$tensor": {**typed, **flags}}

    def _numpy(self, value: Any) -> tuple[Any, Any]:
        numpy = sys.modules["numpy"]
        if not isinstance(value, numpy.ndarray):
            return value.item(), {"$scalar": [value.dtype.name, _little(value.tobytes(), value.dtype).hex()]}
        if id(value) not in self._arrays:
            try:
                tensor = torch.from_numpy(value if value.flags.writeable else value.copy(order="K"))
            except ValueError:  # strides that torch has not
                tensor = torch.from_numpy(value.copy())
            self._arrays[id(value)] = value, tensor  # the same array again is the same memory again
        tensor, typed = self._strided(self._arrays[id(value)][1])
        return tensor, {"$array": typed["$tensor"]}


class _NoBytes:
    """Stand for b"", which torch.load reads in this form only."""

    def __reduce__(self) -> Any:
        import _codecs

        return _codecs.encode, ("", "latin1")


_DICTS = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}


def _int(value: int) -> Any:
    return value if -(1 << 63) <= value < 1 << 63 else {"$int": hex(value)}


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    return {"$float": struct.pack(">d", value).hex() if math.isnan(value) else "inf" if value > 0 else "-inf"}


def _little(data: bytes, dtype: Any) -> bytes:
    return data if sys.byteorder == "little" else bytes(memoryview(data)[::-1])


# ---------------------------------------------------------------------- reading
class Decoder:
    """Turn typed JSON into a state.

    Args:
        tensor: makes a tensor of where it lies; None leaves `TensorInfo`s in the tensors' places.
    """

    def __init__(self, tensor: Callable[[TensorInfo], Tensor] | None = None) -> None:
        self.tensor = tensor
        self._arrays: dict[TensorInfo, Any] = {}

    def decode(self, value: Any, depth: int = 0) -> Any:
        """Return a value.

        Raises:
            Malformed: it is not typed JSON.
        """
        kind = type(value)
        if kind is list:
            return self._items(value, depth)
        if kind is not dict:
            return value
        if depth > MAX_DEPTH:
            raise Malformed(f"it is nested deeper than {MAX_DEPTH} levels")
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {key: self.decode(item, depth + 1) for key, item in value.items()}
        body = value[tag]
        if set(value) - {tag} - ({"$metadata"} if tag == "$ordered" else set()):
            raise Malformed(f"{tag} has keys beside it")
        try:
            return self._tagged(tag, body, value, depth)
        except Malformed:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, struct.error, RuntimeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Malformed(f"a {tag} can't be read: {first}") from error

    def _items(self, items: Any, depth: int) -> list[Any]:
        if type(items) is not list or depth > MAX_DEPTH:
            raise Malformed(f"a list is nested deeper than {MAX_DEPTH} levels, or is none")
        return [self.decode(item, depth + 1) for item in items]

    def _tagged(self, tag: str, body: Any, value: dict[str, Any], depth: int) -> Any:
        match tag:
            case "$tensor":
                info = _info(body)
                return info if self.tensor is None else self.tensor(info)
            case "$tuple":
                return tuple(self._items(body, depth))
            case "$float":
                return {"inf": math.inf, "-inf": -math.inf}.get(body) or struct.unpack(">d", bytes.fromhex(body))[0]
            case "$int":
                return int(body, 16)
            case "$complex":
                real, imaginary = self._items(body, depth)
                return complex(*_checked((real, imaginary), float))
            case "$dict":
                return self._dict({}, body, depth)
            case "$ordered":
                ordered = self._dict(OrderedDict(), body, depth)
                if "$metadata" in value:
                    ordered._metadata = self.decode(value["$metadata"], depth + 1)
                return ordered
            case "$counter":
                return self._dict(Counter(), body, depth)
            case "$set":
                return set(self._items(body, depth))
            case "$frozenset":
                return frozenset(self._items(body, depth))
            case "$bytes":
                return base64.b64decode(body, validate=True)
            case "$bytearray":
                return bytearray(base64.b64decode(body, validate=True))
            case "$size":
                return torch.Size(_checked(body, int))
            case "$dtype":
                return _ALL_DTYPES[body]
            case "$device":
                return torch.device(*_checked([body], str))
            case "$array":
                return self._array(_info(body))
            case "$scalar":
                return self._scalar(*body)
            case "$sparse":
                return self._sparse(body)
        raise Malformed(f"it has a kind of value that this version does not know, {tag[:40]!r}")

    def _dict(self, made: Any, body: Any, depth: int) -> Any:
        if type(body) is dict:
            for key, item in body.items():
                made[key] = self.decode(item, depth + 1)
        else:
            for key, item in body:
                made[self.decode(key, depth + 1)] = self.decode(item, depth + 1)
        if len(made) != len(body):
            raise Malformed("a key is there twice")
        return made

    def _array(self, info: TensorInfo) -> Any:
        if str(info.dtype).removeprefix("torch.") not in NUMPY_DTYPES or info.conj or info.neg:
            raise Malformed(f"numpy has no {info.dtype}")
        if self.tensor is None:
            return info
        if info not in self._arrays:
            self._arrays[info] = self.tensor(info).numpy()
        return self._arrays[info]

    def _scalar(self, name: Any, digits: Any) -> Any:
        import numpy

        if name not in NUMPY_DTYPES:
            raise Malformed(f"numpy has no numbers of the kind {name!r}")
        dtype = numpy.dtype(name)
        data = bytes.fromhex(digits)
        if len(data) != dtype.itemsize:
            raise Malformed(f"a number of the kind {name} has {dtype.itemsize} bytes")
        return numpy.frombuffer(_little(data, dtype), dtype)[0]

    def _sparse(self, body: dict[str, Any]) -> Any:
        layout, shape = body["layout"], torch.Size(_checked(body["shape"], int))
        known, first, second = _COMPRESSED.get(layout, (torch.sparse_coo, "indices", "indices"))
        if layout != "coo" and layout not in _COMPRESSED:
            raise Malformed(f"it has a tensor with a layout that there is not, {str(layout)[:40]!r}")
        infos = {part: _info(body[part]["$tensor"]) for part in (first, second, "values")}
        if self.tensor is None:
            values = infos["values"]
            return TensorInfo(values.record, values.dtype, tuple(shape), (), 0)
        parts = {part: self.tensor(info) for part, info in infos.items()}
        # indices that point outside would read or write memory that is not the tensor's
        if layout == "coo":
            made = torch.sparse_coo_tensor(parts[first], parts["values"], shape, check_invariants=True)
            return made._coalesced_(_is_sorted(parts[first], shape)) if body["coalesced"] is True else made
        return torch.sparse_compressed_tensor(
            parts[first], parts[second], parts["values"], shape, layout=known, check_invariants=True
        )


_ALL_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)
}
"""Those that a state may name; a tensor has one of `DTYPES`."""


def _is_sorted(indices: Tensor, shape: torch.Size) -> bool:
    """Whether the indices of a sparse tensor ascend, each there once: what "coalesced" promises."""
    if indices.shape[1] < 2:
        return True
    flat = torch.zeros(indices.shape[1], dtype=torch.int64)
    for row, length in zip(indices, shape, strict=False):
        flat = flat * length + row
    return bool((flat[1:] > flat[:-1]).all())


def _info(body: dict[str, Any]) -> TensorInfo:
    shape, stride = tuple(_checked(body["shape"], int)), tuple(_checked(body["stride"], int))
    (offset,), (record,) = _checked([body["offset"]], int), _checked([body["record"]], str)
    dtype = DTYPES.get(body["dtype"])
    if dtype is None:
        raise Malformed(f"it has a tensor with a dtype that is not known here, {str(body['dtype'])[:40]!r}")
    if len(shape) != len(stride) or min((*shape, *stride, offset)) < 0:
        raise Malformed("it has a tensor whose shape, stride and offset can't be")
    return TensorInfo(record, dtype, shape, stride, offset, body.get("conj") is True, body.get("neg") is True)


def _checked(items: Any, kind: type) -> Any:
    if type(items) not in (list, tuple) or any(type(item) is not kind for item in items):
        raise Malformed(f"it has something in the place of {kind.__name__} values")
    return items


def build(info: TensorInfo, storages: Mapping[str, UntypedStorage]) -> Tensor:
    """Return a tensor that lies in its storage, after checking that it lies inside.

    Raises:
        Malformed: it does not, or there is no such record.
    """
    storage = storages.get(info.record)
    if storage is None:
        raise Malformed(f"it has a tensor in the record {info.record[:40]!r}, which it does not have")
    numel = math.prod(info.shape)
    furthest = info.offset + sum((n - 1) * step for n, step in zip(info.shape, info.stride, strict=True))
    end = (furthest + 1 if numel else 0) * info.dtype.itemsize
    if end > storage.nbytes() or max(numel, furthest, info.offset) >= 1 << 62:
        raise Malformed(f"it has a tensor that reaches beyond its record {info.record}")
    tensor = torch.empty(0, dtype=info.dtype).set_(storage, info.offset, info.shape, info.stride)
    if info.neg:
        tensor = torch._neg_view(tensor)
    return tensor.conj() if info.conj else tensor
