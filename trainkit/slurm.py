"""Jobs of SLURM: one that is told of its end is queued again, and goes on from its checkpoint when it starts again.

    #SBATCH --signal=USR1@90        a notice 90 seconds before the time is up
    srun python train.py            saves, calls `scontrol requeue`, and is started again with the same command

Interactive jobs (salloc, `srun --pty bash`) are left alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.checkpoint import store
from trainkit.errors import CheckpointError
from trainkit.resume_hint import checkpoints_of
from trainkit.signals import NOTICES, Preempted

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

PATIENCE = 60.0  # seconds that scontrol may take


def is_job() -> bool:
    """Whether this process is a job of SLURM that can be started again, which an interactive one can't."""
    return bool(os.environ.get("SLURM_JOB_ID")) and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def job_id() -> str:
    """Return what scontrol calls this job; the task of an array has its own number."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


@contextmanager
def queued_again(trainer: Trainer) -> Iterator[None]:
    """Queue the job again when SIGUSR1 or SIGUSR2 ended the run inside, after everything is saved and closed."""
    try:
        yield
    except Preempted as left:
        if trainer.interruption.signal not in NOTICES or not is_job() or not trainer.is_global_zero:
            raise
        note_checkpoint(trainer)
        problem = requeue()
        print(f"SLURM job {job_id()} {problem or 'is queued again'}", file=sys.stderr, flush=True)
        raise Preempted(left.code if problem else 0) from None


def requeue() -> str:
    """Ask SLURM to start this job again; return what went wrong, "" when nothing did."""
    try:
        done = subprocess.run(["scontrol", "requeue", job_id()], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"could not be queued again: {error}"
    if done.returncode:
        return f"could not be queued again: scontrol ended with {done.returncode}: {done.stderr.strip()}"
    return ""


def save_if_nobody_does(trainer: Trainer) -> None:
    """Save at the end of a run that has no callback for it, so that the job goes on where it was."""
    here = trainer.interruption.signal in NOTICES and is_job() and trainer.progress.total_batch > 0
    if here and not trainer.checkpoint_callbacks and not trainer.fast_dev_run:
        trainer.save_checkpoint(_own_checkpoint(trainer))


def _own_checkpoint(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / f"slurm-{job_id()}.ckpt"


def _note(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / f"slurm-{job_id()}.json"


def note_checkpoint(trainer: Trainer) -> None:
    """Write down which checkpoint the job goes on from when it starts again."""
    own = _own_checkpoint(trainer)
    newest = str(own) if own.exists() else checkpoints_of(trainer)[1]
    if newest:
        note = _note(trainer)
        unfinished = note.with_name(f"{note.name}.{os.getpid()}.unfinished")
        unfinished.write_text(json.dumps({"checkpoint": os.path.abspath(newest)}) + "\n")
        os.replace(unfinished, note)


def noted_checkpoint(trainer: Trainer) -> str | None:
    """Return the checkpoint that a job that was started again goes on from; None when it is its first start."""
    if not is_job() or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    try:
        path = Path(json.loads(_note(trainer).read_text())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if path.parent.name == "checkpoints":  # of one run: what came after it is newer
        try:
            path = Path(store.newest(path.parent) or path)
        except CheckpointError:  # none of them can be read
            return str(path)
    return str(path) if path.exists() else None
