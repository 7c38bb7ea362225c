"""How a run that was cut short goes on: its newest checkpoint, and the command or call that resumes from it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from signal import SIGINT, Signals
from typing import TYPE_CHECKING

from trainkit.checkpoint.store import step_of
from trainkit.errors import CheckpointError

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


def short_path(path: str | os.PathLike[str]) -> str:
    """Return a path as it can be typed here: relative when it lies below the current folder."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith(os.curdir) else relative  # "." and "..": not below


def checkpoints_of(trainer: Trainer) -> tuple[str, str]:
    """Return the paths of the best and of the newest checkpoint, empty where there is none."""
    best, found = "", []
    for callback in trainer.checkpoint_callbacks:
        top = getattr(callback, "best_model_path", "")
        best = best or (top if top and getattr(callback, "monitor", None) else "")
        found += [top, getattr(callback, "last_model_path", ""), *getattr(callback, "best_k_models", {})]
    there = [path for path in found if path and os.path.exists(path)]
    return best, max(there, key=os.path.getmtime, default="")


def where_it_ended(trainer: Trainer, exception: BaseException) -> str:
    """Return a sentence: after which step a run was cut short, why, and what is saved of it."""
    newest = checkpoints_of(trainer)[1]
    saved = ", no checkpoint was saved"
    if newest:
        word = "checkpoint saved" if _step_of(newest) == trainer.global_step else "newest checkpoint"
        saved = f", {word}: {short_path(newest)}"
    what = f"failed with {type(exception).__name__}" if isinstance(exception, Exception) else "interrupted"
    return f"{what} after step {trainer.global_step}{saved}"


def _step_of(path: str) -> int:
    try:
        return step_of(path)
    except (CheckpointError, OSError):  # of another format: a callback of the user's may write what it likes
        return -1


def resume_call(trainer: Trainer, path: str) -> str:
    """Return the command that goes on from a checkpoint, or the call when no command line started the run."""
    command = getattr(trainer, "command", None)
    if command:
        return f"{command} --ckpt_path {shlex.quote(path)}"
    data = "" if trainer.datamodule is None else "datamodule=datamodule, "
    return f"trainer.fit(model, {data}ckpt_path={json.dumps(path)})"


def tell(trainer: Trainer, exception: BaseException) -> None:
    """Tell on stderr how a fit that a signal ended goes on, where no progress bar does, and how long it took to end.

    Without a checkpoint there is nothing to tell.
    """
    newest = checkpoints_of(trainer)[1]
    if not newest or not trainer.is_global_zero:
        return
    bar, lines = trainer.progress_bar_callback, []
    if bar is None or not getattr(bar, "is_enabled", True):
        lines = [where_it_ended(trainer, exception), f"resume: {resume_call(trainer, short_path(newest))}"]
    lines += _reaction(trainer)
    with contextlib.suppress(OSError):  # the terminal is gone: that is what SIGHUP tells
        sys.stdout.flush()
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _reaction(trainer: Trainer) -> list[str]:
    """Return how long it took to end after a signal: who sets the notice that is given wants to know."""
    interruption = trainer.interruption
    if interruption.signal is None:
        return []
    name = "Ctrl-C" if interruption.signal == SIGINT else Signals(interruption.signal).name
    saved = "" if interruption.save_seconds is None else f"; saves took up to {interruption.save_seconds:.1f} s"
    return [f"stopped {time.monotonic() - interruption.noted_at:.1f} s after {name}{saved}"]
