"""From other programs' files to trainkit's checkpoints, and from checkpoints to safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import UntypedStorage

from trainkit.checkpoint import disk, foreign, format, store, weights
from trainkit.errors import CheckpointError
from trainkit.redaction import redacted

StrPath = str | os.PathLike[str]

KINDS = (".ckpt", ".safetensors")


def convert(source: StrPath, target: StrPath) -> str:
    """Make a file of one kind into one of another, and return what was made, in a few words.

        convert("lightning.ckpt", "new.ckpt")         a checkpoint of Lightning's, or what torch.save wrote
        convert("new.ckpt", "new.safetensors")        its weights only
        convert("weights.safetensors", "new.ckpt")    a checkpoint with weights only
        convert("directory.ckpt", "new.ckpt")         one file of what several processes have written

    Args:
        source: the file to read, or the directory; it is not changed.
        target: the file to write, ending in .ckpt or .safetensors; there must be none of that name.

    Raises:
        CheckpointError: `target` exists or could not be written; `source` can't be read, or holds objects.
    """
    secrets: list[str] = []
    origin, end = os.fspath(source), os.path.splitext(os.fspath(target))[1]
    if end not in KINDS:
        raise CheckpointError(f"{target} must end in {' or '.join(KINDS)}: that says what it is to be.")
    if os.path.lexists(target):
        raise CheckpointError(f"{target} is there already, and nothing is overwritten. Give another name.")
    if origin.endswith(".safetensors"):
        state = {"state_dict": weights.load(origin)}
    elif os.path.isdir(origin):
        state = store.load(origin, on_disk(os.path.dirname(os.path.abspath(target))))
    elif "://" in origin or (os.path.isfile(origin) and not foreign.is_ours(origin)):
        state = foreign.made_plain(foreign.load(origin))
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):
            if key in state:
                state[key] = redacted(state[key], secrets)
    else:
        state = store.load(origin)
        if end == ".ckpt":
            raise CheckpointError(f"{origin} is one of trainkit's checkpoints already: copy it.")
    try:
        if end == ".ckpt":
            store.save(target, state, replace=False)
            format.verify(target)
        else:
            weights.save(target, _weights_of(state, origin), replace=False)
    except TypeError as error:
        raise CheckpointError(f"{origin} can't be converted: {error}") from error
    held = state.get("state_dict")
    made = f"{len(held)} tensors" if isinstance(held, Mapping) else "no weights"
    return f"{made}, '***' in the place of {', '.join(secrets)}" if secrets and end == ".ckpt" else made


def on_disk(directory: str) -> Callable[[int], UntypedStorage]:
    """Return what makes the memory of a tensor as a file without a name, so that it need not fit into memory."""

    def allocate(size: int) -> UntypedStorage:
        name = disk.temporary_in(directory)
        try:
            with open(name, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told here, and not by a signal later
            made: Any = UntypedStorage.from_file(name, True, size)
            return cast(UntypedStorage, made)
        except OSError as error:
            raise disk.not_written(name, error) from error
        finally:
            disk.discard(name)

    return allocate


def _weights_of(state: Mapping[str, object], origin: str) -> Mapping[str, object]:
    held = state.get("state_dict")
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{origin} has no 'state_dict'; it has: {', '.join(map(str, state)) or 'nothing'}.")
    return held
