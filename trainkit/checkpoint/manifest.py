"""The trainkit.json of a checkpoint that several processes have written: a directory of files with raw bytes.

    epoch=1-step=10.ckpt/
      trainkit.json      the state as typed JSON, and where its tensors are: their pieces, each with its SHA-256
      plain.data         what all processes have, from rank 0
      0.data, 1.data     what each of them had of the spread tensors

    {"sha256": "...", "format": "trainkit-sharded", "version": 1, "writer": {...}, "finite": true,
     "byteorder": "little", "files": [["plain.data", size], ["0.data", size], ...],
     "records": {"spread/state_dict/net.weight": ["float32", [4, 3], [[file, start, sha256, offsets, shape], ...]]},
     "state": {...}}

Every byte of a file belongs to one piece, and every element of a tensor to one piece: both are checked before a tensor
is made. The names of files are those above and nothing else. This module needs no torch.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import sys
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainkit.checkpoint import archive, disk, table
from trainkit.checkpoint.archive import Damaged
from trainkit.checkpoint.disk import MANIFEST, StrPath
from trainkit.checkpoint.table import refused
from trainkit.errors import CheckpointError

KIND = "trainkit-sharded"
MAX_BYTES = 1 << 30
MAX_VALUES = 50_000_000
PLAIN = "plain.data"
SPREAD = "spread/"
"""How the record of a spread tensor begins; where it is in the state follows."""
ITEM_SIZES = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""The bytes of an element, by the name of its dtype."""

_FILE = re.compile(r"plain\.data|(0|[1-9][0-9]{0,6})\.data", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a file: a box cut out of a tensor, in row-major order."""

    file: str
    start: int
    size: int
    sha256: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """A tensor, by its pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A trainkit.json that is what was written, with files of the sizes that it says."""

    directory: str
    records: dict[str, Spread]
    files: dict[str, int]
    state: Any
    """Typed JSON."""
    finite: bool
    writer: dict[str, str]
    contents: bytes

    @property
    def size(self) -> int:
        """The bytes of all files together."""
        return sum(self.files.values()) + len(self.contents)

    def owner_of(self, piece: Piece) -> str:
        """Return where in the state the tensor is that a piece belongs to, "" when that can't be said."""
        record = next((name for name, spread in self.records.items() if piece in spread.pieces), "")
        return table.path_of(self.state, record)


# ---------------------------------------------------------------------- writing
def file_of(rank: int) -> str:
    """Return the name of the file that a process writes."""
    return f"{rank}.data"


def compose(
    state: str, records: Mapping[str, Spread], files: Mapping[str, int], finite: bool, writer: dict[str, str]
) -> bytes:
    """Return a trainkit.json.

    Raises:
        TypeError: it is more than a reader takes.
    """
    numbers = {name: number for number, name in enumerate(files)}
    listed = {
        name: [
            spread.dtype,
            spread.shape,
            [[numbers[one.file], one.start, one.sha256, one.offsets, one.shape] for one in spread.pieces],
        ]
        for name, spread in records.items()
    }
    rest = {"format": KIND, "version": table.VERSION, "writer": writer, "finite": finite, "byteorder": sys.byteorder}
    contents = table.signed({**rest, "files": list(files.items()), "records": listed}, state)
    if len(contents) > MAX_BYTES:
        raise TypeError(f"the tensors have more pieces than a checkpoint lists: {len(contents):,} bytes of them.")
    return contents


# ---------------------------------------------------------------------- reading
def is_ours(path: StrPath) -> bool:
    """Whether a path is a directory that trainkit has written as one checkpoint; it may be damaged."""
    return os.path.isdir(path) and disk.is_checkpoint_directory(path)


def read(path: StrPath) -> Manifest:
    """Return the trainkit.json of a directory, after comparing it with its digest and the files with their sizes.

    Raises:
        CheckpointError: it is not what was written, or a file is not there or has another size; the message names it.
        OSError: it can't be read.
    """
    directory = os.fspath(path)
    try:
        with disk.open_to_read(os.path.join(directory, MANIFEST)) as file:
            size = archive.size_of(file)
            if size > MAX_BYTES:
                raise refused(f"has {size:,} bytes, more than {MAX_BYTES:,}")
            file.seek(0)
            contents = file.read(size)
        found = _parsed(directory, contents)
    except Damaged as error:
        what = f"its {error.record} {error}" if error.record else str(error)
        raise CheckpointError(f"{directory} is damaged: {what}." if error.record else f"{directory} {what}.") from error
    for name, size in found.files.items():
        _check_size(directory, name, size)
    return found


def verify(path: StrPath, mine: Callable[[int], bool] = lambda _: True) -> Manifest:
    """Compare every byte of a directory's files with what was written, and return its trainkit.json.

    Args:
        path: the directory.
        mine: which of the files, by their number; other processes see to the others.

    Raises:
        CheckpointError: it is not whole, with the file that is not and which tensor that is.
        OSError: it can't be read.
    """
    found = read(path)
    check(found, mine)
    return found


def check(found: Manifest, mine: Callable[[int], bool] = lambda _: True) -> None:
    """Compare every byte of a directory's files, or of those that are `mine`, with what was written.

    Raises:
        CheckpointError: it is not whole, with the file that is not and which tensor that is.
        OSError: it can't be read.
    """
    pieces = sorted((p for spread in found.records.values() for p in spread.pieces), key=lambda p: (p.file, p.start))
    scratch = memoryview(bytearray(archive.CHUNK))
    for number, name in enumerate(found.files):
        if not mine(number):
            continue
        with disk.open_to_read(os.path.join(found.directory, name)) as file:
            for piece in pieces:
                if piece.file == name:
                    file.seek(piece.start)
                    _check(found, piece, _chunks(file, piece, scratch))


def read_piece(found: Manifest, piece: Piece, target: memoryview) -> None:
    """Read the bytes of a piece, and compare them with what was written.

    Raises:
        CheckpointError: they are not.
    """
    with disk.open_to_read(os.path.join(found.directory, piece.file)) as file:
        file.seek(piece.start)
        _check(found, piece, _chunks(file, piece, target))


def _check(found: Manifest, piece: Piece, chunks: Iterator[memoryview]) -> None:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    if digest.hexdigest() != piece.sha256:
        owner = found.owner_of(piece)
        which = f" ({owner})" if owner else ""
        raise CheckpointError(f"{found.directory} is damaged: {piece.file}{which} was changed since it was written.")


def _chunks(file: Any, piece: Piece, target: memoryview) -> Iterator[memoryview]:
    """Read a piece chunk by chunk into memory: one that is too small for it is used again for each."""
    again = len(target) < piece.size
    for start in range(0, piece.size, archive.CHUNK):
        stop = min(start + archive.CHUNK, piece.size)
        chunk = target[: stop - start] if again else target[start:stop]
        rest = chunk
        while rest:
            count = file.readinto(rest)
            if not count:
                return  # cut off since its size was looked at: the digest says so
            rest = rest[count:]
        yield chunk


def _check_size(directory: str, name: str, size: int) -> None:
    try:
        found = os.stat(os.path.join(directory, name), follow_symlinks=False)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is damaged: its {name} is missing.") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{directory} is refused: its {name} is not a file.")
    if found.st_size != size:
        raise CheckpointError(
            f"{directory} is damaged: its {name} has {found.st_size:,} bytes, where {size:,} were written."
        )


# ---------------------------------------------------------------------- what it may say
def _parsed(directory: str, contents: bytes) -> Manifest:
    said = table.opened_up(contents, KIND, MAX_VALUES)
    files, records, writer, finite = (said.get(name) for name in ("files", "records", "writer", "finite"))
    if type(files) is not list or type(records) is not dict or type(writer) is not dict or type(finite) is not bool:
        raise refused("lacks files, records, writer or finite")
    if "state" not in said:
        raise refused("lacks the state")
    if said.get("byteorder") != sys.byteorder:
        raise refused(f"says that its tensors are not in the byte order of this machine, {sys.byteorder}")
    named = [_file(entry) for entry in files]
    sizes = dict(named)
    if len(sizes) != len(named):
        raise refused("lists a file twice")
    spread = {name: _spread(name, entry, [file for file, _ in named]) for name, entry in records.items()}
    _check_tiles(sizes, [piece for one in spread.values() for piece in one.pieces])
    return Manifest(
        directory, spread, sizes, said["state"], finite, {str(k): str(v) for k, v in writer.items()}, contents
    )


def _file(entry: Any) -> tuple[str, int]:
    match entry:
        case [str(name), int(size)] if type(size) is int and 0 <= size < 1 << 62:
            if not _FILE.fullmatch(name):
                raise refused(f"lists a file of the name {name[:60]!r}")
            return name, size
    raise refused("has a list of files that can't be read")


def _spread(name: str, entry: Any, files: Sequence[str]) -> Spread:
    match entry:
        case [str(dtype), list(shape), list(pieces)] if dtype in ITEM_SIZES and _are_sizes(shape):
            box = tuple(shape)
            made = Spread(dtype, box, tuple(_piece(name, dtype, box, piece, files) for piece in pieces))
            if sum(math.prod(piece.shape) for piece in made.pieces) != math.prod(box) or _overlap(made.pieces):
                raise refused(f"has a tensor whose pieces do not make it up, {name[:60]!r}")
            return made
    raise refused(f"has a tensor that can't be, {name[:60]!r}")


def _piece(name: str, dtype: str, box: tuple[int, ...], entry: Any, files: Sequence[str]) -> Piece:
    match entry:
        case [int(file), int(start), str(digest), list(offsets), list(shape)]:
            inside = _are_sizes(offsets) and _are_sizes(shape) and len(offsets) == len(shape) == len(box)
            inside = inside and all(o + n <= most for o, n, most in zip(offsets, shape, box, strict=True))
            known = type(file) is type(start) is int and 0 <= file < len(files) and 0 <= start < 1 << 62
            if inside and known and _SHA256.fullmatch(digest):
                size = math.prod(shape) * ITEM_SIZES[dtype]
                return Piece(files[file], start, size, digest, tuple(offsets), tuple(shape))
    raise refused(f"has a tensor with a piece that can't be, {name[:60]!r}")


def _are_sizes(numbers: list[Any]) -> bool:
    """Whether a list can be a shape: not too many numbers, and their product one that a disk can hold."""
    good = len(numbers) <= 64 and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
    return good and math.prod(numbers) < 1 << 62


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether two of the boxes have an element in common."""
    boxes = [piece for piece in pieces if math.prod(piece.shape)]
    if len(boxes) < 2:
        return False
    if not boxes[0].shape:
        return True
    along = max(range(len(boxes[0].shape)), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    open_boxes: list[tuple[int, int, Piece]] = []
    for number, box in enumerate(sorted(boxes, key=lambda one: one.offsets[along])):
        while open_boxes and open_boxes[0][0] <= box.offsets[along]:
            open_boxes.pop(0)
        if any(_meet(box, other) for _, _, other in open_boxes):
            return True
        insort(open_boxes, (box.offsets[along] + box.shape[along], number, box), key=lambda one: one[:2])
    return False


def _meet(one: Piece, other: Piece) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    )


def _check_tiles(files: Mapping[str, int], pieces: Sequence[Piece]) -> None:
    """Refuse files of which a byte belongs to no piece, or to two."""
    ends = dict.fromkeys(files, 0)
    for piece in sorted(pieces, key=lambda one: (one.start, one.size)):
        if piece.start != ends[piece.file] and piece.size:
            raise refused(f"has pieces that do not make up the file {piece.file}")
        ends[piece.file] += piece.size
    for name, size in files.items():
        if ends[name] != size:
            raise refused(f"has pieces that do not make up the file {name}")
