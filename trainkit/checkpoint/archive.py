"""The bytes of a checkpoint file: the zip archive that `torch.save` writes, and one more record at its end.

    each record        header, name, padding to 64 bytes | contents | CRC-32 and size
    trainkit.json      the same; it lists the records with their sizes and digests
    directory, end     where the records are

All bytes between the contents follow from the records' names, sizes and CRC-32s. So a reader that has verified
trainkit.json knows what each byte of the file has to be, and reads it once, from front to back. This module needs no
torch.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

TABLE = "trainkit.json"
PREFIX = "archive/"
ALIGNMENT = 64
MAX_TABLE = 100 << 20
"""Bytes that trainkit.json may have."""
CHUNK = 1 << 20

_FLAGS = 0x0808  # CRC-32 and sizes follow the contents; names are UTF-8
_BIG = 0xFFFFFFFF
_END_SIZE = 56 + 20 + 22
_FIXED = ("data.pkl", ".format_version", ".storage_alignment", "byteorder", "version", ".data/serialization_id")
_DATA = re.compile(r"data/(0|[1-9][0-9]{0,9})", re.ASCII)


class Damaged(Exception):
    """Tell what is wrong with a file's bytes; `record` is where, if it is in one."""

    def __init__(self, reason: str, record: str = "") -> None:
        super().__init__(reason)
        self.record = record


class NotOurs(Exception):
    """Tell that a file is something else: it has no trainkit.json."""


class Sink(Protocol):
    """What an archive is written to."""

    def write(self, data: Any, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Record:
    """A record as trainkit.json lists it."""

    name: str
    size: int
    crc32: int
    sha256: str


def is_record_name(name: object) -> bool:
    """Whether a checkpoint may have a record of this name; a short list, so there are no paths to be tricked by."""
    return isinstance(name, str) and (name in _FIXED or _DATA.fullmatch(name) is not None)


# ---------------------------------------------------------------------- writing
class Writer:
    """Write records to a file that stands at its beginning, hashing them on the way: each byte is touched once."""

    def __init__(self, file: Sink) -> None:
        self.file = file
        self.position = 0
        self.records: list[Record] = []
        self._offsets: list[int] = []

    def add(self, name: str, contents: bytes | memoryview) -> None:
        """Write a record."""
        view = memoryview(contents)
        size = len(view)
        self._offsets.append(self.position)
        self._write(_header(name, size, self.position))
        crc, digest = 0, hashlib.sha256()
        for start in range(0, size, CHUNK):  # small enough to be still in the cache when it is written
            chunk = view[start : start + CHUNK]
            crc = zlib.crc32(chunk, crc)
            digest.update(chunk)
            self._write(chunk)
        self.records.append(Record(name, size, crc, digest.hexdigest()))
        self._write(_trailer(self.records[-1]))

    def close(self) -> None:
        """Write the directory and the end."""
        self._write(_directory(self.records, self._offsets, self.position))

    def _write(self, data: bytes | memoryview) -> None:
        self.position += len(data)
        view = memoryview(data)
        while view:
            written = self.file.write(view)
            view = view[len(view) if written is None else written :]


# ---------------------------------------------------------------------- reading
def size_of(file: BinaryIO) -> int:
    """Return how many bytes an open file has."""
    return file.seek(0, 2)


def read_table(file: BinaryIO) -> bytes:
    """Return the contents of trainkit.json, which nothing has verified yet.

    Raises:
        NotOurs: the file has none.
        Damaged: the file is cut off, goes on after its end, or does not say where its trainkit.json is.
    """
    size = size_of(file)
    if size == 0:
        raise Damaged("is empty")
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        file.seek(max(0, size - 4096))
        if _mentions_table(file.read(4096)):
            raise Damaged("does not begin as a zip file does")
        raise NotOurs("it is not a zip file as torch.save writes it")
    end = _last(file, size, _END_SIZE)
    if end[-22:-18] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise Damaged(_without_end(file, size))
    directory = int.from_bytes(end[48:56], "little")
    if end[:4] != b"PK\x06\x06" or not 16 <= directory <= size - _END_SIZE:
        raise _neither(file, size)
    file.seek(directory - 16)
    trailer = file.read(16)
    length = int.from_bytes(trailer[12:16], "little")
    if trailer[:4] != b"PK\x07\x08" or length > directory - 16:
        raise _neither(file, size)
    file.seek(max(0, directory - 16 - length - 256))
    before = file.read(min(256, directory - 16 - length))
    if not _mentions_table(before[-(ALIGNMENT + 64) :]):
        raise _neither(file, size)
    if length > MAX_TABLE:
        raise Damaged(f"is refused: its {TABLE} has {length:,} bytes, more than {MAX_TABLE:,}")
    table = bytearray(length)
    file.seek(directory - 16 - length)
    _fill(file, memoryview(table), TABLE)
    return bytes(table)


def is_ours(file: BinaryIO) -> bool:
    """Whether trainkit wrote an open file, which may be damaged: its last record is, or seems to be, trainkit.json."""
    try:
        read_table(file)
    except NotOurs:
        return False
    except Damaged:
        return _mentions_table(_last(file, size_of(file), 4096))
    return True


def expected_size(records: Sequence[Record], table: bytes) -> int:
    """Return how many bytes a file with these records has."""
    position, _, everything = _layout(records, table)
    return position + len(everything)


def read_records(
    file: BinaryIO, records: Sequence[Record], table: bytes, target: Callable[[Record], memoryview | None]
) -> None:
    """Read a file from front to back and compare every byte with what it has to be.

    Args:
        file: an open file.
        records: as its trainkit.json lists them.
        table: the contents of trainkit.json.
        target: where the contents of a record are to go; None reads and verifies them only.

    Raises:
        Damaged: a byte differs, with the record it is in.
    """
    position, offsets, directory = _layout(records, table)
    size = size_of(file)
    if size != position + len(directory):
        raise Damaged(f"has {size:,} bytes, where it was written with {position + len(directory):,}")
    file.seek(0)
    scratch = memoryview(bytearray(CHUNK))
    for record, offset in zip([*records, _record_of(table)], offsets, strict=True):
        _expect(file, _header(record.name, record.size, offset), "has a header that was changed", record.name)
        view, digest = target(record) if record.name != TABLE else None, hashlib.sha256()
        for start in range(0, record.size, CHUNK):
            stop = min(start + CHUNK, record.size)
            chunk = scratch[: stop - start] if view is None else view[start:stop]
            _fill(file, chunk, record.name)
            digest.update(chunk)
        if digest.hexdigest() != record.sha256:
            raise Damaged("was changed since it was written", record.name)
        _expect(file, _trailer(record), "has a checksum or size behind it that was changed", record.name)
    _expect(file, directory, "is damaged: the directory at its end was changed", "")


def _layout(records: Sequence[Record], table: bytes) -> tuple[int, list[int], bytes]:
    """Return where the directory begins, where each record does, and the directory with all that follows it."""
    everything = [*records, _record_of(table)]
    position, offsets = 0, []
    for record in everything:
        offsets.append(position)
        position += len(_header(record.name, record.size, position)) + record.size + len(_trailer(record))
    return position, offsets, _directory(everything, offsets, position)


def _record_of(table: bytes) -> Record:
    return Record(TABLE, len(table), zlib.crc32(table), hashlib.sha256(table).hexdigest())


def _fill(file: BinaryIO, view: memoryview, record: str) -> None:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise Damaged("is cut off", record)
        view = view[count:]


def _expect(file: BinaryIO, expected: bytes, reason: str, record: str) -> None:
    found = bytearray(len(expected))
    _fill(file, memoryview(found), record)
    if found != expected:
        raise Damaged(reason, record)


def _last(file: BinaryIO, size: int, count: int) -> bytes:
    file.seek(max(0, size - count))
    return file.read(count).rjust(count, b"\0")


def _mentions_table(data: bytes) -> bool:
    """Whether there is the name of our record, one byte of which may be damaged."""
    name = (PREFIX + TABLE).encode()
    half = len(name) // 2
    return name[:half] in data or name[half:] in data


def _without_end(file: BinaryIO, size: int) -> str:
    rest = _last(file, size, 65557)
    if b"PK\x05\x06" in rest:
        return "goes on after its end, or its end is damaged"
    return f"is cut off: its end is missing after {size:,} bytes, as after a full disk or a broken copy"


def _neither(file: BinaryIO, size: int) -> Exception:
    """Tell a damaged end of ours from the end of somebody else's file."""
    if _mentions_table(_last(file, size, 4096)):
        return Damaged("is damaged: its end does not say where its records are")
    return NotOurs(f"it has no record {TABLE}")


# ---------------------------------------------------------------------- the bytes between the contents
def _header(name: str, size: int, position: int) -> bytes:
    """Return what precedes a record's contents, padded so that these begin at a multiple of 64: mmap needs it."""
    path = (PREFIX + name).encode()
    wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= _BIG else b""
    padding = -(position + 30 + len(path) + len(wide) + 4) % ALIGNMENT
    extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    sizes = (_BIG, _BIG) if wide else (0, 0)
    return struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, _FLAGS, 0, 0, 0, 0, *sizes, len(path), len(extra)) + path + extra


def _trailer(record: Record) -> bytes:
    kind = "<4sIQQ" if record.size >= _BIG else "<4sIII"
    return struct.pack(kind, b"PK\x07\x08", record.crc32, record.size, record.size)


def _directory(records: Iterable[Record], offsets: Iterable[int], position: int) -> bytes:
    """Return the directory and the end records, that begin at a position."""
    listed = list(_entries(records, offsets))
    entries, count = b"".join(listed), len(listed)
    size = len(entries)
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0x31E, 45, 0, 0, count, count, size, position)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, position + size, 1)
    short = min(count, 0xFFFF), min(count, 0xFFFF), min(size, _BIG), min(position, _BIG)
    return entries + wide + locator + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, *short, 0)


def _entries(records: Iterable[Record], offsets: Iterable[int]) -> Iterator[bytes]:
    for record, offset in zip(records, offsets, strict=True):
        path = (PREFIX + record.name).encode()
        large = [number for number in (record.size, record.size, offset) if number >= _BIG]
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        size = min(record.size, _BIG)
        yield (
            struct.pack("<4s6H3I", b"PK\x01\x02", 0, 0, _FLAGS, 0, 0, 0, record.crc32, size, size)
            + struct.pack("<5H2I", len(path), len(extra), 0, 0, 0, 0, min(offset, _BIG))
            + path
            + extra
        )
