"""Checkpoint files in a directory: a file is whole under its name, or it is not there.

    open a hidden file in the same directory     O_EXCL, O_NOFOLLOW, mode 0600
    write, fsync                                 the bytes are on the disk
    rename over the target                       the name means the new file from here, never half of it
    fsync the directory                          the name is on the disk

A process killed at any point leaves the earlier file of that name, or the new one, and perhaps a hidden file, which the
next run sweeps away. Without one of the two fsyncs a machine that loses power may keep a name without its bytes, or
bytes without their name.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainkit.checkpoint import format
from trainkit.errors import CheckpointError, NoCheckpointError

EXTENSION = ".ckpt"
TEMPORARY = ".trainkit-"
"""How a hidden file's name begins; the writer's machine, its process and eight random digits follow."""

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_CHUNK = 1 << 20
_writing: set[str] = set()
"""Names of the hidden files this process is writing: they have its number, as those of a dead one with that number."""

StrPath = str | os.PathLike[str]


# ---------------------------------------------------------------------- writing
def save(path: StrPath, state: dict[str, Any]) -> None:
    """Write a state to a file, making its directory if need be; a file of that name is replaced when all is written.

    Raises:
        CheckpointError: it could not be written, with the path and the reason. An earlier file of that name is intact
            and nothing half-written is left. Only when the directory itself could not be synced is the new file there,
            and may be lost with the power.
        TypeError: the state holds something that is neither a tensor nor a plain value.
    """
    target = os.fspath(path)
    make_directory(os.path.dirname(target) or ".")
    _publish(target, lambda file: format.write(file, state))


def copy(source: StrPath, path: StrPath) -> None:
    """Write a second copy of a file, published like a saved one.

    Raises:
        CheckpointError: it could not be written, as for `save`.
    """

    def write(file: BinaryIO) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, file, _CHUNK)

    _publish(os.fspath(path), write)


def link_or_copy(source: StrPath, path: StrPath, symbolic: bool = False) -> None:
    """Give an existing file of the same directory a second name, replacing a file that has it.

    Args:
        source: the file just written.
        path: its second name.
        symbolic: make a symbolic link, relative to the directory; it is of no use when its target is removed. By
            default a hard link: both names are the file. Where there are no hard links, it is copied.

    Raises:
        CheckpointError: it could not be done, with the path and the reason; an earlier file of that name is intact.
    """
    origin, target = os.fspath(source), os.fspath(path)
    directory = os.path.dirname(target) or "."
    temporary = _temporary(directory)
    try:
        if symbolic:
            os.symlink(os.path.relpath(origin, directory), temporary)
        else:
            os.link(origin, temporary)
        os.replace(temporary, target)
    except OSError as error:
        _discard(temporary)
        if error.errno in _NO_LINKS:
            return copy(origin, target)
        raise CheckpointError(_not_written(target, error)) from error
    _discard(temporary)  # a rename between two names of one file does nothing
    _sync_directory(target)


def remove(path: StrPath) -> bool:
    """Delete a file; return whether it is gone. A failure is a warning: too many files never end a run."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        warnings.warn(f"{os.fspath(path)} could not be removed: {_reason(error, os.fspath(path))}", stacklevel=2)
        return False
    return True


def make_directory(path: StrPath) -> None:
    """Make a directory and those above it where they are missing, readable by their owner only.

    Raises:
        CheckpointError: it can't be made, with the path and the reason.
    """
    directory = os.path.abspath(path)
    missing: list[str] = []
    while not os.path.isdir(directory) and directory != os.path.dirname(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for directory in reversed(missing):
        try:
            os.mkdir(directory, 0o700)
            _sync(os.path.dirname(directory))
        except OSError as error:
            if isinstance(error, FileExistsError) and os.path.isdir(directory):
                continue  # made by somebody else since
            reason = _reason(error, directory)
            raise CheckpointError(f"the directory {os.fspath(path)} could not be made: {reason}") from error


def prepare(path: StrPath) -> None:
    """Make a directory, remove what dead writers left in it, and prove that a file can be written there.

    Raises:
        CheckpointError: nothing can be written there, with the path and the reason.
    """
    directory = os.fspath(path)
    make_directory(directory)
    sweep(directory)
    temporary = _temporary(directory)
    try:
        with _created(temporary) as file:
            file.write(b"trainkit")
    except OSError as error:
        reason = _reason(error, temporary)
        raise CheckpointError(f"nothing can be written to the directory {directory}: {reason}") from error
    finally:
        _discard(temporary)


def sweep(directory: StrPath) -> list[str]:
    """Remove the hidden files of writers of this machine that are dead; return the names removed.

    A file with any other name is left alone, and so is one of a writer that lives or that wrote from another machine.
    """
    removed = []
    for name in _names(directory):
        writer = name.removeprefix(TEMPORARY).split("-")
        if not name.startswith(TEMPORARY) or len(writer) != 3 or writer[0] != _machine() or not writer[1].isdigit():
            continue
        temporary = os.path.join(directory, name)
        if name not in _writing and (int(writer[1]) == os.getpid() or not _alive(int(writer[1]))):
            _discard(temporary)
            removed.append(name)
    return removed


# ---------------------------------------------------------------------- reading
def load(path: StrPath) -> dict[str, Any]:
    """Return the state a file holds, its tensors on the host; a file that was changed since it was written is refused.

    Raises:
        CheckpointError: there is no such file, with the nearest name there is; or it is not a checkpoint, or damaged,
            or holds more than tensors and plain values.
    """
    name = os.fspath(path)
    try:
        return format.read(name)
    except FileNotFoundError as error:
        raise NoCheckpointError(f"there is no checkpoint {name}: {_nearest(name)}") from error
    except IsADirectoryError as error:
        inside = [entry for entry in _names(name) if entry.endswith(EXTENSION)]
        what = f"it holds {', '.join(inside)}; name one of them" if inside else f"there is no {EXTENSION} file in it"
        raise CheckpointError(f"{name} is a directory, not a checkpoint: {what}.") from error
    except OSError as error:
        raise CheckpointError(f"{name} could not be read: {_reason(error, name)}") from error


def newest(directory: StrPath) -> Path | None:
    """Return the checkpoint of a directory with the most training in it, or None when the directory has none.

    That is the one with the highest `global_step` among the `*.ckpt` that load, whatever their names and dates say. One
    that can be resumed comes before one that has weights only. A file that does not load is left where it is, with a
    warning that has the reason.

    Raises:
        CheckpointError: there are checkpoints, and none of them loads.
    """
    ranked: list[tuple[tuple[int, ...], Path]] = []
    problems: list[str] = []
    paths = [Path(directory, name) for name in _names(directory) if name.endswith(EXTENSION) and name[0] != "."]
    for path in paths:
        try:
            ranked.append((_rank(path), path))
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    found: Path | None = None
    for _, path in sorted(ranked, reverse=True):
        try:
            format.verify(path)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
        else:
            found = path
            break
    if problems and found is None:
        raise CheckpointError(
            f"no checkpoint in {os.fspath(directory)} can be loaded:\n  " + "\n  ".join(problems) + "\n"
            "Nothing was changed. To start from the beginning, leave ckpt_path out, or move the files away."
        )
    for problem in problems:
        warnings.warn(f"skipped a checkpoint: {problem} {found} is used.", stacklevel=2)
    return found


def step_of(path: StrPath) -> int:
    """Return the `global_step` of a checkpoint, from a look that leaves its tensors on the disk.

    Raises:
        CheckpointError: it is not a checkpoint of a run, or is damaged.
    """
    return _rank(Path(path))[1]


def _rank(path: Path) -> tuple[int, ...]:
    """Order checkpoints by what they say inside: those that can be resumed first, then by training done."""
    state = format.head(path).state
    progress = state.get("progress") or {}
    numbers = [
        state.get("global_step"),
        progress.get("total_batch", 0),
        progress.get("epoch", state.get("epoch", 0)),
    ]
    if any(type(number) is not int for number in numbers):
        raise CheckpointError(f"{path} is not a checkpoint of a run: it has no global_step.")
    return ("optimizer_states" in state, *numbers, path.name.startswith("last"))


# ---------------------------------------------------------------------- one file
class _File:
    """What torch.save writes to: a file descriptor that keeps its first error and takes no more after it.

    torch's writer is C++ code that is better not interrupted by an exception; `close` raises the error it kept.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self.error is None and rest:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:
            self.error = error
        return size

    def flush(self) -> None:
        """Do nothing: no byte is kept back."""

    def sync(self) -> None:
        """Put the bytes on the disk, or raise why they are not there."""
        if self.error is not None:
            raise self.error
        os.fsync(self.descriptor)  # never a second time: after a failure the system may call lost pages written


@contextlib.contextmanager
def _created(path: str) -> Iterator[BinaryIO]:
    """Open a file that must not exist yet; on leaving, what was written is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = _File(os.open(path, flags, 0o600))
    try:
        yield cast(BinaryIO, file)
        file.sync()
    finally:
        os.close(file.descriptor)


def _publish(target: str, write: Callable[[BinaryIO], None]) -> None:
    temporary = _temporary(os.path.dirname(target) or ".")
    _writing.add(os.path.basename(temporary))
    try:
        with _created(temporary) as file:
            write(file)
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(_not_written(target, error)) from error
    finally:
        _discard(temporary)  # gone already when it was renamed
        _writing.discard(os.path.basename(temporary))
    _sync_directory(target)


def _sync_directory(target: str) -> None:
    try:
        _sync(os.path.dirname(target) or ".")
    except OSError as error:
        raise CheckpointError(
            f"{target} was written, but may be lost if the machine loses power: its directory could not be synced, "
            f"{_reason(error, target)}"
        ) from error


def _sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):  # some network file systems have none
            raise
    finally:
        os.close(descriptor)


def _temporary(directory: str) -> str:
    return os.path.join(directory, f"{TEMPORARY}{_machine()}-{os.getpid()}-{os.urandom(4).hex()}")


def _machine() -> str:
    return f"{zlib.crc32(os.uname().nodename.encode()):08x}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True


def _discard(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


# ---------------------------------------------------------------------- words
def _not_written(target: str, error: OSError) -> str:
    return f"{target} was not written: {_reason(error, target)} Earlier checkpoints are intact."


def _reason(error: OSError, path: str) -> str:
    """Say what an error of the system means for a file, in one sentence."""
    directory = os.path.dirname(path) or "."
    code = error.errno
    if code == errno.ENOSPC:
        return f"the disk is full ({_free(directory)} free)."
    if code == errno.EDQUOT:
        return "your disk quota is used up."
    if code == errno.EROFS:
        return f"{directory} is on a read-only file system."
    if code in (errno.EACCES, errno.EPERM):
        return f"no permission in {directory}."
    if code == errno.ENOTDIR:
        above = Path(path)
        while above != above.parent and not above.is_file():
            above = above.parent
        return f"{above} is a file, not a directory."
    if code == errno.EEXIST:
        return f"{path} is a file, not a directory."
    if code == errno.ENOENT and not os.path.isdir(directory):
        return f"{directory} is not there any more."
    if code == errno.EISDIR:
        return f"{path} is a directory."
    if code == errno.ENAMETOOLONG:
        return f"the name has {len(os.fsencode(os.path.basename(path)))} bytes, more than the file system takes."
    if code == errno.EFBIG:
        return "it is larger than a file may be here (see `ulimit -f`)."
    return f"{error.strerror or error}."


def _free(directory: str) -> str:
    try:
        return f"{shutil.disk_usage(directory).free:,} bytes"
    except OSError:
        return "an unknown amount"


def _names(directory: StrPath) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _nearest(path: str) -> str:
    """Say what is there in place of a missing file."""
    directory, name = os.path.dirname(path) or ".", os.path.basename(path)
    if not os.path.isdir(directory):
        return f"there is no directory {directory}."
    names = [entry for entry in _names(directory) if entry.endswith(EXTENSION) and entry[0] != "."]
    if not names:
        return f"{directory} has no {EXTENSION} file."
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"{directory} has {', '.join(names)}."
