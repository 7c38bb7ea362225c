"""Runs that torchrun starts again: their processes find the run that they were, and its newest good checkpoint.

    torchrun --nnodes 1:2 --max-restarts 3 --rdzv-backend c10d ... train.py

torchrun starts all processes again when one has died, and when a node has come or gone. The script then runs from its
beginning, and the same `trainer.fit(...)` goes on with the run it was, in the same directory, on as many processes as
there are now:

restarts.json   in the run's directory: which agents of torchrun have had a part in it, for which command, since when
resolve         an agent that has had a part in a run, and has its command and run id, is starting it again: its newest
                checkpoint comes before the one that the call names. Without one, the run begins again where it began

An agent is known by its process, not by TORCHELASTIC_RESTART_COUNT: nodes that come or go are no restart in that count,
and an agent that comes late has a count of its own. One that has had a part and is still there is enough.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit import launched
from trainkit.checkpoint import restore, store
from trainkit.errors import warn
from trainkit.loggers.base import run_directory, runs_directory
from trainkit.rank_zero import rank_zero_info
from trainkit.resume_hint import short_path

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

NOTE = "restarts.json"
_fits = itertools.count()  # of this program: each fit is a run of its own
_now: dict[str, Any] = {}  # what rank 0 notes of the one that runs


def can_be_restarted(trainer: Trainer) -> bool:
    """Whether torchrun runs this process, which starts it again when it dies; the Trainer's own launcher does not."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and trainer.strategy.parallel
    return by_torchrun and not launched.is_ours() and not trainer.fast_dev_run


def agent() -> str:
    """Return who started this process: a name that no other process has, before or after it."""
    pid, began, boot = os.getppid(), "", ""
    with contextlib.suppress(OSError, IndexError):  # where the system has no such files the number has to do
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "/".join((platform.node(), boot, str(pid), began))


# ---------------------------------------------------------------- a run begins
def read_checkpoint(trainer: Trainer, ckpt_path: str | PathLike[str] | None, stage: str) -> None:
    """Read the checkpoint that a run begins from, and let the loggers go on where it was written.

    Raises:
        CheckpointError: there is no such checkpoint, or none that can be read.
    """
    trainer.checkpoint, trainer.resume_path, trainer.resumed_by_name = None, None, False
    path = resolve(trainer, ckpt_path, stage)
    if path is None:
        return
    trainer.checkpoint, trainer.resume_path = restore.load(trainer, path), str(path)
    trainer.resumed_by_name = str(ckpt_path) not in ("last", "best", "None") and trainer.restarted_in is None
    if stage == "fit":
        continue_loggers(trainer, trainer.checkpoint, path)


def resolve(trainer: Trainer, ckpt_path: str | PathLike[str] | None, stage: str) -> str | PathLike[str] | None:
    """Return the checkpoint that a run begins from: its own newest one if it is started again, else what is named.

    Raises:
        CheckpointError: there is no such checkpoint, or none that can be read.
    """
    trainer.restarted_in = None
    if stage != "fit" or not can_be_restarted(trainer):
        path: str | PathLike[str] | None = trainer.strategy.on_rank_zero(
            "looking for the checkpoint", lambda: restore.resolve(trainer, ckpt_path, stage)
        )
        return path
    agents, fit = sorted(set(trainer.strategy.gather_objects(agent()))), str(next(_fits))
    path, trainer.restarted_in = trainer.strategy.on_rank_zero(
        "looking for the checkpoint", lambda: _look(trainer, ckpt_path, agents, fit)
    )
    if trainer.restarted_in is not None and path is None:
        _go_on_in(trainer, trainer.restarted_in, 0)
    return path


def _look(
    trainer: Trainer, ckpt_path: str | PathLike[str] | None, agents: list[str], fit: str
) -> tuple[str | PathLike[str] | None, list[str | None] | None]:
    """Return where to begin, and the directories of the loggers of the run that is started again."""
    _now.clear()
    _now.update(agents=agents, fit=fit, began=time.time())
    found = next((note for note in _notes(trainer) if _is_of_this_run(note)), None)
    if found is None:
        return restore.resolve(trainer, ckpt_path, "fit"), None
    path = _newest(trainer, found)
    if path is not None:
        where = f"it goes on from {short_path(path)}"
    else:
        path = restore.resolve(trainer, ckpt_path, "fit")
        where = f"there is no checkpoint of it yet, it begins again {f'from {path}' if path else 'at its start'}"
    count, size = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), trainer.world_size
    of = f" (restart {count} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS', '?')})" if count != "0" else ""
    rank_zero_info(f"torchrun has started this run again, with {size} process{'es' * (size > 1)}{of}: {where}")
    return path, found["loggers"]


def continue_loggers(trainer: Trainer, checkpoint: dict[str, Any], path: str | PathLike[str]) -> None:
    """Let the loggers go on where the checkpoint was written; those of a run that is started again in any case."""
    if trainer.restarted_in is None:
        restore.continue_loggers(trainer, checkpoint, path)
    else:
        progress = checkpoint.get("progress") or {}
        _go_on_in(trainer, trainer.restarted_in, progress.get("window", int(checkpoint.get("global_step", 0))))


def _go_on_in(trainer: Trainer, directories: list[str | None], row: int) -> None:
    for logger, directory in zip(trainer.loggers, directories, strict=False):
        if directory is not None and os.path.isdir(directory):
            logger.continue_run(Path(directory), row)


# ---------------------------------------------------------------- the note
def note(trainer: Trainer, stopped: bool = False) -> None:
    """Write down whose run this is, when its directory is known.

    Args:
        trainer: whose run it is.
        stopped: a signal has ended it. With --max-restarts 0 it is noted only then: a node that comes late is no
            restart in torchrun's count, and SIGTERM is what the processes get that run already.
    """
    if not can_be_restarted(trainer) or not trainer.is_global_zero or "fit" not in _now:
        return
    if not stopped and os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return
    path = Path(trainer.run_dir) / NOTE
    before = _read(path)
    same = before is not None and _is_of_this_command(before)
    said: dict[str, Any] = before if before is not None and same else {**_of_this_command(), "agents": [], "fits": {}}
    said["agents"] = sorted({*said["agents"], *_now["agents"]})
    root = trainer.default_root_dir
    said["loggers"] = [os.path.realpath(run_directory(one, root)) if one.root_dir else None for one in trainer.loggers]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _now["fit"] not in said["fits"]:
            path.touch()
            by_the_disk = path.stat().st_mtime  # the clock that dates its checkpoints, too
            said["fits"][_now["fit"]] = _now["began"] if stopped else by_the_disk
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        unfinished.write_text(json.dumps(said, indent=1) + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        warn(f"{path} can't be written ({error}): if torchrun starts this run again, it begins anew.")


def _of_this_command() -> dict[str, Any]:
    """Return what a start of the same run has in common with the others."""
    return {"run": os.environ["TORCHELASTIC_RUN_ID"], "command": list(sys.argv)}


def _notes(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """Yield the notes of the runs in the directory where this one's would be, the newest first."""
    root = Path(trainer.default_root_dir)
    found = [root / NOTE]
    if trainer.loggers:
        runs = Path(runs_directory(trainer.loggers[0], trainer.default_root_dir))
        found = [*runs.glob(f"*/{NOTE}"), runs / NOTE]
    dated = {path: path.stat().st_mtime for path in found if path.exists()}
    for path in sorted(dated, key=lambda path: dated[path], reverse=True):
        if (said := _read(path)) is not None:
            yield {**said, "directory": str(path.parent)}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    keys = ("run", "command", "agents", "fits", "loggers")
    return said if isinstance(said, dict) and all(key in said for key in keys) else None


def _is_of_this_command(said: dict[str, Any]) -> bool:
    return all(said[key] == value for key, value in _of_this_command().items()) and _has_part(said)


def _has_part(said: dict[str, Any]) -> bool:
    if not set(said["agents"]).isdisjoint(_now["agents"]):
        return True
    # behind a script that torchrun starts the parent is another one each time; "none" is every run's name without one
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and said["run"] != "none"


def _is_of_this_run(said: dict[str, Any]) -> bool:
    return _now["fit"] in said["fits"] and _is_of_this_command(said)


# ---------------------------------------------------------------- its checkpoints
def _newest(trainer: Trainer, said: dict[str, Any]) -> str | PathLike[str] | None:
    """Return the newest good checkpoint that a run has written, None when it has written none."""
    since = said["fits"][_now["fit"]]
    until = min((began for began in said["fits"].values() if began > since), default=math.inf)

    def is_its_own(path: str) -> bool:
        if store.is_remote(path):
            return bool(store.head(path).state.get("run_dirs") == said["loggers"])
        return bool(since <= os.stat(path).st_mtime < until)

    named = [getattr(callback, "ckpt_path", None) for callback in trainer.checkpoint_callbacks]
    given = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    files = [str(path) for path in named if path and os.path.exists(path) and is_its_own(str(path))]
    folders = [folder or os.path.join(said["directory"], "checkpoints") for folder in given]
    newest = store.newest(*dict.fromkeys(map(store.local, folders)), only=is_its_own)
    return max([*files, *([newest] if newest is not None else [])], key=store.step_of, default=None)
