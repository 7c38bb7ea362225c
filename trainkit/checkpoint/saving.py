"""One save of a run: its contents are collected, and written to one file or two, here or in the background."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from trainkit.checkpoint import restore, store
from trainkit.checkpoint.finite import weights_are_finite
from trainkit.checkpoint.io import CheckpointIO, is_own
from trainkit.errors import CheckpointError

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

StrPath = str | os.PathLike[str]


def save(trainer: Trainer, path: StrPath, weights_only: bool, storage_options: Any, overwrite: bool) -> None:
    """Write a checkpoint of this moment, after what is being written in the background: `Trainer.save_checkpoint`.

    Of several processes, all of which call this, rank 0 writes what all of them have, or, where the strategy says so,
    each of them its part of a directory.
    """
    trainer.background.settle()
    if trainer.strategy.sharded:
        from trainkit.checkpoint import jointly

        jointly.save(trainer, path, weights_only, storage_options, overwrite)
        return
    if trainer.world_size == 1:
        save_here(trainer, path, weights_only, storage_options, overwrite)
        return
    gather(trainer)
    if not trainer.is_global_zero:
        contents(trainer, weights_only)  # hooks are called on all processes
    trainer.strategy.on_rank_zero(
        f"saving {path}", lambda: save_here(trainer, path, weights_only, storage_options, overwrite)
    )


def save_here(trainer: Trainer, path: StrPath, weights_only: bool, storage_options: Any, overwrite: bool) -> None:
    """Write a checkpoint of this moment in this process."""
    write(trainer.checkpoint_io, contents(trainer, weights_only), path, storage_options, overwrite)


def gather(trainer: Trainer) -> None:
    """Get to know what only the other processes have: their random state, their part of an epoch's metrics."""
    trainer.ranks = trainer.strategy.gather_objects(restore.state_of_rank(trainer))


def contents(trainer: Trainer, weights_only: bool) -> dict[str, Any]:
    """Return what a checkpoint of this moment holds, when the rows logged before it are on the disk."""
    trainer.settle()
    checkpoint = restore.collect(trainer, weights_only)
    for logger in trainer.loggers:
        logger.sync()  # a run resumed from here expects the earlier rows to be there
    return checkpoint


def write(
    checkpoint_io: CheckpointIO,
    checkpoint: dict[str, Any],
    path: StrPath,
    storage_options: Any = None,
    overwrite: bool = True,
) -> None:
    """Write contents under a path.

    Raises:
        CheckpointExistsError: the path is taken, and not to be overwritten.
        CheckpointError: they could not be written.
    """
    if overwrite or storage_options is not None or not is_own(checkpoint_io):
        checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
    else:
        store.save(path, checkpoint, replace=False)


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error says that a place did not take a file, and not that what was to be saved can't be."""
    by_torch = type(error) is RuntimeError and "PytorchStreamWriter" in str(error)  # of a CheckpointIO of the user's
    return isinstance(error, CheckpointError | OSError) or by_torch


# ---------------------------------------------------------------------- the files of one save
@dataclass
class Task:
    """Which files a save writes, and with what."""

    path: str | None = None
    last: str | None = None
    replaces: frozenset[str] = frozenset()
    path_weights_only: bool = False
    last_weights_only: bool = False
    last_is: str | None = None
    """The file that `last` is another name of; None: it is written by itself."""
    symbolic: bool = False


@dataclass
class Result:
    """Which of them are there, and why not."""

    path: bool = False
    last: bool = False
    error: Exception | None = None
    seconds: float = 0.0


SaveAs = Callable[[str, bool, bool], None]
"""Writes one file: its path, whether it holds weights only, and whether it may take a file's place."""


def run(task: Task, save_as: SaveAs, link: Callable[[Callable[[], None]], None] | None) -> Result:
    """Write the files of a task, the first one first, and say which are there.

    Args:
        task: what to write.
        save_as: writes one file.
        link: makes a second name by calling what it gets; None in a process that makes none.
    """
    result, begun = Result(), time.monotonic()
    try:
        if task.path is not None:
            save_as(task.path, task.path_weights_only, task.path in task.replaces)
            result.path = True
        if task.last is not None:
            if task.last_is is None:
                save_as(task.last, task.last_weights_only, task.last in task.replaces)
            elif task.last_is != task.last and link is not None:
                replaced = task.last in task.replaces
                link(partial(store.link_or_copy, task.last_is, task.last, task.symbolic, replaced))
            result.last = True
    except Exception as error:
        result.error = error
    result.seconds = time.monotonic() - begun
    return result


def make(link: Callable[[], None]) -> None:
    """Make a second name, in the process that makes them."""
    link()


# ---------------------------------------------------------------------- weights that are numbers
def floating_state(module: nn.Module, but: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
    """Return a module's parameters and buffers by name, without those that have no values yet."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in tensors if name not in but and not is_lazy(tensor)}


def is_finite(trainer: Trainer, but: frozenset[str]) -> bool:
    """Whether a run's weights are numbers; what processes have agreed on where each has a part of them."""
    agreed = trainer.weights_finite
    if trainer.strategy.sharded and agreed is not None and agreed[0] == trainer.progress.step:
        return agreed[1]
    return not not_finite(floating_state(trainer.module, but))


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    if weights_are_finite({"state_dict": tensors}):
        return []
    return [name for name, tensor in tensors.items() if not weights_are_finite({"state_dict": {name: tensor}})]
