"""The bytes of a checkpoint: a dict of tensors and plain values in the zip file that `torch.save` writes.

Nothing else goes in, so that `torch.load(path, weights_only=True)` reads a checkpoint anywhere and reading one never
runs code from it. What can't be kept is refused when it is saved, by its path in the state: months later, when somebody
needs the file, would be too late.
"""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
import zlib
from argparse import Namespace
from collections import Counter, OrderedDict
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainkit.checkpoint.finite import weights_are_finite as weights_are_finite
from trainkit.errors import CheckpointError

MAX_DEPTH = 100
"""Deeper nesting is refused: nobody needs it, and a list that holds itself has no end."""

_PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)
_LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_CHUNK = 1 << 20
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_ATTRIBUTE_DICTS = (
    "lightning.pytorch.utilities.parsing",
    "lightning.fabric.utilities.data",
    "pytorch_lightning.utilities.parsing",
    "lightning_fabric.utilities.data",
)


def write(file: BinaryIO, state: dict[str, Any]) -> None:
    """Write a state to an open file, from where the file stands.

    Raises:
        TypeError: something in the state is neither a tensor nor a plain value; see `check_plain`.
        OSError: the file can't take it.
    """
    plain = check_plain(state)
    try:
        torch.save(plain, file)
    except RuntimeError as error:
        # torch reports that its writer was interrupted, and keeps by whom
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
        raise


def read(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """Return the state a file holds, its tensors on the host, after checking every record's checksum.

    Args:
        path: an existing file.
        mmap: leave the tensors in the file until they are used. For a quick look only: they follow the file when
            somebody overwrites it in place.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged, or holds objects; nothing in it has been run.
        OSError: the file can't be read.
    """
    name = os.fspath(path)
    with open(name, "rb"):  # what torch calls an OSError can be a damaged file; this can't
        pass
    if not mmap:
        _check_records(name)
    try:
        with harmless_classes():
            state = torch.load(name, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(name)) from error
    except Exception as error:  # torch raises what the damaged bytes happen to lead to: KeyError, EOFError, ...
        _check_records(name)  # says it better where it can
        raise CheckpointError(f"{name} can't be read: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{name} holds a {type(state).__name__}, not the dict of a checkpoint (state_dict, global_step, ...)."
        )
    return state


def harmless_classes() -> AbstractContextManager[None]:
    """Let torch.load build, inside this context, what Lightning's checkpoints may hold beside plain values.

    All of them only hold values: argparse's Namespace, pathlib's paths, timedelta, and Lightning's AttributeDict, in
    whose place a plain dict is built.
    """
    paths = [(Path, f"{module}.{kind}") for module in ("pathlib", "pathlib._local") for kind in _PATHS]
    dicts = [(dict, f"{module}.AttributeDict") for module in _ATTRIBUTE_DICTS]
    return torch.serialization.safe_globals([Namespace, timedelta, *paths, *dicts])


def check_plain(state: Any, path: str = "") -> Any:
    """Return a state as it can be written: tensors detached, numpy's scalars as Python's numbers.

    Allowed are tensors, None, bool, int, float, complex, str, torch.Size, torch.dtype, torch.device, and lists,
    tuples, dicts, OrderedDicts and Counters of them.

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
    if kind is list or kind is tuple:
        items = []
        for index, item in enumerate(value):
            try:
                items.append(_plain(item, depth + 1))
            except _Refused as refused:
                refused.path.append(f"[{index}]")
                raise
        return kind(items)
    if kind in (dict, OrderedDict, Counter):
        return _plain_dict(value, depth)
    numpy = sys.modules.get("numpy")  # not imported: nothing can be numpy's
    if numpy is not None and isinstance(value, numpy.generic):
        number = value.item()
        if type(number) in _PLAIN:
            return number
    raise _Refused(_advice(value))


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
    if value.layout not in _LAYOUTS:
        raise _Refused(f"is a tensor with layout {value.layout}, which can't be saved.")
    if value.is_meta:
        raise _Refused("is a tensor on the meta device: it has no values to save. Give the module its weights first.")
    return value.detach()


def _advice(value: Any) -> str:
    """Say what a value is and what to save in its place."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    instead = "Save the numbers, strings and tensors it consists of."
    if name == "numpy.ndarray":
        instead = "Save torch.from_numpy(it), or it.tolist()."
    elif kind in (bytes, bytearray):
        instead = "Save list(it), or it.decode() if it is text."  # torch.load refuses b""
    elif kind in (set, frozenset):
        instead = "Save sorted(it), a list."
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


def _check_records(path: str) -> None:
    """Compare every record with its checksum; torch never does."""
    size = os.path.getsize(path)
    if size == 0:
        raise CheckpointError(f"{path} is empty.")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            for record in records:
                with archive.open(record) as file:
                    if not record.CRC:  # torch.serialization.set_crc32_options(False) leaves the checksums out
                        continue
                    while file.read(_CHUNK):  # raises at the record's end when the checksum differs
                        pass
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(_damage(path, size, error)) from error
    if not any(record.filename.endswith("/data.pkl") for record in records):
        raise CheckpointError(f"{path} is a zip file, but not a checkpoint: torch.save did not write it.")


def _damage(path: str, size: int, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        return (
            f"{path} is not a checkpoint: it is not a zip file as torch.save writes it. One in torch's format from "
            "before 1.6 has to be loaded with torch.load(path, weights_only=True) and saved again."
        )
    if "not a zip file" in str(error):
        return f"{path} is cut off: its end is missing after {size:,} bytes, as after a full disk or a broken copy."
    return f"{path} is damaged: {_first_line(error)}"


def _refusal(path: str) -> str:
    """Say which objects a file would have built."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged or foreign file; the reason is in the error this message goes with
        names = []
    what = f"objects ({', '.join(sorted(map(str, names)))})" if names else "more than tensors and plain values"
    return (
        f"{path} was refused: it holds {what}, and building objects can run any code. Only if you trust who made it: "
        "load it yourself with torch.load(path, weights_only=False), keep the tensors and numbers, and save those "
        "with torch.save."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
