"""Checkpoints in a store that fsspec speaks to: "s3://bucket/run", "gs://...", "memory://...", "https://..." to read.

Most such stores cannot rename. A file is written to them in one go, from bytes that are complete, and its size is
compared afterwards; what a store keeps of a write that failed is removed, and if that fails too, it is noticed when it
is read: by checksum and digest, as in any damaged checkpoint. That a new name takes nobody's place is up to the store;
where it can't be asked, it is looked first.

fsspec is imported when the first address is used.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from trainkit.errors import CheckpointError, CheckpointExistsError, MisconfigurationException, NoCheckpointError


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the address of a store, as "s3://bucket/x" is. `file://` is this machine."""
    return isinstance(path, str) and "://" in path and not path.startswith("file://")


def publish(url: str, write: Callable[[BinaryIO], None], replace: bool = True) -> None:
    """Write a file to a store, all of it at once.

    Raises:
        CheckpointExistsError: there is a file of that name, and it is not to be replaced.
        CheckpointError: the store did not take it; what it kept of it is removed.
    """
    content = io.BytesIO()
    write(content)
    store, name = _store(url)
    with _explained(f"{url} was not written"):
        if not replace and store.exists(name):
            raise FileExistsError(url)
        _put(store, name, content.getvalue(), replace)


def copy(source: str, url: str, replace: bool = True) -> None:
    """Give a file of a store a second name, by a copy of it.

    Raises:
        CheckpointExistsError, CheckpointError: as for `publish`.
    """
    store, origin = _store(source)
    with _explained(f"{source} could not be read"):
        content = store.cat_file(origin)
    publish(url, lambda file: file.write(content), replace)  # type: ignore[arg-type]


def _put(store: Any, name: str, content: bytes, replace: bool) -> None:
    before = _size(store, name)
    try:
        if replace:
            store.pipe_file(name, content)
        else:
            try:
                store.pipe_file(name, content, mode="create")
            except (TypeError, ValueError, NotImplementedError):  # it can't be asked to keep what is there
                store.pipe_file(name, content)
        size = _size(store, name)
        if size != len(content):
            raise OSError(f"the store has {size or 0} of its {len(content)} bytes")
    except FileExistsError:
        raise
    except BaseException:
        with contextlib.suppress(Exception):
            if _size(store, name) not in (before, None):
                store.rm_file(name)
        raise


def _size(store: Any, name: str) -> int | None:
    with contextlib.suppress(AttributeError):
        store.invalidate_cache()
    try:
        return int(store.info(name)["size"])
    except FileNotFoundError:
        return None


def remove(url: str) -> bool:
    """Delete a file; return whether it is gone. A failure is a warning."""
    store, name = _store(url)
    try:
        store.rm_file(name)
    except FileNotFoundError:
        return True
    except Exception as error:
        warnings.warn(f"{url} could not be removed: {_words(error)}", stacklevel=2)
        return False
    return True


def exists(url: str) -> bool:
    """Whether there is a file of that name.

    Raises:
        CheckpointError: the store does not answer.
    """
    store, name = _store(url)
    with _explained(f"{url} could not be looked for"):
        return bool(store.exists(name))


def prepare(url: str) -> None:
    """Prove that a file can be written below an address.

    Raises:
        CheckpointError: it can't, with the reason.
    """
    probe = f"{url}/.trainkit-{os.getpid()}-{os.urandom(4).hex()}"
    store, directory = _store(url)
    with _explained(f"nothing can be written below {url}"):
        store.makedirs(directory, exist_ok=True)
        name = store._strip_protocol(probe)
        _put(store, name, b"trainkit", replace=True)
        store.rm_file(name)


def names_in(url: str) -> list[str]:
    """Return the names below an address in order; none if there is nothing.

    Raises:
        CheckpointError: the store does not answer.
    """
    store, directory = _store(url)
    with contextlib.suppress(AttributeError):
        store.invalidate_cache()
    with _explained(f"{url} could not be listed"):
        try:
            return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in store.ls(directory, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []


@contextlib.contextmanager
def downloaded(url: str) -> Iterator[str]:
    """Copy a file to this machine while the block runs; nothing in it is run.

    Raises:
        NoCheckpointError: there is no such file.
        CheckpointError: the store does not answer.
    """
    store, name = _store(url)
    with tempfile.TemporaryDirectory(prefix="trainkit-") as directory:
        path = os.path.join(directory, "checkpoint")
        with _explained(f"{url} could not be read"):
            try:
                store.get_file(name, path)
            except FileNotFoundError as error:
                raise NoCheckpointError(f"there is no checkpoint {url}.") from error
        yield path


def _store(url: str) -> tuple[Any, str]:
    """Return the store that an address is in, and its name there."""
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise MisconfigurationException(
            f"{url} is not on this machine: that needs fsspec, which is not installed. Install it with "
            "`pip install trainkit[remote]`."
        ) from error
    try:
        store, name = url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol nobody knows, or whose package is missing
        raise MisconfigurationException(f"{url} can't be used: {error}.") from error
    return store, str(name)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say of an error of a store, which may be of any kind, what could not be done."""
    try:
        yield
    except (CheckpointError, MisconfigurationException):
        raise
    except FileExistsError as error:
        raise CheckpointExistsError(f"{what}: there is one of that name already. It is intact.") from error
    except Exception as error:
        raise CheckpointError(f"{what}: {_words(error)} Earlier checkpoints are intact.") from error


def _words(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    return f"{type(error).__name__}: {text}." if text else f"{type(error).__name__}."
