"""OnExceptionCheckpoint: save what there is when an exception ends training."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from trainkit.callbacks.checkpoint import Checkpoint

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class OnExceptionCheckpoint(Checkpoint):
    """Save a checkpoint when an exception or Ctrl-C ends training, and remove it when a later fit ends well.

    `fit` goes on from that file if no `ckpt_path` is given. The updates before the exception are in it; that a run
    goes on exactly from there can't be promised.

    Args:
        dirpath: the directory.
        filename: the file's name without ".ckpt".

    Raises:
        ValueError: the filename is empty.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise ValueError("OnExceptionCheckpoint(filename=...) must not be empty.")
        self.dirpath = dirpath
        self.filename = filename
        self._saving = False

    @property
    def ckpt_path(self) -> str:
        """The file."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._saving = False

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._saving = not trainer.fast_dev_run  # before this there is nothing that an older file has not

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        if not self._saving:
            return
        self._saving = False
        if trainer.world_size > 1:  # what a checkpoint needs of the others they no longer give
            exception.add_note(
                "OnExceptionCheckpoint: nothing was saved, since a checkpoint of several processes needs all of them. "
                "The run goes on from its newest one: ckpt_path='last'."
            )
            return
        try:
            trainer.save_checkpoint(self.ckpt_path)
        except Exception as error:
            exception.add_note(f"OnExceptionCheckpoint: nothing was saved: {error}")

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._saving and trainer.is_global_zero and os.path.exists(self.ckpt_path):
            trainer.checkpoint_io.remove_checkpoint(self.ckpt_path)
        self._saving = False
