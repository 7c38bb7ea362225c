"""Checkpoints by path or address: saved whole or not at all, and the newest of those that can be loaded.

A path is a file of this machine (`disk.py`); "s3://bucket/run" and the like are files of a store (`remote.py`).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trainkit.checkpoint import disk, format, manifest, remote, table
from trainkit.checkpoint.disk import StrPath
from trainkit.checkpoint.remote import is_remote as is_remote
from trainkit.errors import CheckpointError, NoCheckpointError

EXTENSION = ".ckpt"
Found = TypeVar("Found")


# ---------------------------------------------------------------------- writing
def save(path: StrPath, state: dict[str, Any], replace: bool = True) -> None:
    """Write a state to a file, making its directory if need be.

    Args:
        path: its name.
        state: tensors and plain values.
        replace: whether it takes the place of a file of that name, at once when all is written.

    Raises:
        CheckpointExistsError: there is a file of that name, and it is not to be replaced.
        CheckpointError: it could not be written, with the path and the reason; see `disk.publish`, `remote.publish`.
        TypeError: the state holds something that is neither a tensor nor a plain value.
    """
    place = remote if is_remote(path) else disk
    place.publish(named(path), lambda file: format.write(file, state), replace)


def link_or_copy(source: StrPath, path: StrPath, symbolic: bool = False, replace: bool = True) -> None:
    """Give an existing file of the same directory a second name; see `disk.link_or_copy`. Stores copy it."""
    if is_remote(path):
        remote.copy(named(source), named(path), replace)
    else:
        disk.link_or_copy(named(source), named(path), symbolic, replace)


def remove(path: StrPath) -> bool:
    """Delete a file; return whether it is gone. A failure is a warning: too many files never end a run."""
    return remote.remove(named(path)) if is_remote(path) else disk.remove(named(path))


def prepare(directory: StrPath) -> None:
    """Make a directory and prove that a file can be written there.

    Raises:
        CheckpointError: nothing can be written there, with the reason.
    """
    if is_remote(directory):
        remote.prepare(named(directory))
    else:
        disk.prepare(named(directory))


# ---------------------------------------------------------------------- names
def named(path: StrPath) -> str:
    """Return a path as a string; `file://` is this machine."""
    return os.fspath(path).removeprefix("file://")


def local(path: StrPath) -> StrPath:
    """Return a path of this machine as a Path, and an address as it is."""
    return path if is_remote(path) else Path(named(path))


def exists(path: StrPath) -> bool:
    """Whether a name is taken, by a link that leads nowhere as well."""
    return remote.exists(named(path)) if is_remote(path) else os.path.lexists(named(path))


def real(path: StrPath) -> str:
    """Return a path without links and dots; an address as it is."""
    return named(path).rstrip("/") if is_remote(path) else os.path.realpath(os.path.expanduser(named(path)))


def checkpoints_in(directory: StrPath) -> list[str]:
    """Return the names of the checkpoints in a directory, in order."""
    names = remote.names_in(named(directory)) if is_remote(directory) else disk.names_in(named(directory))
    return [name for name in names if name.endswith(EXTENSION) and name[0] != "."]


# ---------------------------------------------------------------------- reading
def load(path: StrPath, allocate: Any = None) -> dict[str, Any]:
    """Return the state a file holds, its tensors on the host; a file that was changed since it was written is refused.

    Args:
        path: a file, or a directory that several processes have written.
        allocate: makes the memory of the tensors of a directory.

    Raises:
        CheckpointError: there is no such file, with the nearest name there is; or it is not a checkpoint, or damaged,
            or holds more than tensors and plain values.
    """
    name = named(path)
    try:
        return _look(name, partial(_read, allocate=allocate))
    except NoCheckpointError:
        raise
    except FileNotFoundError as error:
        raise NoCheckpointError(f"there is no checkpoint {name}: {_nearest(name)}") from error
    except IsADirectoryError as error:
        inside = checkpoints_in(name)
        what = f"it holds {', '.join(inside)}; name one of them" if inside else f"there is no {EXTENSION} file in it"
        raise CheckpointError(f"{name} is a directory, not a checkpoint: {what}.") from error
    except OSError as error:
        raise CheckpointError(f"{name} could not be read: {disk.reason(error, name)}") from error


def newest(*directories: StrPath, only: Callable[[str], bool] | None = None) -> StrPath | None:
    """Return the checkpoint of some directories with the most training in it, or None when they have none.

    That is the one with the highest `global_step` among the `*.ckpt` that load, whatever their names and dates say. One
    that can be resumed comes before one that has weights only. A file that does not load, or whose weights are not
    finite while there is one whose weights are, is left where it is, with a warning that has the reason. Of several
    directories with as much training the last counts: what is saved there knows of what the others have saved.

    Args:
        directories: where to look.
        only: which paths count; None for all.

    Raises:
        CheckpointError: there are checkpoints, and none of them loads.
    """
    ranked: list[tuple[tuple[int, ...], int, int, str]] = []
    problems: list[str] = []
    not_finite: list[str] = []
    found: str | None = None
    places = enumerate(directories)
    for place, path in [(n, os.path.join(named(each), name)) for n, each in places for name in checkpoints_in(each)]:
        try:
            if only is not None and not only(path):
                continue
            *training, is_last = _rank(path)
            ranked.append((tuple(training), place, is_last, path))
        except FileNotFoundError:
            pass  # its run has removed it since
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    for *_, path in sorted(ranked, reverse=True):
        try:
            finite = _look(path, _verify).finite
        except FileNotFoundError:
            continue
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        if finite:
            found = path
            break
        not_finite.append(path)
    if found is None and not_finite:
        found = not_finite[0]  # there is nothing better
    else:
        problems += [f"the weights in {path} are not finite." for path in not_finite]
    if problems and found is None:
        where = " or ".join(map(named, directories))
        raise CheckpointError(
            f"no checkpoint in {where} can be loaded:\n  " + "\n  ".join(problems) + "\n"
            "Nothing was changed. To start from the beginning, leave ckpt_path out, or move the files away."
        )
    for problem in problems:
        warnings.warn(f"skipped a checkpoint: {problem} {found} is used.", stacklevel=2)
    return found if found is None or is_remote(found) else Path(found)


def is_newest(path: StrPath, step: int) -> bool:
    """Whether a run can't be resumed from more training than at a step with any other checkpoint beside this one.

    Only what claims to have more is verified, and counts if it is whole and its weights are finite: a resumed run has
    just read this one, and need not read it again. Where there is no checkpoint of trainkit's, none is the newest.
    """
    directory, known = os.path.dirname(named(path)) or ".", False
    for name in checkpoints_in(directory):
        other = os.path.join(directory, name)
        with contextlib.suppress(CheckpointError, OSError):
            resumable, other_step, *_ = _rank(other)
            known = True
            if resumable and other_step > step and _look(other, _verify).finite:
                return False
    return known


def head(path: StrPath) -> format.Head:
    """Return what a checkpoint says of itself, with its tensors left in the file; see `format.head`."""
    return _look(named(path), _head)


def step_of(path: StrPath) -> int:
    """Return the `global_step` of a checkpoint, from a look that leaves its tensors on the disk.

    Raises:
        CheckpointError: it is not a checkpoint of a run, or is damaged.
    """
    return _rank(named(path))[1]


def _rank(path: str) -> tuple[int, ...]:
    """Order checkpoints by what they say inside: those that can be resumed first, then by training done."""
    state = head(path).state
    progress = state.get("progress")
    progress = progress if isinstance(progress, dict) else {}
    numbers = [
        state.get("global_step"),
        progress.get("total_batch", 0),
        progress.get("epoch", state.get("epoch", 0)),
    ]
    if any(type(number) is not int for number in numbers):
        raise CheckpointError(f"{path} is not a checkpoint of a run: it has no global_step.")
    return ("optimizer_states" in state, *numbers, os.path.basename(path).startswith("last"))


# ---- a file, or a directory that several processes have written
def _read(path: str, allocate: Any = None) -> dict[str, Any]:
    if _is_directory(path):
        from trainkit.checkpoint import sharded_load

        return sharded_load.load(path, allocate)
    return format.read(path)


def _head(path: str) -> format.Head:
    if _is_directory(path):
        from trainkit.checkpoint import sharded_load

        return sharded_load.head(path)
    return format.head(path)


def _verify(path: str) -> table.Table | manifest.Manifest:
    return manifest.verify(path) if _is_directory(path) else table.verify(path)


def _is_directory(path: str) -> bool:
    """Whether a checkpoint is a directory of trainkit's; one of torch's own is refused."""
    if not os.path.isdir(path) or manifest.is_ours(path):
        return os.path.isdir(path)
    if os.path.lexists(os.path.join(path, ".metadata")):
        raise CheckpointError(
            f"{path} is refused: torch.distributed.checkpoint wrote it, whose .metadata is a pickle, and reading that "
            "can run any code. Only if you trust who made it: make it one file with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(directory, file), then trainkit convert that."
        )
    if path.endswith(EXTENSION):
        raise CheckpointError(f"{path} is damaged: its {disk.MANIFEST} is missing.")
    return False


def _look(path: str, use: Callable[[str], Found]) -> Found:
    with _on_this_machine(path) as local:
        try:
            return use(local)
        except CheckpointError as error:
            raise type(error)(str(error).replace(local, path)) from error.__cause__


def _on_this_machine(path: str) -> contextlib.AbstractContextManager[str]:
    return remote.downloaded(path) if is_remote(path) else contextlib.nullcontext(path)


def _nearest(path: str) -> str:
    """Say what is there in place of a missing file."""
    directory, name = os.path.dirname(path) or ".", os.path.basename(path)
    if not os.path.isdir(directory):
        return f"there is no directory {directory}."
    names = checkpoints_in(directory)
    if not names:
        return f"{directory} has no {EXTENSION} file."
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"{directory} has {', '.join(names)}."
