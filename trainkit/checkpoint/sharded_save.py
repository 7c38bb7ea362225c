"""Several processes write one checkpoint: a directory, whole under its name or not there.

torch.distributed.checkpoint plans who writes which piece of a spread tensor, each once. The bytes, their digests and
the trainkit.json (manifest.py) are written here: torch keeps its own metadata as a pickle, and nothing is unpickled in
a checkpoint of trainkit.

    take_apart    in the training thread: text of what is not a tensor, the tensors, what this process has of each
    write         all processes: plan, a hidden directory made by rank 0, a file each, trainkit.json, the name
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from trainkit import __version__
from trainkit.checkpoint import archive, disk, manifest, table
from trainkit.checkpoint.format import check_plain, memory_of
from trainkit.checkpoint.layout import is_spread
from trainkit.checkpoint.manifest import SPREAD, Piece, Spread
from trainkit.checkpoint.typed import Encoder
from trainkit.errors import CheckpointError, CheckpointExistsError


# ---------------------------------------------------------------------- a state, taken apart
@dataclass
class Parts:
    """What one process has of a state."""

    text: str
    """The state as typed JSON, of rank 0."""
    plain: dict[str, Tensor]
    """The bytes of tensors that all processes have, by record, of rank 0."""
    spread: dict[str, Any]
    """The DTensors, by record."""
    local: dict[str, Tensor]
    """What this process has of each of them; a copy of it, when it is written in the background."""


def take_apart(state: Mapping[str, Any], writes_plain: bool) -> Parts:
    """Return a state in the parts that processes write.

    Args:
        state: tensors and plain values, DTensors among them.
        writes_plain: whether this is the process that writes what all of them have.

    Raises:
        TypeError: the state holds something that is neither a tensor nor a plain value.
    """
    spread: dict[str, Any] = {}
    encoder = _Encoder()
    stands_in = _replaced(state, spread, encoder, "")
    local = {record: tensor.detach().to_local() for record, tensor in spread.items()}
    if not writes_plain:
        return Parts("", {}, spread, local)
    _, typed = encoder.encode(check_plain(stands_in))
    plain = {encoder.name_of(storage): _as_bytes(storage) for storage in encoder.storages}
    return Parts(table.state_text(typed), plain, spread, local)


class _Encoder(Encoder):
    """Write down a spread tensor by its record: in its place is one that says its shape and has no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int, str] = {}
        self.stand_ins: list[Tensor] = []
        self.memory: dict[tuple[Any, ...], Tensor] = {}  # what stands in for it; tied weights are written once

    def stand_in(self, tensor: Any, record: str) -> Tensor:
        made = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        self.stand_ins.append(made)  # lives as long as its number has a meaning
        self.records[made.untyped_storage()._cdata] = record
        self.memory[_memory(tensor)] = made
        return made

    def _strided(self, tensor: Tensor) -> tuple[Tensor, Any]:
        record = self.records.get(tensor.untyped_storage()._cdata)
        if record is None:
            return super()._strided(tensor)
        stride = [math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.ndim)]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return tensor, {
            "$tensor": {"record": record, "dtype": dtype, "shape": list(tensor.shape), "stride": stride, "offset": 0}
        }


def _replaced(value: Any, spread: dict[str, Any], encoder: _Encoder, path: str) -> Any:
    if is_spread(value):
        if (tied := encoder.memory.get(_memory(value))) is not None:
            return tied
        record = path = SPREAD + path
        while record in spread:  # two keys that are written alike, as 1 and "1"
            record = f"{path}#{len(spread)}"
        spread[record] = value
        return encoder.stand_in(value, record)
    if isinstance(value, dict):
        made = type(value)()
        for key, item in value.items():
            made[key] = _replaced(item, spread, encoder, f"{path}/{key}".strip("/"))
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata  # type: ignore[attr-defined]
        return made
    if type(value) in (list, tuple):
        return type(value)(
            _replaced(item, spread, encoder, f"{path}/{index}".strip("/")) for index, item in enumerate(value)
        )
    return value


def _memory(tensor: Any) -> tuple[Any, ...]:
    """Return what two spread tensors have in common if they are one: where this process's part of them lies."""
    local = tensor.detach().to_local()
    return local.untyped_storage()._cdata, local.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _as_bytes(storage: UntypedStorage) -> Tensor:
    made = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return made.set_(storage, 0, (storage.nbytes(),), (1,))


# ---------------------------------------------------------------------- writing
def write(path: str, parts: Parts, finite: bool, group: Any, replace: bool = True) -> None:
    """Write a checkpoint; all processes of a group call it, each with its parts.

    Args:
        path: its name.
        parts: what this process has.
        finite: whether the weights are.
        group: a group whose messages go over the host.
        replace: whether it takes the place of what has that name.

    Raises:
        CheckpointExistsError: there is one of that name, and it is not to be replaced; on all processes.
        CheckpointError: one of the processes could not write; on all of them, with its rank and the reason. What was
            there before is intact, and nothing half-written is left.
    """
    writer = _Writer(path, dist.get_rank(group), parts, finite, replace)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(parts.spread, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as failed:
        raise _told(path, failed) from None
    finally:
        writer.tidy()


def _told(path: str, failed: CheckpointException) -> Exception:
    """Return the error that all processes raise for what happened on some."""
    for rank, (error, _) in sorted(failed.failures.items()):
        if isinstance(error, CheckpointExistsError):
            return CheckpointExistsError(str(error))
        if isinstance(error, CheckpointError):
            return CheckpointError(f"{error} (rank {rank})")
        if isinstance(error, OSError):
            return CheckpointError(f"{disk.not_written(path, error)} (rank {rank})")
        kind = TypeError if isinstance(error, TypeError) else RuntimeError
        return kind(f"{path} was not written: {type(error).__name__}: {error} (rank {rank})")
    return RuntimeError(f"{path} was not written: {failed}")


class _Writer(StorageWriter):
    """Write what the plan says into a hidden directory; rank 0 makes it, and gives it its name at the end."""

    def __init__(self, target: str, rank: int, parts: Parts, finite: bool, replace: bool) -> None:
        self.target, self.rank, self.parts, self.finite, self.replace = target, rank, parts, finite, replace
        self.hidden = ""  # on rank 0
        self.plain: dict[str, Spread] = {}

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        directory = os.path.dirname(self.target) or "."
        disk.make_directory(directory)
        if not self.replace and os.path.lexists(self.target):  # told before anything is written
            raise disk.not_written(self.target, FileExistsError())
        self.hidden = disk.temporary_in(directory)
        disk.writing.add(os.path.basename(self.hidden))
        with _explained(self.target):
            os.mkdir(self.hidden, 0o700)
        return [dataclasses.replace(plan, storage_data=self.hidden) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        hidden, results = plan.storage_data, []
        if not os.path.isdir(hidden):
            raise CheckpointError(
                f"{self.target} was not written: rank {self.rank} does not see the directory that rank 0 has made. "
                "All processes write to one file system: choose a directory that all nodes share."
            )
        with _explained(self.target):
            if self.rank == 0:
                self._write_plain(os.path.join(hidden, manifest.PLAIN))
            if plan.items:
                name = manifest.file_of(self.rank)
                with disk.created(os.path.join(hidden, name)) as file:
                    position = 0
                    for item in plan.items:
                        size, digest = _put(file, self.parts.local[item.index.fqn])
                        results.append(WriteResult(item.index, size, (name, position, digest)))
                        position += size
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_plain(self, path: str) -> None:
        with disk.created(path) as file:
            position = 0
            for record, tensor in self.parts.plain.items():
                size, digest = _put(file, tensor)
                piece = Piece(manifest.PLAIN, position, size, digest, (0,), (size,))
                self.plain[record] = Spread("uint8", (size,), (piece,))
                position += size

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the trainkit.json and give the directory its name; on rank 0, when all have written."""
        records, files = self._records(metadata, results)
        versions = {"trainkit": __version__, "torch": torch.__version__}
        contents = manifest.compose(self.parts.text, records, files, self.finite, versions)
        with _explained(self.target):
            for name, size in files.items():
                if os.stat(os.path.join(self.hidden, name)).st_size != size:
                    raise CheckpointError(f"{self.target} was not written: {name} is not as another process wrote it.")
            with disk.created(os.path.join(self.hidden, disk.MANIFEST)) as file:
                file.write(contents)
            disk.sync(self.hidden)
            disk.rename(self.hidden, self.target, self.replace)
        disk.sync_name(self.target, self.replace)

    def _records(
        self, metadata: Metadata, results: list[list[WriteResult]]
    ) -> tuple[dict[str, Spread], dict[str, int]]:
        written = {result.index: result for each in results for result in each}
        records, files = dict(self.plain), {manifest.PLAIN: sum(spread.shape[0] for spread in self.plain.values())}
        for record, tensor in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(tensor, TensorStorageMetadata)
            pieces = []
            for chunk in tensor.chunks:
                result = written[MetadataIndex(record, chunk.offsets)]
                name, start, digest = result.storage_data
                where, shape = tuple(chunk.offsets), tuple(chunk.sizes)
                pieces.append(Piece(name, start, result.size_in_bytes, digest, where, shape))
                files[name] = files.get(name, 0) + result.size_in_bytes
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            records[record] = Spread(dtype, tuple(tensor.size), tuple(pieces))
        return records, files

    def tidy(self) -> None:
        """Remove what is left under the hidden name: a save that failed, or what was replaced."""
        if self.hidden:
            disk.discard(self.hidden)
            disk.writing.discard(os.path.basename(self.hidden))


@contextmanager
def _explained(target: str) -> Iterator[None]:
    """Say what an error of the system means for a checkpoint, in the process where it happened."""
    try:
        yield
    except OSError as error:
        raise disk.not_written(target, error) from error


def _put(file: archive.Sink, tensor: Tensor) -> tuple[int, str]:
    """Write a tensor's elements; return how many bytes these are, and their SHA-256."""
    host = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    view, digest = memory_of(host), hashlib.sha256()
    for start in range(0, len(view), archive.CHUNK):
        chunk = view[start : start + archive.CHUNK]
        digest.update(chunk)
        file.write(chunk)
    return len(view), digest.hexdigest()
