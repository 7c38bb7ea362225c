"""Files that others made: Lightning's checkpoints, and what `torch.save` wrote.

They are pickled, so reading one means torch's unpickler, restricted to tensors and plain values. That happens here and
nowhere else in trainkit, for `trainkit convert` and `trainkit.lightning`, when somebody asks for it by name.
"""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from trainkit.checkpoint import archive, disk
from trainkit.errors import CheckpointError

_CHUNK = 1 << 20
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_ATTRIBUTE_DICTS = (
    "lightning.pytorch.utilities.parsing",
    "lightning.fabric.utilities.data",
    "pytorch_lightning.utilities.parsing",
    "lightning_fabric.utilities.data",
)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether trainkit wrote a file, by its last record; it may be damaged.

    Raises:
        OSError: it can't be read.
    """
    with disk.open_to_read(path) as file:
        return archive.is_ours(file)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what somebody else's checkpoint holds, its tensors on the host; a dict of tensors becomes a state_dict.

    It is read with `torch.load(weights_only=True)`, whatever the environment says, after its checksums were compared.

    Raises:
        CheckpointError: it is an address, not a file; or no such checkpoint, or damaged; or it holds objects. Nothing
            in it has been run.
        OSError: it can't be read.
    """
    name = os.fspath(path)
    if "://" in name:
        raise CheckpointError(f"{name} is not read from the network. Download the file, look at it, and name it here.")
    disk.open_to_read(name).close()  # what is no file is refused
    _check_records(name)
    try:
        with open(name, "rb") as file, harmless_classes():  # an open file: torch reads some names in other ways
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(name)) from error
    except Exception as error:  # torch raises what the damaged bytes happen to lead to: KeyError, EOFError, ...
        raise CheckpointError(f"{name} can't be read: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{name} holds a {type(state).__name__}, not the dict of a checkpoint (state_dict, global_step, ...)."
        )
    only_tensors = state and all(isinstance(value, Tensor) for value in state.values())
    return {"state_dict": state} if only_tensors else state


def made_plain(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return somebody else's checkpoint as trainkit can write it: a Namespace as a dict, a path as a string.

    Which hyperparameters were a Namespace is noted, so that `load_from_checkpoint` makes one of them again.
    """
    plain = {key: _made_plain(value) for key, value in checkpoint.items()}
    hparams = checkpoint.get("hyper_parameters")
    items = hparams.items() if isinstance(hparams, dict) else ()
    namespaces = [name for name, value in items if isinstance(value, Namespace)]
    return {**plain, "hparams_namespaces": namespaces} if namespaces else plain


def _made_plain(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, Namespace):
        return _made_plain(vars(value))
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if kind in (list, tuple, set):
        return kind(map(_made_plain, value))
    if kind in (dict, OrderedDict):
        made = kind((key, _made_plain(item)) for key, item in value.items())
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata  # type: ignore[attr-defined]
        return made
    return value


def harmless_classes() -> AbstractContextManager[None]:
    """Let torch.load build, inside this context, what Lightning's checkpoints may hold beside plain values.

    All of them only hold values: argparse's Namespace, pathlib's paths, timedelta, and Lightning's AttributeDict, in
    whose place a plain dict is built.
    """
    paths = [(Path, f"{module}.{kind}") for module in ("pathlib", "pathlib._local") for kind in _PATHS]
    dicts = [(dict, f"{module}.AttributeDict") for module in _ATTRIBUTE_DICTS]
    return torch.serialization.safe_globals([Namespace, timedelta, *paths, *dicts])


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
