"""Lightning's way to write down where a run is: its "loops" from trainkit's Progress, and back.

So a run begun with Lightning goes on here, and code that looks into a checkpoint finds what it looks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainkit.errors import CheckpointError

VERSION = "2.6.6"
"""The version of Lightning whose keys a checkpoint has."""


def is_foreign(checkpoint: Mapping[str, Any]) -> bool:
    """Whether Lightning wrote it."""
    return "pytorch-lightning_version" in checkpoint and "progress" not in checkpoint


def parts_of(checkpoint: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Return those parts of a run that a file of Lightning's has, under trainkit's names.

    It has no random state, no order of the data and no half-finished epoch's metrics: these begin anew.

    Raises:
        CheckpointError: it does not say where the run was.
    """
    parts = {key: checkpoint[key] for key in ("optimizer_states", "lr_schedulers") if key in checkpoint}
    if "MixedPrecision" in checkpoint:
        parts["precision"] = checkpoint["MixedPrecision"]
    return {**parts, "progress": progress_of(checkpoint, path)}


def progress_of(checkpoint: Mapping[str, Any], path: object) -> dict[str, int]:
    """Return where a run of Lightning's was, as `Progress` has it.

    Raises:
        CheckpointError: it does not say.
    """
    try:
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        inside = epochs["processed"] < epochs["ready"]  # the epoch that was begun is not over
        return {
            "epoch": int(epochs["processed"]),
            "batch": int(batches["current"]["processed"]) if inside else 0,
            "step": _updates(checkpoint, loop),
            "total_batch": int(batches["total"]["processed"]),
        }
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say how far its run was ({error} is missing), so it can't be resumed. Start a new run "
            "from its weights: load_from_checkpoint."
        ) from None


def _updates(checkpoint: Mapping[str, Any], loop: Mapping[str, Any]) -> int:
    """Return how many batches updated the weights; Lightning counts the updates of each optimizer."""
    if len(checkpoint.get("optimizer_states", ())) < 2:
        return int(checkpoint["global_step"])
    current = loop["epoch_loop.batch_progress"]["current"]
    return int(loop["epoch_loop.state_dict"]["_batches_that_stepped"] + (current["processed"] > current["completed"]))


def loops_of(progress: Mapping[str, int], num_batches: float, num_optimizers: int, fitting: bool) -> dict[str, Any]:
    """Return where a run is, as Lightning writes it down.

    Args:
        progress: the state of `Progress`.
        num_batches: how many batches an epoch has.
        num_optimizers: how many optimizers step at an update.
        fitting: whether fit is running; while it saves at an epoch's end, Lightning has not completed that epoch yet.
    """
    inside = progress["batch"] > 0
    epochs, batch = progress["epoch"], progress["batch"]
    in_epoch = batch if inside or not epochs or num_batches == float("inf") else int(num_batches)
    completed = epochs - (fitting and not inside and epochs > 0)
    counted = {"ready": epochs + inside, "started": epochs + inside, "processed": epochs, "completed": completed}
    updates = progress["step"] * max(num_optimizers, 1)
    fit = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": progress["window"]},
        "epoch_loop.batch_progress": {
            "total": _counts(progress["total_batch"]),
            "current": _counts(in_epoch),
            "is_last_batch": in_epoch == num_batches,
        },
        "epoch_loop.scheduler_progress": {"total": _done(0), "current": _done(0)},
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": {"total": _done(updates), "current": _done(0)},
                "zero_grad": {"total": {**_done(updates), "started": updates}, "current": {**_done(0), "started": 0}},
            }
        },
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": {"total": _done(0), "current": _done(0)},
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": _idle(),
        "epoch_progress": {"total": counted, "current": dict(counted)},
    }
    others = {f"{name}_loop": {"state_dict": {}, "batch_progress": _idle()} for name in ("validate", "test")}
    predict = {"state_dict": {}, "batch_progress": {"total": _counts(0), "current": _counts(0)}}
    return {"fit_loop": fit, **others, "predict_loop": predict}


def _done(count: int) -> dict[str, int]:
    return {"ready": count, "completed": count}


def _counts(count: int) -> dict[str, int]:
    return {"ready": count, "started": count, "processed": count, "completed": count}


def _idle() -> dict[str, Any]:
    return {"total": _counts(0), "current": _counts(0), "is_last_batch": False}
