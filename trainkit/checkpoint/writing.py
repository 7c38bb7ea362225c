"""Writing what a ModelCheckpoint decided: write, then remember, then remove, and what is told of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from trainkit.checkpoint import saving, store
from trainkit.checkpoint.format import check_plain
from trainkit.checkpoint.io import is_own
from trainkit.checkpoint.ledger import Decision, Outcome, Written, newest_of
from trainkit.checkpoint.outcome import Keeper, follow, seen, task_of
from trainkit.checkpoint.snapshot import Snapshot
from trainkit.errors import CheckpointExistsError, warn

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


def save(callback: Keeper, decision: Decision, in_background: bool = False) -> None:
    """Write, then remember, then remove: in this order nothing good is lost when the process dies.

    Of several processes rank 0 does so, with what all of them have; the others learn what has become of it.
    """
    trainer = decision.trainer
    if trainer.strategy.sharded:
        from trainkit.checkpoint import jointly

        jointly.save_decided(callback, decision, in_background)
        return
    if trainer.world_size == 1:
        trainer.background.settle()
        save_here(callback, decision, in_background)
        return
    saving.gather(trainer)
    if not trainer.is_global_zero:
        saving.contents(trainer, callback.save_weights_only)  # hooks are called on all processes

    def on_rank_zero() -> Any:
        trainer.background.settle()
        save_here(callback, decision, in_background)
        return seen(callback)

    there = trainer.strategy.on_rank_zero("saving a checkpoint", on_rank_zero)
    if not trainer.is_global_zero:
        follow(callback, there)


def save_here(callback: Keeper, decision: Decision, in_background: bool) -> None:
    """Save in this process."""
    trainer, plan = decision.trainer, planned(callback, decision)
    if plan is None:
        return
    done = partial(settled, callback, decision, plan)
    if not in_background:
        link = saving.make if trainer.is_global_zero else None
        done(saving.run(plan.task, partial(_save_as, trainer), link), None)
        return
    try:
        work = copied(callback, trainer, plan.task)
    except Exception as error:
        done(saving.Result(error=error), None)
    else:
        callback._in_flight = True
        trainer.background.submit(work, done)


class Plan(NamedTuple):
    """What is written, and from where in a run."""

    outcome: Outcome
    here: tuple[int, int, int]
    task: saving.Task


def planned(callback: Keeper, decision: Decision) -> Plan | None:
    """Return which files a decision leads to, None when there is none."""
    trainer = decision.trainer
    here = (trainer.progress.epoch, trainer.progress.batch, trainer.progress.step)
    written = callback._written if callback._written is not None and callback._written.where == here else None
    if written is not None and written.ranked and (decision.ranked or decision.listed):
        decision.ranked = decision.listed = False  # what is kept was decided here already
        decision.outcome = None
    outcome = callback._outcome(decision)
    tell_not_finite(callback, decision, outcome)
    if outcome.path is None and outcome.last is None:
        return None
    return Plan(outcome, here, task_of(callback, decision, outcome, written))


def copied(
    callback: Keeper, trainer: Trainer, task: saving.Task, state: dict[str, Any] | None = None
) -> Callable[[], saving.Result]:
    """Copy the state of this moment; return what writes it, while training goes on."""
    if state is None:
        state = saving.contents(trainer, callback.save_weights_only)
    if is_own(trainer.checkpoint_io):
        state = check_plain(state)  # a mistake is told here and now
    callback._snapshot = snapshot = callback._snapshot or Snapshot()
    copy = snapshot.take(state)

    def save_as(path: str, weights_only: bool, overwrite: bool) -> None:
        snapshot.wait()
        saving.write(trainer.checkpoint_io, copy, path, overwrite=overwrite)

    return partial(saving.run, task, save_as, saving.make if trainer.is_global_zero else None)


def settled(
    callback: Keeper,
    decision: Decision,
    plan: Plan,
    result: saving.Result | None,
    error: BaseException | None,
) -> None:
    """Take note of what is on the disk, tell others, and remove what it replaces."""
    outcome, here, task = plan
    callback._in_flight = False
    if callback._decision is decision:
        callback._decision = None
    if result is None:
        raise error or AssertionError
    callback.save_seconds = result.seconds
    decision.trainer.interruption.saved_in(result.seconds)
    if result.path and outcome.path is not None:
        callback._files.wrote_path(outcome)
        callback._set(outcome.attributes)
        callback._written = Written(here, outcome.path, True, not callback.save_weights_only)
    if result.last and outcome.last is not None:
        callback._files.wrote_last(outcome)
        callback.last_model_path = outcome.last
        if task.last_is is None and not (result.path and task.last_weights_only):
            ranked = decision.ranked or decision.listed
            callback._written = Written(here, outcome.last, ranked, not task.last_weights_only)
    if result.path or result.last:
        tidy(callback, decision.trainer)
        for logger in decision.trainer.loggers:
            logger.after_save_checkpoint(callback)
        if callback.verbose and decision.trainer.is_global_zero:
            decision.trainer.print(report(callback, decision, outcome))
    taken = isinstance(result.error, CheckpointExistsError) and not decision.trainer.strategy.sharded
    if taken and has_another_name(callback, decision, outcome, result):
        save_here(callback, decision, False)
    elif result.error is not None:
        failed(callback, decision, outcome, result, result.error)


def has_another_name(callback: Keeper, decision: Decision, outcome: Outcome, result: saving.Result) -> bool:
    """Whether there is a version for what has lost its name to another run since it was chosen."""
    if result.path:  # it has its name
        decision.ranked = decision.listed = False
    decision.outcome = None
    again = callback._outcome(decision)
    return (again.path, again.last) != (None if result.path else outcome.path, outcome.last)


def failed(callback: Keeper, decision: Decision, outcome: Outcome, result: saving.Result, error: Exception) -> None:
    """Count a save that failed, and tell it, or end the run."""
    if not saving.is_storage_failure(error):
        raise error  # a mistake in what was to be saved, not in where
    callback.failed_saves += 1
    if callback.on_save_error == "stop":
        raise error
    warn(failure(callback, decision, outcome, result))


def tidy(callback: Keeper, trainer: Trainer) -> None:
    """Remove what is not kept any more; what can't be removed now, the next time."""
    files = callback._files
    doomed, files.doomed = files.doomed, []
    if not doomed or not trainer.is_global_zero:
        return
    local = is_own(trainer.checkpoint_io) and not store.is_remote(callback.dirpath or "")
    staying = [one.path for one in files.kept] + [files.last]
    if local and not any(path and os.path.exists(path) for path in staying):
        files.doomed = doomed  # somebody removed what was to stay
        return
    # one that a symbolic `last` leads to goes when that leads elsewhere
    needed = {os.path.realpath(files.last)} if local and os.path.islink(files.last) else set()
    needed |= callback._claimed_by_others(trainer)
    for path in doomed:
        if path in needed:
            files.doomed.append(path)
        elif not _same(path, callback._named):  # which somebody named, and may want again
            trainer.checkpoint_io.remove_checkpoint(path)
            if local and os.path.lexists(path):
                files.doomed.append(path)


def _same(path: str, other: str | None) -> bool:
    """Whether two paths are one name in one directory; a link is not what it leads to."""
    folder, name = os.path.split(os.path.abspath(other or ""))
    return bool(other) and os.path.basename(path) == name and os.path.dirname(path) == os.path.realpath(folder)


def _save_as(trainer: Trainer, path: str, weights_only: bool, overwrite: bool) -> None:
    if trainer.world_size > 1:  # the others wait already
        saving.save_here(trainer, path, weights_only, None, overwrite)
    elif overwrite:
        trainer.save_checkpoint(path, weights_only)
    else:
        trainer.save_checkpoint(path, weights_only, overwrite=False)


# ---------------------------------------------------------------------- words
def report(callback: Keeper, decision: Decision, outcome: Outcome) -> str:
    """Say what was saved."""
    value = "" if decision.score is None else f", {callback.monitor} = {float(decision.score):.6g}"
    best = "" if callback.best_model_score is None else f" (best {float(callback.best_model_score):.6g})"
    paths = " and ".join(path for path in (outcome.path, outcome.last) if path is not None)
    return f"ModelCheckpoint: epoch {decision.epoch}, step {outcome.step}{value}{best}: saved {paths}"


def failure(callback: Keeper, decision: Decision, outcome: Outcome, result: saving.Result) -> str:
    """Say what was not saved, why, and what there is."""
    what = f"{os.path.basename(outcome.last or '')} was not" if result.path else "nothing was"
    then = "Training goes on, and the next save tries again."
    if decision.trainer.interrupted:
        then = "A resumed run goes on from an earlier step."
    return (
        f"ModelCheckpoint: {what} saved at step {outcome.step} ({saves(callback.failed_saves)} failed so far): "
        f"{result.error} {then} {newest_known(callback)}"
    )


def newest_known(callback: Keeper) -> str:
    """Say which checkpoint is the newest that the callback knows of."""
    written = callback._written.path if callback._written is not None else ""
    path = written or newest_of(callback._files.kept) or callback.last_model_path
    return f"The newest checkpoint is {path}." if path else "There is no checkpoint yet."


def saves(number: int) -> str:
    """Return "1 save", "2 saves"."""
    return "1 save" if number == 1 else f"{number} saves"


def tell_not_finite(callback: Keeper, decision: Decision, outcome: Outcome) -> None:
    """Warn of weights that are not numbers, once a run, and when a signal ends it and nothing is saved for them."""
    ends_unsaved = outcome.held and decision.trainer.interrupted
    if outcome.finite or ("not finite" in callback._warned and not ends_unsaved):
        return
    callback._warned.add("not finite")
    names = saving.not_finite(saving.floating_state(decision.trainer.module, callback._never_finite))
    where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    held = f" {callback.last_model_path} stays as it is." if outcome.held else ""
    warn(
        f"ModelCheckpoint: after step {outcome.step} the weights are not finite ({where}). The last checkpoint whose "
        f"weights are is kept until there is another one.{held}"
    )
