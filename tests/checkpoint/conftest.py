"""A disk that writes down what is asked of it, and fails where a test wants it to."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trainkit.checkpoint import disk

CALLS = ("open", "write", "fsync", "close", "replace", "rename", "link", "symlink", "unlink", "mkdir", "listdir")


class Call(NamedTuple):
    name: str
    path: str
    target: str = ""


class Disk:
    """The functions of `os` that touch one directory, and the system's rename that replaces nothing.

    Attributes:
        calls: what was called, in order, with names relative to the directory.
        fail_at: which call fails, counted from 1; 0 for none.
        code: with which errno.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = os.path.realpath(directory)
        self.calls: list[Call] = []
        self.fail_at, self.code = 0, 0
        self.failed: Call | None = None
        self._open: dict[int, str] = {}
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        rename = disk._renameat2()
        assert rename is not None  # Linux

        def rename_new(at: int, source: bytes, to: int, target: bytes, flags: int) -> int:
            if not self._is_here(os.fsdecode(source)):
                return int(rename(at, source, to, target, flags))
            if self._fails("rename_new", os.fsdecode(source), os.fsdecode(target)):
                ctypes.set_errno(self.code)
                return -1
            return int(rename(at, source, to, target, flags))

        monkeypatch.setattr(disk, "_renameat2", lambda: rename_new)

    def start(self, fail_at: int = 0, code: int = 0) -> None:
        """Forget what was called, and fail there."""
        self.calls, self.fail_at, self.code, self.failed = [], fail_at, code, None

    def names(self) -> list[str]:
        """Return the calls' names, with each run of writes as one."""
        names = [call.name for call in self.calls]
        return [name for number, name in enumerate(names) if name != "write" or names[number - 1] != "write"]

    def _is_here(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.directory)

    def _fails(self, name: str, path: str, target: str = "") -> bool:
        call = Call(name, *(os.path.relpath(p, self.directory) if p else "" for p in (path, target)))
        self.calls.append(call)
        if len(self.calls) == self.fail_at:
            self.failed = call
        return len(self.calls) == self.fail_at

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            first = arguments[0] if arguments else "."
            path = self._open.get(first) if isinstance(first, int) else first
            if path is None or not self._is_here(path):
                return real(*arguments, **options)
            second = arguments[1] if name in ("replace", "rename", "link") else ""
            fails = self._fails(name, os.fspath(path), os.fspath(second))
            if name == "symlink":
                self.calls[-1] = Call(name, self.calls[-1].path, os.path.relpath(arguments[1], self.directory))
            if name == "close":
                del self._open[first]
                real(first)  # as Linux does, whatever it returns
            if fails:
                raise OSError(self.code, os.strerror(self.code), os.fspath(path))
            result = None if name == "close" else real(*arguments, **options)
            if name == "open":
                self._open[result] = os.fspath(path)
            return result

        return call


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk that writes down and fails what is called for files below `tmp_path`."""
    yield Disk(tmp_path, monkeypatch)
    monkeypatch.undo()
