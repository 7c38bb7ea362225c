"""One file on a local disk: it is whole under its name, or it is not there.

    open a hidden file in the same directory     O_EXCL, O_NOFOLLOW, mode 0600
    write, fsync, close                          the bytes are on the disk
    rename                                       a new name takes nobody's place; one that is replaced is the old or new
    fsync the directory                          the name is on the disk

A process killed at any point leaves what was there, or the new file, and perhaps a hidden one, which the next run
sweeps away. Without one of the two fsyncs a machine that loses power may keep a name without its bytes, or bytes
without their name. An fsync that failed is not repeated: the system may have called the lost pages written. What failed
is removed, and the next attempt writes all of it anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainkit.errors import CheckpointError, CheckpointExistsError

TEMPORARY = ".trainkit-"
"""How a hidden file's name begins; the writer's machine, its process and eight random digits follow."""

MANIFEST = "trainkit.json"
"""What says what is in a directory that is one checkpoint."""

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_NO_FLAGS = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
_CHUNK = 1 << 20
_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_NO_PLACE = (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST)
writing: set[str] = set()
"""Names of the hidden files and directories this process is writing: they have its number, as those of a dead one with
that number."""

StrPath = str | os.PathLike[str]


# ---------------------------------------------------------------------- a file
def publish(path: StrPath, write: Callable[[BinaryIO], None], replace: bool = True) -> None:
    """Write a file, making its directory if need be; it has its name when all of it is on the disk.

    Args:
        path: its name.
        write: writes the bytes to an open file.
        replace: whether it takes the place of a file of that name, at once when all is written.

    Raises:
        CheckpointExistsError: there is a file of that name, and it is not to be replaced.
        CheckpointError: it could not be written, with the path and the reason. An earlier file of that name is intact
            and nothing half-written is left. Only when the directory could not be synced after a file was replaced is
            the new one there, and may be lost with the power.
    """
    target = os.fspath(path)
    directory = os.path.dirname(target) or "."
    make_directory(directory)
    temporary = temporary_in(directory)
    writing.add(os.path.basename(temporary))
    try:
        with created(temporary) as file:
            write(file)
        rename(temporary, target, replace)
    except OSError as error:
        raise not_written(target, error) from error
    finally:
        discard(temporary)  # gone already when it was renamed
        writing.discard(os.path.basename(temporary))
    sync_name(target, replace)


def copy(source: StrPath, path: StrPath, replace: bool = True) -> None:
    """Write a second copy of a file, published like the first.

    Raises:
        CheckpointError: it could not be written, as for `publish`.
    """

    def write(file: BinaryIO) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, file, _CHUNK)

    publish(path, write, replace)


def link_or_copy(source: StrPath, path: StrPath, symbolic: bool = False, replace: bool = True) -> None:
    """Give an existing file of the same directory a second name.

    Args:
        source: the file just written.
        path: its second name.
        symbolic: make a symbolic link, relative to the directory; it is of no use when its target is removed. By
            default a hard link: both names are the file, or, of a directory, both names of each of its files. Where
            there are no hard links, it is copied.
        replace: whether it takes the place of a file of that name.

    Raises:
        CheckpointExistsError: there is a file of that name, and it is not to be replaced.
        CheckpointError: it could not be done, with the path and the reason; an earlier file of that name is intact.
    """
    origin, target = os.fspath(source), os.fspath(path)
    directory = os.path.dirname(target) or "."
    temporary = temporary_in(directory)
    try:
        if symbolic:
            os.symlink(os.path.relpath(origin, directory), temporary)
        elif is_checkpoint_directory(origin):
            writing.add(os.path.basename(temporary))
            _link_files(origin, temporary)
        else:
            os.link(origin, temporary)
    except OSError as error:
        if error.errno in _NO_LINKS and not os.path.isdir(origin):
            return copy(origin, target, replace)
        discard(temporary)
        raise not_written(target, error) from error
    try:
        rename(temporary, target, replace)
    except OSError as error:
        discard(temporary)
        raise not_written(target, error) from error
    finally:
        writing.discard(os.path.basename(temporary))
    discard(temporary)  # a rename between two names of one file does nothing
    sync_name(target, replace)


def _link_files(origin: str, directory: str) -> None:
    """Make a directory with second names of all files of another one; where there are no links, with copies."""
    os.mkdir(directory, 0o700)
    for name in names_in(origin):
        try:
            os.link(os.path.join(origin, name), os.path.join(directory, name))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(os.path.join(origin, name), "rb") as source, created(os.path.join(directory, name)) as file:
                shutil.copyfileobj(source, file, _CHUNK)
    sync(directory)


def open_to_read(path: StrPath) -> BinaryIO:
    """Open a file, unbuffered; what is under its name and is no file, as a pipe that nobody writes to, is refused.

    Raises:
        CheckpointError: it is a pipe, a device or a socket.
        OSError: it can't be opened, or is a directory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for a writer
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        raise CheckpointError(f"{os.fspath(path)} is refused: it is a pipe or a device, not a file.")
    return cast(BinaryIO, open(descriptor, "rb", buffering=0))


def remove(path: StrPath) -> bool:
    """Delete a file; return whether it is gone. A failure is a warning: too many files never end a run."""
    try:
        if is_checkpoint_directory(path) and not os.path.islink(path):
            hidden = temporary_in(os.path.dirname(os.path.abspath(path)))
            os.rename(path, hidden)  # at once; of what this process does not live to remove the next run knows
            discard(hidden)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        warnings.warn(f"{os.fspath(path)} could not be removed: {reason(error, os.fspath(path))}", stacklevel=2)
        return False
    return True


# ---------------------------------------------------------------------- a directory
def is_checkpoint_directory(path: StrPath) -> bool:
    """Whether there is a checkpoint that several processes have written: a directory with a trainkit.json in it."""
    return os.path.lexists(os.path.join(path, MANIFEST))


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
            sync(os.path.dirname(directory))
        except OSError as error:
            if isinstance(error, FileExistsError) and os.path.isdir(directory):
                continue  # made by somebody else since
            why = reason(error, directory)
            raise CheckpointError(f"the directory {os.fspath(path)} could not be made: {why}") from error


def prepare(path: StrPath) -> None:
    """Make a directory and prove that a file can be written there.

    Raises:
        CheckpointError: nothing can be written there, with the path and the reason.
    """
    directory = os.fspath(path)
    make_directory(directory)
    temporary = temporary_in(directory)
    try:
        with created(temporary) as file:
            file.write(b"trainkit")
    except OSError as error:
        why = reason(error, temporary)
        raise CheckpointError(f"nothing can be written to the directory {directory}: {why}") from error
    finally:
        discard(temporary)


def sweep(directory: StrPath) -> list[str]:
    """Remove the hidden files of writers of this machine that are dead; return the names removed.

    A file with any other name is left alone, and so is one of a writer that lives or that wrote from another machine.
    """
    removed = []
    for name in names_in(directory):
        writer = name.removeprefix(TEMPORARY).split("-")
        if not name.startswith(TEMPORARY) or len(writer) != 3 or writer[0] != machine() or not writer[1].isdigit():
            continue
        temporary = os.path.join(directory, name)
        if name not in writing and (int(writer[1]) == os.getpid() or not _alive(int(writer[1]))):
            discard(temporary)
            removed.append(name)
    return removed


# ---------------------------------------------------------------------- the steps
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
def created(path: str) -> Iterator[BinaryIO]:
    """Open a file that must not exist yet; on leaving, what was written is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = _File(os.open(path, flags, 0o600))
    try:
        yield cast(BinaryIO, file)
        file.sync()
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to hear of
            os.close(file.descriptor)
        raise
    os.close(file.descriptor)


def rename(temporary: str, target: str, replace: bool) -> None:
    """Give a whole file its name."""
    if replace:
        _replace(temporary, target)
    else:
        rename_new(temporary, target)


def _replace(source: str, target: str) -> None:
    """Give something a name that something else may have; what had it, if it is still there, has the other name then.

    A directory, which a checkpoint of several processes is, changes its name with what has it, at once.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        if os.path.isdir(target) and not os.path.islink(target) and not is_checkpoint_directory(target):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target) from error
        exchange(source, target)


def exchange(one: str, other: str) -> None:
    """Exchange two names.

    Where the system can't do it at once, there is an instant without the second; what had it is beside it then, under a
    name that says so.
    """
    call = _renameat2()
    if call is not None:
        if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_FLAGS:
            raise OSError(code, os.strerror(code), one, None, other)
    root, end = os.path.splitext(other)
    before = f"{root}-replaced{end}"
    rename_new(other, before)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(before, other)
        raise
    os.rename(before, one)


def rename_new(source: str, target: str) -> None:
    """Rename a file or a directory to a name that nobody has, or raise FileExistsError.

    Where the system can't do it at once, a second name is made and the first removed; where the file system has no
    links either, it is looked whether the name is free: two processes that take one name in the same instant are told
    apart everywhere but there.
    """
    call = _renameat2()
    if call is not None:
        if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_FLAGS:
            raise OSError(code, os.strerror(code), source, None, target)
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        os.rename(source, target)
    else:
        os.unlink(source)


@cache
def _renameat2() -> Any:
    """Return the system's call that renames without replacing, None where it has none (Linux since 3.15 has)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call


def sync_name(target: str, replaced: bool) -> None:
    """Put a name on the disk; one that can't be put there is taken back, if it is new."""
    try:
        sync(os.path.dirname(target) or ".")
    except OSError as error:
        if not replaced:
            discard(target)
            raise not_written(target, error) from error
        raise CheckpointError(
            f"{target} was written, but may be lost if the machine loses power: its directory could not be synced, "
            f"{reason(error, target)}"
        ) from error


def sync(directory: str) -> None:
    """Put the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):  # some network file systems have none
            raise
    finally:
        os.close(descriptor)


def temporary_in(directory: str) -> str:
    """Return the name for a hidden file of this process."""
    return os.path.join(directory, f"{TEMPORARY}{machine()}-{os.getpid()}-{os.urandom(4).hex()}")


def machine() -> str:
    """Return eight digits for this machine."""
    return f"{zlib.crc32(os.uname().nodename.encode()):08x}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True


def discard(path: str) -> None:
    """Remove a file or a directory that is of no use, if it is there and can be removed."""
    try:
        os.unlink(path)
    except IsADirectoryError:
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass


def names_in(directory: StrPath) -> list[str]:
    """Return the names in a directory in order; none if it can't be read."""
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


# ---------------------------------------------------------------------- words
def not_written(target: str, error: OSError) -> CheckpointError:
    """Return the error that says why something was not written."""
    if isinstance(error, FileExistsError):
        return CheckpointExistsError(f"{target} was not written: there is one of that name already. It is intact.")
    return CheckpointError(f"{target} was not written: {reason(error, target)} Earlier checkpoints are intact.")


def reason(error: OSError, path: str) -> str:
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
