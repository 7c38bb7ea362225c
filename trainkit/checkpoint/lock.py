"""Who owns a directory of checkpoints: one process at a time, for as long as its run lasts.

The lock is a POSIX record lock: the system gives it back when the process ends, however it ends, and worker processes
do not inherit it, as they would inherit a `flock`. It also goes when the process closes *any* descriptor of the file,
so the file is opened once and remembered here. It lies beside the directory, hidden, so that the directory holds
checkpoints and nothing else, and the lock outlives a directory that somebody removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import Any, NamedTuple


class _Held(NamedTuple):
    path: str
    descriptor: int
    process: int
    """A forked process has no lock, whatever it remembers."""
    claims: int


_held: dict[str, _Held] = {}


class Ownership:
    """That this process owns a directory, or who else does.

    Claims of one process share the ownership; the last one to be released gives the directory back.

    Args:
        directory: an existing directory. It is claimed at once.

    Attributes:
        owner: "" when the directory is this process's, else who has it.
    """

    def __init__(self, directory: str) -> None:
        self.directory = os.path.realpath(directory)
        self.owner = _claim(self.directory)
        self._claimed = not self.owner

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_claimed": False}  # a copy has no claim of its own

    def release(self) -> None:
        """Give the claim back; once more does nothing."""
        if self._claimed:
            self._claimed = False
            _release(self.directory)


def _claim(directory: str) -> str:
    """Take the lock, or say who has it. Where there can be no lock, nobody has."""
    held = _held.get(directory)
    if held is not None and held.process == os.getpid():
        _held[directory] = held._replace(claims=held.claims + 1)
        return ""
    if held is not None:
        os.close(held.descriptor)  # inherited; the parent keeps its lock
        del _held[directory]
    parent, name = os.path.split(directory)
    for path in (os.path.join(parent, f".{name or 'root'}.lock"), os.path.join(directory, ".lock")):
        found = _lock(path)
        if isinstance(found, str):
            return found
        if found is not None:
            with contextlib.suppress(OSError):  # on a full disk the owner has no name
                os.ftruncate(found, 0)
                os.pwrite(found, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
            _held[directory] = _Held(path, found, os.getpid(), 1)
            return ""
    return ""


def _lock(path: str) -> int | str | None:
    """Return the descriptor of a file that is locked now, or who has locked it, or None where neither can be."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            return owner if error.errno in (errno.EAGAIN, errno.EACCES) else None
        with contextlib.suppress(OSError):  # which may come between any two questions about it
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its owner removed it since it was opened: there is another one, or none


def _release(directory: str) -> None:
    held = _held.get(directory)
    if held is None or held.process != os.getpid():
        return
    if held.claims > 1:
        _held[directory] = held._replace(claims=held.claims - 1)
        return
    del _held[directory]
    with contextlib.suppress(OSError):
        os.unlink(held.path)
    os.close(held.descriptor)
