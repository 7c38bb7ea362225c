"""A checkpoint that several processes write together: a directory, whole under its name or not there.

torch.distributed.checkpoint plans who writes which piece of a spread tensor, each once, and who reads which when it is
loaded by another number of processes. The bytes, their digests and the trainkit.json (manifest.py) are written here:
torch keeps its own metadata as a pickle, and nothing is unpickled in a checkpoint of trainkit.

    take_apart      in the training thread: text of what is not a tensor, the tensors, what this process has of each
    write           all processes: plan, a hidden directory made by rank 0, a file each, trainkit.json, the name
    load            all of it in one process, spread or not when it was written
    load_lazily     the same with spread tensors left in their files, until it is known how they are to be spread
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, UntypedStorage
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trainkit import __version__
from trainkit.checkpoint import archive, disk, manifest, table
from trainkit.checkpoint.format import Head, check_plain
from trainkit.checkpoint.layout import is_spread
from trainkit.checkpoint.manifest import Manifest, Piece, Spread
from trainkit.checkpoint.plain import DTYPES
from trainkit.checkpoint.typed import Decoder, Encoder, Malformed, TensorInfo, build
from trainkit.errors import CheckpointError, CheckpointExistsError

SPREAD = "spread/"
"""How the record of a spread tensor begins; where it is in the state follows."""


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

    def stand_in(self, tensor: Any, record: str) -> Tensor:
        made = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        self.stand_ins.append(made)  # lives as long as its number has a meaning
        self.records[made.untyped_storage()._cdata] = record
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
        record = path = SPREAD + path
        while record in spread:  # two keys that are written alike, as 1 and "1"
            record = f"{path}#{len(spread)}"
        spread[record] = value
        return encoder.stand_in(value, record)
    if isinstance(value, dict):
        made = type(value)() if type(value) is not defaultdict else {}
        for key, item in value.items():
            made[key] = _replaced(item, spread, encoder, f"{path}/{key}".strip("/"))
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata
        return made
    if type(value) in (list, tuple):
        return type(value)(
            _replaced(item, spread, encoder, f"{path}/{index}".strip("/")) for index, item in enumerate(value)
        )
    return value


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
        group: a group whose messages go over the host; None for one process without any.
        replace: whether it takes the place of what has that name.

    Raises:
        CheckpointExistsError: there is one of that name, and it is not to be replaced; on all processes.
        CheckpointError: one of the processes could not write; on all of them, with its rank and the reason. What was
            there before is intact, and nothing half-written is left.
    """
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    writer = _Writer(path, rank, parts, finite, replace)
    planner = _SavePlanner(parts.local)
    try:
        with warnings.catch_warnings() if group is None else _nothing():
            if group is None:
                warnings.simplefilter("ignore")  # of torch, that there is one process
            dcp.save(
                parts.spread,
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
    except dcp.CheckpointException as failed:
        raise _told(path, failed) from None
    finally:
        writer.tidy()


def _told(path: str, failed: dcp.CheckpointException) -> Exception:
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


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class _SavePlanner(DefaultSavePlanner):
    """torch's plan of who writes what, for values that may have been copied since."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.local = local

    def resolve_data(self, write_item: Any) -> Tensor:
        return self.local[write_item.index.fqn]


class _Writer(dcp.StorageWriter):
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

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        directory = os.path.dirname(self.target) or "."
        disk.make_directory(directory)
        if not self.replace and os.path.lexists(self.target):  # told before anything is written
            raise disk.not_written(self.target, FileExistsError())
        self.hidden = disk.temporary_in(directory)
        disk.writing.add(os.path.basename(self.hidden))
        with self._explained():
            os.mkdir(self.hidden, 0o700)
        return [dataclasses.replace(plan, storage_data=self.hidden) for plan in plans]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        hidden, results = plan.storage_data, []
        if not os.path.isdir(hidden):
            raise CheckpointError(
                f"{self.target} was not written: rank {self.rank} does not see the directory that rank 0 has made. "
                "All processes write to one file system: choose a directory that all nodes share."
            )
        with self._explained():
            if self.rank == 0:
                self._write_plain(os.path.join(hidden, manifest.PLAIN))
            if plan.items:
                name = manifest.file_of(self.rank)
                with disk.created(os.path.join(hidden, name)) as file:
                    position = 0
                    for item in plan.items:
                        size, digest = _put(file, planner.resolve_data(item))
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
        with self._explained():
            for name, size in files.items():
                if os.stat(os.path.join(self.hidden, name)).st_size != size:
                    raise CheckpointError(f"{self.target} was not written: {name} is not as another process wrote it.")
            with disk.created(os.path.join(self.hidden, manifest.MANIFEST)) as file:
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
                pieces.append(
                    Piece(name, start, result.size_in_bytes, digest, tuple(chunk.offsets), tuple(chunk.sizes))
                )
                files[name] = files.get(name, 0) + result.size_in_bytes
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            records[record] = Spread(dtype, tuple(tensor.size), tuple(pieces))
        return records, files

    def _explained(self) -> _Explained:
        return _Explained(self.target)

    def tidy(self) -> None:
        """Remove what is left under the hidden name: a save that failed, or what was replaced."""
        if self.hidden:
            disk.discard(self.hidden)
            disk.writing.discard(os.path.basename(self.hidden))


class _Explained:
    """Say what an error of the system means for a checkpoint, in the process where it happened."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            raise disk.not_written(self.target, error) from error


def _put(file: archive.Sink, tensor: Tensor) -> tuple[int, str]:
    """Write a tensor's elements; return how many bytes these are, and their SHA-256."""
    host = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    view, digest = _memory(host), hashlib.sha256()
    for start in range(0, len(view), archive.CHUNK):
        chunk = view[start : start + archive.CHUNK]
        digest.update(chunk)
        file.write(chunk)
    return len(view), digest.hexdigest()


def _memory(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host, which must live longer than what is returned."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


# ---------------------------------------------------------------------- reading
Allocate = Callable[[int], UntypedStorage]


def load(path: disk.StrPath, allocate: Allocate | None = None) -> dict[str, Any]:
    """Return the state of a directory, all of it in this process, its tensors on the host; every byte is verified.

    Args:
        path: the directory.
        allocate: makes the memory of a tensor, of so many bytes.

    Raises:
        CheckpointError: it is damaged; the message names the file and the tensor.
        OSError: it can't be read.
    """
    found = manifest.read(path)
    tensors = {record: _empty(spread, allocate) for record, spread in found.records.items()}
    read_into(found, tensors)
    storages = {record: tensor.untyped_storage() for record, tensor in tensors.items()}
    return _decoded(found, Decoder(lambda info: build(info, storages)))


def load_lazily(path: disk.StrPath) -> dict[str, Any]:
    """Return the state of a directory with a `Stored` in the place of each spread tensor.

    Raises:
        CheckpointError: it is damaged; what is in the spread tensors has not been looked at.
        OSError: it can't be read.
    """
    found = manifest.read(path)
    plain = {record: _empty(spread) for record, spread in found.records.items() if not record.startswith(SPREAD)}
    read_into(found, plain)
    storages = {record: tensor.untyped_storage() for record, tensor in plain.items()}
    stored: dict[str, Any] = {}

    def tensor(info: TensorInfo) -> Any:
        if not info.record.startswith(SPREAD):
            return build(info, storages)
        spread = found.records.get(info.record)
        if spread is None or (DTYPES[spread.dtype], spread.shape) != (info.dtype, info.shape) or info.offset:
            raise Malformed(f"it has a tensor in the record {info.record[:60]!r}, which is another one")
        return stored.setdefault(info.record, Stored(found, info.record))

    return _decoded(found, Decoder(tensor))


def head(path: disk.StrPath) -> Head:
    """Return what a directory says of itself, without reading its tensors."""
    found = manifest.read(path)
    return Head(_decoded(found, Decoder()), found.finite, found.writer)


class Stored:
    """A spread tensor that was left in its files, to be read when it is known which part of it is needed."""

    def __init__(self, found: Manifest, record: str) -> None:
        self.found, self.record = found, record
        spread = found.records[record]
        self.shape, self.dtype = torch.Size(spread.shape), DTYPES[spread.dtype]

    def __repr__(self) -> str:
        return f"Stored({self.record.removeprefix(SPREAD)}, {self.dtype}, {tuple(self.shape)})"

    def read(self) -> Tensor:
        """Return all of it, on the host."""
        tensor = _empty(self.found.records[self.record])
        read_into(self.found, {self.record: tensor})
        return tensor

    def read_like(self, like: Tensor) -> Tensor:
        """Return it as another tensor is spread: this process reads what it has of it."""
        if not is_spread(like):
            return self.read()
        made = torch.empty_like(like.detach(), dtype=self.dtype)
        read_into(self.found, {self.record: made})
        return made


def read_into(found: Manifest, tensors: dict[str, Any]) -> None:
    """Fill tensors, or what this process has of DTensors, from the files of a directory.

    Raises:
        CheckpointError: what is read was changed since it was written.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that no other process is asked
            dcp.load(dict(tensors), storage_reader=_Reader(found), planner=planner, no_dist=True)
    except dcp.CheckpointException as failed:
        for error, _ in failed.failures.values():
            raise error from None
        raise CheckpointError(f"{found.directory} could not be read: {failed}") from None


class _Reader(dcp.StorageReader):
    """Read the pieces that a plan needs, each once and whole, so that its digest can be compared."""

    def __init__(self, found: Manifest) -> None:
        self.found = found

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, pieces = {}, {}
        for record, spread in self.found.records.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.shape)) for p in spread.pieces]
            properties = TensorProperties(dtype=DTYPES[spread.dtype])
            tensors[record] = TensorStorageMetadata(properties, torch.Size(spread.shape), chunks)
            pieces.update({MetadataIndex(record, p.offsets): p for p in spread.pieces})
        return Metadata(tensors, storage_data=pieces)  # type: ignore[arg-type]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.pieces = metadata.storage_data

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        wanted = defaultdict(list)
        for item in plan.items:
            wanted[item.storage_index].append(item)
        for index, items in wanted.items():
            piece = self.pieces[index]
            targets = [(item, planner.resolve_tensor(item).detach()) for item in items]
            dtype = DTYPES[self.found.records[index.fqn].dtype]
            for item, target, source in self._read(piece, dtype, targets):
                if source is not target:
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        source = source.narrow(dim, start, length)
                    target.copy_(source)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(
        self, piece: Piece, dtype: torch.dtype, targets: list[tuple[Any, Tensor]]
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Read a piece; where one tensor takes all of it as it is, straight into that one's memory."""
        (item, target), *others = targets
        straight = not others and tuple(target.shape) == piece.shape and target.dtype == dtype
        if straight and target.is_contiguous() and target.device.type == "cpu":
            manifest.read_piece(self.found, piece, _memory(target))
            yield item, target, target
            return
        scratch = torch.empty(piece.shape, dtype=dtype)
        manifest.read_piece(self.found, piece, _memory(scratch))
        for item, target in targets:
            yield item, target, scratch


def _empty(spread: Spread, allocate: Allocate | None = None) -> Tensor:
    dtype = DTYPES[spread.dtype]
    if allocate is None or not math.prod(spread.shape):
        return torch.empty(spread.shape, dtype=dtype)
    storage = allocate(math.prod(spread.shape) * dtype.itemsize)
    stride = [math.prod(spread.shape[dim + 1 :]) for dim in range(len(spread.shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, spread.shape, stride)


def _decoded(found: Manifest, decoder: Decoder) -> dict[str, Any]:
    try:
        state = decoder.decode(found.state)
    except Malformed as error:
        what = f"its {manifest.MANIFEST} is not what trainkit writes"
        raise CheckpointError(f"{found.directory} is refused: {what}: {error}.") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{found.directory} holds a {type(state).__name__}, not the dict of a checkpoint (state_dict, ...)."
        )
    return state
