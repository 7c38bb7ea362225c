"""Saves that all processes take part in, because each has only a part of the weights.

A strategy says what becomes of them. With `sharded_checkpoints` each process writes its part into a directory, at the
same time, here or in the background. Without, the parts are gathered and rank 0 writes one file. Rank 0 alone decides
what is written under which name: it knows the files that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from trainkit.checkpoint import disk, manifest, saving, sharded_load, sharded_save, store, writing
from trainkit.checkpoint.finite import weights_are_finite
from trainkit.checkpoint.io import is_own
from trainkit.checkpoint.layout import whole
from trainkit.checkpoint.ledger import Decision
from trainkit.checkpoint.outcome import Keeper, follow, seen
from trainkit.checkpoint.snapshot import Snapshot
from trainkit.errors import CheckpointError, CheckpointExistsError

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

_made: tuple[Any, Any] | None = None


def save(trainer: Trainer, path: saving.StrPath, weights_only: bool, storage_options: Any, overwrite: bool) -> None:
    """Write a checkpoint of this moment: `Trainer.save_checkpoint`, which all processes call."""
    saving.gather(trainer)
    agree_on_finite(trainer, frozenset())
    state = saving.contents(trainer, weights_only)
    if is_directory(trainer, path) and storage_options is None:
        parts = taken_apart(trainer, state)
        sharded_save.write(store.named(path), parts, is_finite(trainer, state), group_of(trainer), overwrite)
        return
    state = whole(state)
    write = partial(saving.write, trainer.checkpoint_io, state, path, storage_options, overwrite)
    trainer.strategy.on_rank_zero(f"saving {path}", write)


def is_directory(trainer: Trainer, path: saving.StrPath) -> bool:
    """Whether a checkpoint is a directory; a store of fsspec's, or a CheckpointIO of the user's, gets one file."""
    own = is_own(trainer.checkpoint_io) and not store.is_remote(path)
    return own and trainer.strategy.sharded_checkpoints


# ---------------------------------------------------------------------- what a ModelCheckpoint has decided
def save_decided(callback: Keeper, decision: Decision, in_background: bool) -> None:
    """Write what was decided, then remember, then remove, in all processes."""
    trainer = decision.trainer
    together = is_directory(trainer, callback.dirpath or "")
    trainer.background.joint = together
    if together:
        trainer.background.settle()
    saving.gather(trainer)
    agree_on_finite(trainer, callback._never_finite)

    def plan() -> Any:
        trainer.background.settle()
        return writing.planned(callback, decision), decision.ranked, decision.listed, seen(callback)

    plan_, decision.ranked, decision.listed, there = trainer.strategy.on_rank_zero("choosing a checkpoint's name", plan)
    if not trainer.is_global_zero:
        follow(callback, there)
    if plan_ is None:
        return
    decision.outcome = plan_.outcome
    if together:
        _save_directory(callback, decision, plan_, in_background)
    else:
        _save_file(callback, decision, plan_, in_background)


def _save_directory(callback: Keeper, decision: Decision, plan: writing.Plan, in_background: bool) -> None:
    """Write in all processes; each of them takes note of what became of it."""
    trainer, task = decision.trainer, plan.task
    group = group_of(trainer)
    try:
        states = {only: saving.contents(trainer, only) for only in kinds_of(task)}
        finite = all(is_finite(trainer, state) for state in states.values())
        parts = {only: taken_apart(trainer, state) for only, state in states.items()}
    except CheckpointError as error:
        writing.settled(callback, decision, plan, saving.Result(error=error), None)
        return
    snapshot = None
    if in_background:
        callback._snapshot = snapshot = callback._snapshot or Snapshot()
        parts = copied(snapshot, parts)

    def save_as(path: str, weights_only: bool, overwrite: bool) -> None:
        if snapshot is not None:
            snapshot.wait()
        sharded_save.write(path, parts[weights_only], finite, group, overwrite)

    def link(make: Callable[[], None]) -> None:
        agreed(group, make if trainer.is_global_zero else None)

    work, done = partial(saving.run, task, save_as, link), partial(writing.settled, callback, decision, plan)
    if in_background:
        callback._in_flight = True
        trainer.background.submit(work, done)
    else:
        done(work(), None)


def _save_file(callback: Keeper, decision: Decision, plan: writing.Plan, in_background: bool) -> None:
    """Gather what each process has, and write on rank 0; the others learn what has become of it."""
    trainer, task = decision.trainer, plan.task
    states = {only: whole(saving.contents(trainer, only)) for only in kinds_of(task)}

    def save_as(path: str, weights_only: bool, overwrite: bool) -> None:
        saving.write(trainer.checkpoint_io, states[weights_only], path, overwrite=overwrite)

    def on_rank_zero() -> Any:
        done = partial(writing.settled, callback, decision, plan)
        if in_background and len(states) == 1:
            (state,) = states.values()
            work = writing.copied(callback, trainer, task, state)
            callback._in_flight = True
            trainer.background.submit(work, done)
        else:
            done(saving.run(task, save_as, saving.make), None)
        return seen(callback)

    there = trainer.strategy.on_rank_zero("saving a checkpoint", on_rank_zero)
    if not trainer.is_global_zero:
        follow(callback, there)


def kinds_of(task: saving.Task) -> list[bool]:
    """Return whether weights only, everything, or both are written."""
    wanted = {task.path_weights_only} if task.path is not None else set()
    if task.last is not None and task.last_is is None:
        wanted.add(task.last_weights_only)
    return sorted(wanted)


def copied(snapshot: Snapshot, parts: Mapping[bool, sharded_save.Parts]) -> dict[bool, sharded_save.Parts]:
    """Copy what is written, so that training can go on; the text is a copy already."""
    copies = snapshot.take({only: {"plain": part.plain, "local": part.local} for only, part in parts.items()})  # type: ignore[misc]
    return {
        only: sharded_save.Parts(part.text, copies[only]["plain"], part.spread, copies[only]["local"])  # type: ignore[index]
        for only, part in parts.items()
    }


# ---------------------------------------------------------------------- reading
def load(trainer: Trainer, path: saving.StrPath) -> dict[str, Any]:
    """Return what a directory holds, with spread tensors left in its files, all of which are verified.

    Raises:
        CheckpointError: it is damaged, in all processes.
    """
    rank, size = trainer.global_rank, trainer.world_size
    loaded: list[dict[str, Any]] = []

    def read() -> None:
        try:
            manifest.verify(path, lambda number: number % size == rank)
            loaded.append(sharded_load.load_lazily(path))
        except OSError as error:
            raise CheckpointError(f"{path} could not be read: {disk.reason(error, str(path))}") from error

    agreed(group_of(trainer), read)
    return loaded[0]


# ---------------------------------------------------------------------- what processes agree on
def taken_apart(trainer: Trainer, state: Mapping[str, Any]) -> sharded_save.Parts:
    """Return a state in the parts that this process writes; a mistake in it is an error in all processes."""
    parts: list[sharded_save.Parts] = []

    def take() -> None:
        parts.append(sharded_save.take_apart(state, trainer.is_global_zero))

    agreed(group_of(trainer), take)
    return parts[0]


def agree_on_finite(trainer: Trainer, but: frozenset[str]) -> None:
    """Find out whether the weights are numbers in all processes."""
    mine = not saving.not_finite(saving.floating_state(trainer.module, but))
    trainer.weights_finite = trainer.progress.step, all(trainer.strategy.gather_objects(mine))


def is_finite(trainer: Trainer, state: Mapping[str, Any]) -> bool:
    """Whether the weights of a checkpoint are, which may be an average of those of the module."""
    return all(trainer.strategy.gather_objects(weights_are_finite(state)))


def agreed(group: Any, function: Callable[[], None] | None) -> None:
    """Run a function in each process of a group; what fails in one is an error in all of them.

    Args:
        group: whose processes all call this.
        function: what this one runs, if anything.
    """
    problem: Exception | None = None
    try:
        if function is not None:
            function()
    except Exception as error:
        problem = error
    kind = next(
        (k for k in (CheckpointExistsError, CheckpointError, TypeError) if isinstance(problem, k)), RuntimeError
    )
    told = None if problem is None else (kind.__name__, str(problem))
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, told, group)
    if problem is not None:
        raise problem
    for rank, found in enumerate(problems):
        if found is not None:
            name, text = found
            raise _KINDS[name](f"{text} (rank {rank})")


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (CheckpointExistsError, CheckpointError, TypeError, RuntimeError)
}


def group_of(trainer: Trainer) -> Any:
    """Return a group of all processes whose messages go over the host and meet no others; made once."""
    global _made
    world = dist.group.WORLD
    if _made is None or _made[0] is not world:
        timeout = getattr(trainer.strategy, "timeout", None)
        _made = world, dist.new_group(backend="gloo", timeout=timeout)
    return _made[1]
