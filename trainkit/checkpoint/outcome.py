"""What a ModelCheckpoint's decision leads to: which files, what is known of them afterwards, and the words for it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trainkit.checkpoint import policy, saving, store
from trainkit.checkpoint.io import is_own
from trainkit.checkpoint.ledger import Decision, Files, Outcome, Written, described, newest_of
from trainkit.checkpoint.policy import Saved

if TYPE_CHECKING:
    from trainkit.checkpoint.snapshot import Snapshot
    from trainkit.trainer import Trainer


class Keeper(Protocol):
    """A ModelCheckpoint, as those parts of it see it that lie below the callbacks."""

    CHECKPOINT_NAME_LAST: str
    monitor: str | None
    dirpath: str | None
    filename: str | None
    save_top_k: int
    save_last: Any
    train_time_interval: Any
    save_weights_only: bool
    enable_version_counter: bool
    verbose: bool
    failed_saves: int
    save_seconds: float | None
    best_k_models: dict[str, Tensor]
    best_model_score: Tensor | None
    last_model_path: str
    _files: Files
    _decision: Decision | None
    _written: Written | None
    _clock: float
    _in_flight: bool
    _snapshot: Snapshot | None
    _never_finite: frozenset[str]
    _resumed_from: str | None
    _named: str | None
    _warned: set[str]

    @property
    def state_key(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def on_save_error(self) -> str: ...
    def _outcome(self, decision: Decision) -> Outcome: ...
    def _best(self) -> policy.Keep: ...
    def _also(self) -> policy.Keep: ...
    def _set(self, attributes: dict[str, Any]) -> None: ...
    def _claimed_by_others(self, trainer: Trainer) -> set[str]: ...
    def _free_path(self, decision: Decision, template: str | None, taken: set[str], replaceable: set[str]) -> str: ...


FOLLOWED = (
    "current_score", "best_model_score", "best_model_path", "best_k_models", "kth_best_model_path", "kth_value",
    "last_model_path", "failed_saves", "_files", "_written", "_missed", "_waiting",
)  # fmt: skip
"""What the processes that do not write learn from the one that does."""


def elapsed(callback: Keeper, trainer: Trainer, own: float) -> float:
    """Return the seconds since the last save by time; where several processes agree on it, none or more than any.

    Args:
        callback: who saves.
        trainer: of the run.
        own: the seconds by this process's clock.
    """
    if trainer.agreement is None or callback.train_time_interval is None:
        return own
    return math.inf if trainer.agreement.due(callback.state_key) else 0.0


def overdue(callback: Keeper) -> bool:
    """Whether this process's clock says that it is time to save."""
    return time.monotonic() - callback._clock >= float(callback.train_time_interval.total_seconds())


def seen(callback: Keeper) -> dict[str, Any]:
    """Return how the process that writes sees a callback's files."""
    return {name: getattr(callback, name) for name in FOLLOWED}


def follow(callback: Keeper, seen: dict[str, Any]) -> None:
    """Take over how rank 0 sees them."""
    vars(callback).update(seen)


def outcome_of(callback: Keeper, decision: Decision) -> Outcome:
    """Return the files that a decision leads to, and what follows from them."""
    trainer, files, overwrite = decision.trainer, callback._files, not callback.enable_version_counter
    finite = saving.is_finite(trainer, callback._never_finite)
    outcome = Outcome(trainer.global_step, finite)
    others = callback._claimed_by_others(trainer)
    if decision.ranked or decision.listed:
        score = None if decision.score is None else float(decision.score)
        new = Saved("", score, outcome.step, finite, decision.ranked)
        plan = policy.plan(there(callback, trainer), new, callback._best(), callback._also())
        if plan.write:
            going = {saved.path for saved in plan.remove}
            outcome.path = path = callback._free_path(decision, callback.filename, others, going)
            outcome.replaces |= {path} if overwrite or path in going else set()
            outcome.kept = tuple(saved if saved.path else saved._replace(path=path) for saved in plan.kept)
            outcome.attributes = attributes_of(callback, outcome.kept, path, decision.score)
            outcome.remove = sorted(going - {path})
    if decision.last and not finite and files.last and files.last_finite:
        outcome.held = True
    elif decision.last:
        before = callback.last_model_path
        taken = others | ({outcome.path} if outcome.path else set())
        outcome.last = callback._free_path(decision, callback.CHECKPOINT_NAME_LAST, taken, {before})
        outcome.replaces |= {outcome.last} if overwrite or outcome.last == before else set()
        kept = files.kept if outcome.kept is None else outcome.kept
        if before and before != outcome.last and before not in {outcome.path, *(one.path for one in kept)}:
            outcome.remove_last.append(before)
    return outcome


def attributes_of(callback: Keeper, kept: tuple[Saved, ...], path: str, score: Tensor | None) -> dict[str, Any]:
    """Return the callback's attributes that follow from the files kept, of which the one at `path` is new."""
    if callback.monitor is None:
        return {"best_model_path": newest_of(kept)} if callback.save_top_k else {}
    best, k, mode = [one for one in kept if one.best], callback.save_top_k, callback.mode
    if score is None or not any(one.path == path for one in best):
        return described(best, callback.best_k_models, k, mode)
    worst = math.inf if mode == "min" else -math.inf
    current = torch.nan_to_num(score, worst, math.inf, -math.inf)
    return {"current_score": current, **described(best, {**callback.best_k_models, path: score}, k, mode)}


def there(callback: Keeper, trainer: Trainer) -> list[Saved]:
    """Return the files kept that are still there: one that somebody removed must not keep a new one out."""
    if not is_own(trainer.checkpoint_io) or store.is_remote(callback.dirpath or ""):
        return callback._files.kept
    return [one for one in callback._files.kept if store.exists(one.path)]


def task_of(callback: Keeper, decision: Decision, outcome: Outcome, written: Written | None) -> saving.Task:
    """Return which files are written, and which are second names of one that is there."""
    weights_only = callback.save_weights_only
    task = saving.Task(outcome.path, outcome.last, frozenset(outcome.replaces), weights_only)
    source, whole = outcome.path, not weights_only
    if source is None and written is not None:
        source, whole = written.path, written.resumable
    if source is None or (decision.resumable and not whole):
        task.last_weights_only = weights_only and not decision.resumable
    elif source != outcome.last and not is_own(decision.trainer.checkpoint_io):
        task.last_weights_only = weights_only  # who knows what lies under a path of its
    else:
        task.last_is, task.symbolic = source, callback.save_last == "link"
    return task
