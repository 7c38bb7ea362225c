"""A checkpoint file: written once for two readers, torch.load and trainkit.

torch.load reads its records as those of any file of `torch.save`. trainkit reads trainkit.json, the last record: the
state as typed JSON (typed.py) whose tensors point into the other records, and the SHA-256 of every record. So nothing
is unpickled here, and a byte that is not what was written is noticed. docs/checkpoints.md describes the file.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from trainkit import __version__
from trainkit.checkpoint import archive, table
from trainkit.checkpoint.finite import weights_are_finite as weights_are_finite
from trainkit.checkpoint.pickled import data_pkl
from trainkit.checkpoint.plain import MAX_DEPTH as MAX_DEPTH
from trainkit.checkpoint.plain import check_plain as check_plain
from trainkit.checkpoint.table import Source, Table
from trainkit.checkpoint.table import verify as verify
from trainkit.checkpoint.typed import Decoder, Encoder, Malformed, build
from trainkit.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Head:
    """What a checkpoint says of itself, with its tensors left in the file."""

    state: dict[str, Any]
    """The state, with a `TensorInfo` (dtype, shape, record) in each tensor's place."""
    finite: bool
    """Whether its weights are finite."""
    writer: dict[str, str]
    """The versions of trainkit and torch that wrote it."""


def write(file: archive.Sink, state: Mapping[str, Any]) -> None:
    """Write a state to an open file that stands at its beginning; memory is used for one tensor on a device at a time.

    Raises:
        TypeError: something in the state is neither a tensor nor a plain value; see `check_plain`.
        OSError: the file can't take it.
    """
    plain, encoder = check_plain(state), Encoder()
    theirs, ours = encoder.encode(plain)
    text = table.state_text(ours)
    pickled = data_pkl(theirs, encoder.name_of)
    writer = archive.Writer(file)
    writer.add("data.pkl", pickled)
    writer.add(".format_version", b"1")
    writer.add(".storage_alignment", str(archive.ALIGNMENT).encode())
    writer.add("byteorder", sys.byteorder.encode())
    for storage in encoder.storages:
        host = storage if storage.device.type == "cpu" else storage.cpu()  # type: ignore[no-untyped-call]
        writer.add(encoder.name_of(storage), _bytes_of(host))
    writer.add("version", b"3\n")
    writer.add(".data/serialization_id", _identity(writer.records))
    versions = {"trainkit": __version__, "torch": torch.__version__}
    writer.add(archive.TABLE, table.compose(text, writer.records, weights_are_finite(plain), versions))
    writer.close()


def read(source: Source) -> dict[str, Any]:
    """Return the state a file holds, its tensors on the host; each byte of the file is verified on the way.

    Args:
        source: a path, or an open binary file.

    Raises:
        CheckpointError: the file is not a checkpoint of trainkit, or is not as it was written; the message names the
            record and the tensor.
        OSError: the file can't be read.
    """
    with table.opened(source) as (file, name):
        found = table.read(file)
        storages: dict[str, UntypedStorage] = {}

        def memory(record: archive.Record) -> memoryview | None:
            if not record.name.startswith("data/"):
                return None
            storages[record.name] = UntypedStorage(record.size)  # type: ignore[no-untyped-call]
            return _bytes_of(storages[record.name])

        own = hashlib.sha256(sys.byteorder.encode()).hexdigest()
        if not any(record.name == "byteorder" and record.sha256 == own for record in found.records):
            raise CheckpointError(f"{name} is refused: it is not in the byte order of this machine, {sys.byteorder}.")
        table.check(file, found, memory)
        return _decoded(found, Decoder(lambda info: build(info, storages)), name)


def head(source: Source) -> Head:
    """Return what a file says of itself, without reading its tensors; only trainkit.json is verified.

    Raises:
        CheckpointError: the file is not a checkpoint of trainkit, or its trainkit.json is not as it was written.
        OSError: the file can't be read.
    """
    with table.opened(source) as (file, name):
        found = table.read(file)
        return Head(_decoded(found, Decoder(), name), found.finite, found.writer)


def _decoded(found: Table, decoder: Decoder, name: str) -> dict[str, Any]:
    try:
        state = decoder.decode(found.state)
    except Malformed as error:
        raise CheckpointError(
            f"{name} is refused: its {archive.TABLE} is not what trainkit writes: {error}."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{name} holds a {type(state).__name__}, not the dict of a checkpoint (state_dict, global_step, ...)."
        )
    return state


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host, which must live longer than what is returned."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")


def _bytes_of(storage: UntypedStorage) -> memoryview:
    """Return the memory of a storage on the host, which must live longer than what is returned."""
    if not storage.nbytes():
        return memoryview(b"")
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _identity(records: list[archive.Record]) -> bytes:
    """Return forty digits that torch's own tools tell files apart by."""
    digest = hashlib.sha256("".join(record.sha256 for record in records).encode()).digest()
    return f"{int.from_bytes(digest[:16], 'big'):040d}".encode()
