"""trainkit.json: what a checkpoint holds, the digest of each record, and its own.

    {"sha256": "...", "format": "trainkit", "version": 1, "writer": {...}, "finite": true,
     "records": [[name, size, crc32, sha256], ...], "state": {...}}

Its own digest is that of its bytes with 64 zeros in the digest's place. This module needs no torch, so that a look into
a file is quick.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from trainkit.checkpoint import archive, disk
from trainkit.checkpoint.archive import Damaged, NotOurs, Record
from trainkit.errors import CheckpointError

Source = str | os.PathLike[str] | BinaryIO

VERSION = 1
MAX_VALUES = 5_000_000
"""Lists, objects and commas in trainkit.json: reading one takes up to 100 bytes of memory for each."""

_START = b'{"sha256":"'
_DIGEST = slice(len(_START), len(_START) + 64)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Table:
    """A trainkit.json that is what was written."""

    records: list[Record]
    state: Any
    """Typed JSON."""
    finite: bool
    writer: dict[str, str]
    contents: bytes


# ---------------------------------------------------------------------- writing
def state_text(state: Any) -> str:
    """Return the typed JSON of a state as it is written.

    Raises:
        TypeError: it is more than a reader takes.
    """
    text = json.dumps(state, separators=(",", ":"), allow_nan=False)
    if len(text) > archive.MAX_TABLE // 2 or _values(text.encode()) > MAX_VALUES // 2:
        raise TypeError(
            f"the state has more plain values than a checkpoint holds, {len(text):,} characters of them beside its "
            "tensors. Save long lists of numbers as tensors."
        )
    return text


def compose(state: str, records: Sequence[Record], finite: bool, writer: dict[str, str]) -> bytes:
    """Return trainkit.json.

    Args:
        state: what `state_text` returned.
        records: all other records of the file, in their order.
        finite: whether the weights are.
        writer: the versions of what writes it.
    """
    listed = [[record.name, record.size, record.crc32, record.sha256] for record in records]
    rest = {"format": "trainkit", "version": VERSION, "writer": writer, "finite": finite, "records": listed}
    return signed(rest, state)


def signed(rest: dict[str, Any], state: str) -> bytes:
    """Return a trainkit.json with its own digest: what else it says, and the state."""
    body = json.dumps(rest, separators=(",", ":"))[1:-1]
    unsigned = _START + b"0" * 64 + f'",{body},"state":{state}}}'.encode()
    digest = hashlib.sha256(unsigned).hexdigest().encode()
    return unsigned[: _DIGEST.start] + digest + unsigned[_DIGEST.stop :]


# ---------------------------------------------------------------------- reading
@contextlib.contextmanager
def opened(source: Source) -> Iterator[tuple[BinaryIO, str]]:
    """Open a file, or take an open one, with its name for messages; what is wrong with it becomes a CheckpointError."""
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        with disk.open_to_read(name) as file, _explained(name):
            yield file, name
        return
    if not hasattr(source, "readinto") or not source.seekable():
        raise TypeError(f"a checkpoint is read from a path or an open binary file that can seek. Received: {source!r}.")
    name = str(getattr(source, "name", "") or "the checkpoint")
    with _explained(name):
        yield source, name


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        what = f"{name} is damaged: the record {error.record} {error}" if error.record else f"{name} {error}"
        raise CheckpointError(f"{what}.") from error
    except NotOurs as error:
        raise CheckpointError(
            f"{name} is not a checkpoint of trainkit: {error}. One that Lightning or torch.save wrote is made into one "
            f"by: trainkit convert {name} NEW.ckpt"
        ) from error


def read(file: BinaryIO) -> Table:
    """Return a file's trainkit.json after verifying it; the other records have not been looked at.

    Raises:
        Damaged: it is not what was written, or is nothing that trainkit writes.
        NotOurs: there is none.
    """
    contents = archive.read_table(file)
    found = opened_up(contents, "trainkit", MAX_VALUES)
    records, writer, finite = found.get("records"), found.get("writer"), found.get("finite")
    if type(records) is not list or type(writer) is not dict or type(finite) is not bool or "state" not in found:
        raise refused("lacks records, writer, finite or state")
    listed = [_record(entry) for entry in records]
    if len({record.name for record in listed}) != len(listed):
        raise refused("lists a record twice")
    size, expected = archive.size_of(file), archive.expected_size(listed, contents)
    if size != expected:
        raise Damaged(f"has {size:,} bytes, where its records need {expected:,}: it is cut off, or was added to")
    return Table(listed, found["state"], finite, {str(k): str(v) for k, v in writer.items()}, contents)


def opened_up(contents: bytes, kind: str, most: int) -> dict[str, Any]:
    """Return what a trainkit.json says, after comparing it with its own digest.

    Args:
        contents: its bytes.
        kind: the format it has to be of.
        most: how many values it may have.

    Raises:
        Damaged: it is not what was written, or is nothing that trainkit writes.
    """
    unsigned = contents[: _DIGEST.start] + b"0" * 64 + contents[_DIGEST.stop :]
    if contents[: len(_START)] != _START or hashlib.sha256(unsigned).hexdigest().encode() != contents[_DIGEST]:
        raise Damaged("was changed since it was written", archive.TABLE)
    if _values(contents) > most:
        raise refused(f"has more than {most:,} values")
    try:
        found: dict[str, Any] = json.loads(contents, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise refused("is nested too deeply") from None
    except ValueError as error:
        raise refused(f"can't be read, {error}") from None
    version = found.get("version")
    if type(version) is int and version > VERSION and found.get("format") == kind:
        raise refused(f"has version {version}, which a newer trainkit wrote; this one reads version {VERSION}")
    if version != VERSION or found.get("format") != kind:
        raise refused("has no version that trainkit writes")
    return found


def check(file: BinaryIO, table: Table, target: Callable[[Record], memoryview | None] = lambda _: None) -> None:
    """Read a whole file and compare each of its bytes with what was written.

    Args:
        file: an open file.
        table: its trainkit.json.
        target: where a record's contents are to go; they are verified in any case.

    Raises:
        Damaged: a byte differs; the message says in which record, and which tensor that is.
    """
    try:
        archive.read_records(file, table.records, table.contents, target)
    except Damaged as error:
        holds = path_of(table.state, error.record) if error.record.startswith("data/") else ""
        raise Damaged(f"({holds}) {error}" if holds else str(error), error.record) from None


def verify(source: Source) -> Table:
    """Compare every byte of a file with what was written, and return its trainkit.json; nothing is kept in memory.

    Raises:
        CheckpointError: it is not whole, with the record that is not and which tensor that is; or is no checkpoint.
        OSError: it can't be read.
    """
    with opened(source) as (file, _):
        table = read(file)
        check(file, table)
    return table


def path_of(state: Any, record: str, path: str = "") -> str:
    """Return where in a state the first tensor is that lies in a record, as in "state_dict/layer.weight"."""
    if type(state) is dict and state.get("record") == record:
        return path
    for step, item in _inside(state):
        if found := path_of(item, record, f"{path}/{step}".strip("/") if step else path):
            return found
    return ""


def _inside(state: Any) -> Iterator[tuple[str, Any]]:
    if type(state) is list:
        yield from ((str(index), item) for index, item in enumerate(state))
    elif type(state) is dict:
        for key, item in state.items():
            if key in ("$dict", "$ordered", "$counter") and type(item) is list:
                yield from ((str(pair[0]), pair[1]) for pair in item if type(pair) is list and len(pair) == 2)
            else:
                yield "" if key.startswith("$") else key, item


def _record(entry: Any) -> Record:
    match entry:
        case [str(name), int(size), int(crc), str(digest)] if type(size) is type(crc) is int:
            if not archive.is_record_name(name):
                raise refused(f"lists a record of the name {name[:60]!r}")
            if not (0 <= size < 1 << 62 and 0 <= crc < 1 << 32 and _SHA256.fullmatch(digest)):
                raise refused(f"lists a record {name} that can't be")
            return Record(name, size, crc, digest)
    raise refused("has a list of records that can't be read")


def refused(reason: str) -> Damaged:
    """Return the error that says why a trainkit.json is not read."""
    return Damaged(f"is refused: its {archive.TABLE} {reason}")


def _values(contents: bytes) -> int:
    return contents.count(b",") + contents.count(b"[") + contents.count(b"{")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
