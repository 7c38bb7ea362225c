"""Read a checkpoint that several processes have written, in any number of processes, or in one without any group.

torch.distributed.checkpoint plans which pieces of a spread tensor are needed here. They are read and compared with
their digests by what is in this file; nothing is unpickled.

    load          all of it in this process
    load_lazily   the same with spread tensors left in their files, until it is known how they are to be spread
    head          what is in it, without its tensors
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_planned
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from trainkit.checkpoint import disk, manifest
from trainkit.checkpoint.format import Head, memory_of
from trainkit.checkpoint.layout import is_spread
from trainkit.checkpoint.manifest import SPREAD, Manifest, Piece, Spread
from trainkit.checkpoint.plain import DTYPES
from trainkit.checkpoint.typed import Decoder, Malformed, TensorInfo, build
from trainkit.errors import CheckpointError

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
            load_planned(dict(tensors), storage_reader=_Reader(found, tensors), planner=planner, no_dist=True)
    except CheckpointException as failed:
        for error, _ in failed.failures.values():
            raise error from None
        raise CheckpointError(f"{found.directory} could not be read: {failed}") from None


class _Reader(StorageReader):
    """Read the pieces that a plan needs, each once and whole, so that its digest can be compared."""

    def __init__(self, found: Manifest, wanted: Iterable[str]) -> None:
        self.found, self.wanted = found, list(wanted)

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, pieces = {}, {}
        for record in self.wanted:  # of all of them would be too slow, when tensors are read one by one
            spread = self.found.records[record]
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

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
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
            manifest.read_piece(self.found, piece, memory_of(target))
            yield item, target, target
            return
        scratch = torch.empty(piece.shape, dtype=dtype)
        manifest.read_piece(self.found, piece, memory_of(scratch))
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
        what = f"its {disk.MANIFEST} is not what trainkit writes"
        raise CheckpointError(f"{found.directory} is refused: {what}: {error}.") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{found.directory} holds a {type(state).__name__}, not the dict of a checkpoint (state_dict, ...)."
        )
    return state
