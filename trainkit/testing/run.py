"""The run that is certified, in a process of its own: set up to leave nothing but records in its trial's directory."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainkit import DataModule, Module, Trainer, seed_everything
from trainkit.callbacks import ModelCheckpoint
from trainkit.errors import MisconfigurationException
from trainkit.loggers import CSVLogger
from trainkit.testing.certify import LINES, OUTPUT, RUN
from trainkit.testing.record import Record


class Certified(ModelCheckpoint):
    """Save every few steps, beside what the run saves of its own accord. A state of its own by its name."""


def prepare(trainer: Trainer, directory: Path, save_every: int) -> None:
    """Move everything that a run writes into a directory, and let it be recorded.

    Raises:
        MisconfigurationException: the run saves nothing that it could go on from.
    """
    if trainer.fast_dev_run or trainer.barebones:
        raise MisconfigurationException("fast_dev_run and barebones save nothing, so there is nothing to resume.")
    trainer.default_root_dir = str(directory)
    trainer.loggers = [CSVLogger(directory, name=str(RUN.parent))] if trainer.loggers else []
    folder = directory / RUN / "checkpoints"
    if not begun(directory):  # the next attempt would log beside what one that saved nothing has left
        shutil.rmtree(directory / RUN.parent, ignore_errors=True)
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._given_dirpath = os.path.realpath(folder)
    trainer.callbacks.insert(0, Record(directory / LINES))
    trainer.callbacks.append(Certified(folder, "certified-{step}", every_n_train_steps=save_every, save_last=True))


def fit(trainer: Trainer, module: Module, data: Any, directory: Path) -> None:
    """Train from the newest checkpoint of the directory, from zero when there is none yet."""
    ckpt_path = "last" if begun(directory) else None
    if isinstance(data, DataModule):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    elif isinstance(data, tuple):
        train, validation = data
        trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, data, ckpt_path=ckpt_path)


def begun(directory: Path) -> bool:
    """Whether an earlier attempt saved something."""
    return any((directory / RUN / "checkpoints").glob("*.ckpt"))


def of_functions(
    module_fn: Callable[[], Module],
    data_fn: Callable[[], Any],
    trainer_fn: Callable[[], Trainer],
    seed: int,
    directory: Path,
    save_every: int,
) -> None:
    """Make a run of functions and train, in a child process."""
    _redirect(directory)
    import torch

    torch.set_num_threads(1)  # the threads of a forked parent are not there, and waiting for them would never end
    seed_everything(seed, verbose=False)
    trainer, module, data = trainer_fn(), module_fn(), data_fn()
    prepare(trainer, directory, save_every)
    fit(trainer, module, data, directory)


def _redirect(directory: Path) -> None:
    """Send what the run prints to a file, where the parent finds it when the run fails."""
    descriptor = os.open(directory / OUTPUT, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115  pytest puts its own in its place
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    warnings.resetwarnings()  # in a test suite they may be errors
