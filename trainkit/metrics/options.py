"""In which hooks may be logged, what the options of `log` are by default there, and which of them can't work."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainkit.errors import MisconfigurationException

TRAIN_BATCH = "training_step"
TRAIN_BATCH_HOOKS = frozenset({
    TRAIN_BATCH, "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "optimizer_zero_grad",
    "on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step",
    "configure_gradient_clipping", "clip_gradients",
})  # fmt: skip
"""Here on_step is the default, and both options are possible."""

EVALUATION_BATCH_HOOKS = frozenset(
    f"{prefix}{stage}{suffix}"
    for stage in ("validation", "test")
    for prefix, suffix in (("", "_step"), ("on_", "_batch_start"), ("on_", "_batch_end"))
)
"""Here on_epoch is the default, and both options are possible."""

BATCH_HOOKS = TRAIN_BATCH_HOOKS | EVALUATION_BATCH_HOOKS

EPOCH_HOOKS = frozenset(
    f"on_{stage}{event}"
    for stage in ("train", "validation", "test")
    for event in ("_start", "_epoch_start", "_epoch_end")
)
"""Here there is no step: what is logged belongs to the epoch."""

NO_LOGGING = {
    "prepare_data": "the run has not begun",
    "setup": "the run has not begun",
    "teardown": "the run is over",
    "outside": "no run is going on",
    "configure_model": "the run has not begun",
    "configure_optimizers": "the run has not begun",
    "configure_callbacks": "the run has not begun",
    "on_fit_start": "the run has not begun",
    "on_fit_end": "the run is over",
    "on_sanity_check_start": "a sanity check logs nothing",
    "on_sanity_check_end": "a sanity check logs nothing",
    "on_train_end": "the last epoch's metrics are out already; use on_train_epoch_end",
    "on_validation_end": "the validation's metrics are out already; use on_validation_epoch_end",
    "on_test_end": "the test's metrics are out already; use on_test_epoch_end",
    "on_predict_start": "predict logs nothing",
    "on_predict_epoch_start": "predict logs nothing",
    "on_predict_batch_start": "predict logs nothing",
    "on_predict_batch_end": "predict logs nothing",
    "on_predict_epoch_end": "predict logs nothing",
    "on_predict_end": "predict logs nothing",
    "predict_step": "predict logs nothing",
    "on_before_batch_transfer": "there is no batch yet; use on_train_batch_start or the step",
    "transfer_batch_to_device": "there is no batch yet; use on_train_batch_start or the step",
    "on_after_batch_transfer": "there is no batch yet; use on_train_batch_start or the step",
    "lr_scheduler_step": "the batch is over; use on_train_batch_end or on_train_epoch_end",
    "on_save_checkpoint": "a checkpoint is being written",
    "on_load_checkpoint": "a checkpoint is being read",
    "on_save_point": "a checkpoint is being written",
    "on_exception": "the run has failed",
}
"""Here nothing can be logged, and why; the same goes for any hook that is in none of these lists."""

REDUCTIONS = ("mean", "sum", "min", "max")


class Options(NamedTuple):
    """What a name is logged with, the defaults of its hook filled in."""

    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduce: str
    enable_graph: bool
    add_dataloader_idx: bool
    metric_attribute: str | None
    rank_zero_only: bool
    sync_dist: bool


class Given(NamedTuple):
    """The options as the user gave them, in the order in which `log` compares them."""

    prog_bar: bool
    logger: bool | None
    on_step: bool | None
    on_epoch: bool | None
    reduce_fx: Any
    enable_graph: bool
    sync_dist: bool
    sync_dist_group: Any
    add_dataloader_idx: bool
    metric_attribute: str | None
    rank_zero_only: bool


def check_hook(name: object, hook: str) -> None:
    """Refuse to log where nothing can be logged.

    Raises:
        MisconfigurationException: it says why not, and where else.
    """
    if hook in BATCH_HOOKS or hook in EPOCH_HOOKS:
        return
    where = f"in {hook}" if hook != "outside" else "after the run"
    raise MisconfigurationException(
        f"self.log({name!r}, ...) can't be used {where}: {NO_LOGGING.get(hook, 'it is no place to measure')}."
    )


def resolve(name: str, hook: str, given: Given) -> Options:
    """Return the options with the hook's defaults in place of None.

    Raises:
        MisconfigurationException: they can't work in this hook.
    """
    on_step = hook in TRAIN_BATCH_HOOKS if given.on_step is None else bool(given.on_step)
    on_epoch = hook not in TRAIN_BATCH_HOOKS if given.on_epoch is None else bool(given.on_epoch)
    if hook in EPOCH_HOOKS and on_step:
        raise MisconfigurationException(
            f"self.log({name!r}, ..., on_step=True) can't be used in {hook}: there is no step there. Leave on_step out."
        )
    if not on_step and not on_epoch:
        raise MisconfigurationException(
            f"self.log({name!r}, ..., on_step=False, on_epoch=False) logs nothing. Set one of them to True."
        )
    if given.add_dataloader_idx and "/dataloader_idx_" in name:
        raise MisconfigurationException(
            f"self.log({name!r}, ...): the suffix /dataloader_idx_N is added by itself when there are several "
            "loaders; leave it out, or turn it off with add_dataloader_idx=False."
        )
    return Options(
        bool(given.prog_bar),
        given.logger is None or bool(given.logger),
        on_step,
        on_epoch,
        _reduction(name, given.reduce_fx),
        bool(given.enable_graph),
        bool(given.add_dataloader_idx),
        given.metric_attribute,
        bool(given.rank_zero_only),
        bool(given.sync_dist),
    )


def _reduction(name: str, reduce_fx: Any) -> str:
    """Return "mean", "sum", "min" or "max": by name, or by a function of that name."""
    called = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
    reduce = {"avg": "mean", "amin": "min", "amax": "max"}.get(called.lower(), called.lower())
    if reduce not in REDUCTIONS:
        raise MisconfigurationException(
            f"self.log({name!r}, ..., reduce_fx={reduce_fx!r}): only {', '.join(REDUCTIONS)} are possible. "
            "Reduce the values yourself in an epoch_end hook and log the result, or log a torchmetrics metric."
        )
    return reduce
