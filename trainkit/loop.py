"""The three loops: fit, evaluate, predict. Each is one function; every hook of a run fires here or in `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainkit.data.batches import EMPTY
from trainkit.data.sources import check_dataloader_idx
from trainkit.errors import MisconfigurationException, warn
from trainkit.evaluation_mode import evaluation_mode
from trainkit.hooks import nobody
from trainkit.metrics import TRAIN_BATCH
from trainkit.taking_part import accompanied
from trainkit.timing import FOLD
from trainkit.undo import CutShort, Undo

if TYPE_CHECKING:
    from trainkit.data.loader import Batches
    from trainkit.trainer import Trainer


def fit(trainer: Trainer) -> None:
    """Train until a limit is reached: zero_grad, forward, loss, backward, step, log.

    Counters advance before anybody hears of a finished batch, and ModelCheckpoint writes at save points only, where no
    gradient is pending: what is saved there needs no repair on resume. `metrics` is told where the run is, for `log`.
    """
    module, progress, sources, metrics = trainer.module, trainer.progress, trainer.sources, trainer.metrics
    hooks, optimizers, schedules, timing = trainer.hooks, trainer.optimizers, trainer.schedules, trainer.timing
    agreement = trainer.agreement  # None: a run in one process
    decided = trainer if agreement is None else agreement  # whose should_stop all processes know
    training_step = trainer.wrapped_step("training_step")  # in float32 on one device: the method itself
    told = agreement is not None and agreement.carried  # with the gradients, and not at log points
    transfer, update, automatic = trainer.transfer, trainer.update, module.automatic_optimization
    backward, zero_grad, clip = update.backward, update.zero_grad, update.clip  # None: nothing that is not here
    needs_grad, replay = not update.own_backward, update.replay(training_step, loss_of)
    step, guard, unscale, adapt = update.step, update.guard, update.unscale, update.adapt
    now, lap, log_every = timing.now, timing.lap, trainer.log_every_n_steps or FOLD  # clocks, read between the parts
    metrics.x = progress.window

    hooks.on_train_start()
    timing.begin()
    trainer.switches.begin(module, (trainer.checkpoint or {}).get("switched", {}))  # what is frozen from here on
    while not trainer.done:
        start, gradients, empty = progress.batch, False, False
        is_last = True  # until a batch says otherwise: a resumed epoch may have none left
        if start == 0:  # else: resumed inside this epoch
            sources.reload_if_due()
            hooks.on_train_epoch_start()
        if agreement is not None:
            trainer.strategy.epoch_starts()  # other parameters may learn than before
        metrics.start_batches(TRAIN_BATCH)
        batches = sources.epoch(sources.train, progress.epoch, start)
        if progress.validating:  # first the validation that a signal cut short
            trainer.batch_idx, metrics.x = start - 1, progress.window - 1
            is_last = validate(trainer, progress.validating == 2, window_ends=True) and trainer.is_last_batch
            if is_last or trainer.stopping:
                batches = iter(())
            else:
                hooks.on_save_point()

        validates, left = bool(sources.loaders.get("val")), now()
        for batch_idx, batch, is_last in batches:
            arrived = ready = now()
            trainer.batch_idx, trainer.is_last_batch = batch_idx, is_last
            empty = batch is EMPTY  # other processes have all of its samples: this one only averages gradients
            if empty:
                batch = None
            elif transfer is not None:
                batch = transfer(batch, 0)
                ready = now()
            if batch_idx == start:
                trainer.check_batch(batch)
            metrics.batch, metrics.x = batch, progress.window
            if hooks.on_train_batch_start(batch, batch_idx) == -1:  # the rest of the epoch is skipped
                if automatic:
                    schedules.move(schedules.by_epoch, progress.epoch + 1)
                is_last = True
                break

            # Clear the last window's gradients before this one's activations grow.
            accumulate = trainer.accumulate_grad_batches
            window_ends = is_last or (batch_idx + 1) % accumulate == 0
            if automatic and not gradients:
                for optimizer in optimizers:
                    hooks.on_before_zero_grad(optimizer)
                    zero_grad(progress.epoch, batch_idx, optimizer)

            # Forward, loss, backward. Processes average their gradients where a window ends.
            if agreement is not None:
                agreement.begin_batch(batch_idx, averages=window_ends and automatic)
            output = training_step(batch, batch_idx) if batch is not None else None  # None: nothing is left of it
            loss = loss_of(output, needs_grad) if automatic and not empty else None
            if loss is not None:  # None: the module skips this batch, or optimizes by itself
                if accumulate > 1:
                    loss = loss / accumulate
                if agreement is not None:
                    loss = agreement.weigh(loss)
                hooks.on_before_backward(loss)
                backward(loss)
                hooks.on_after_backward()
                gradients = True
                if replay is not None:
                    replay.remember(batch, batch_idx)
            if agreement is not None:
                gradients |= agreement.end_batch(loss, empty, training_step)
            computed = now()

            # Update the weights.
            stepped = trainer.take_manual_step() if not automatic else window_ends and gradients
            if automatic and stepped:
                moved = guard is None or guard.passes(optimizers)  # False: not finite, and nan_policy="skip"
                if replay is not None:
                    moved = moved and replay.update(loss, batch_idx)  # through a closure, for whom it must be so
                    replay.window.clear()
                elif moved:
                    for optimizer in optimizers:
                        if unscale is not None:
                            unscale(optimizer)
                        hooks.on_before_optimizer_step(optimizer)
                        if clip is not None:
                            clip(optimizer)
                        moved &= step(optimizer)  # False: float16 overflowed and the weights were held
                if adapt is not None:
                    adapt()
                gradients = False
                if moved and schedules.by_step:
                    schedules.move(schedules.by_step, progress.step + 1)
            updated = now()

            # Count, then tell, log and validate: from here on the counters speak of finished things only.
            progress.batch += 1
            progress.total_batch += 1
            progress.window += window_ends
            progress.step += stepped  # a held float16 update counts, too, as in Lightning
            if is_last and automatic:
                schedules.move(schedules.by_epoch, progress.epoch + 1)
            if agreement is not None and told and window_ends:
                agreement.step()  # from here on all processes know what each of them wants
            if hooks.on_train_batch_end is not nobody:
                hooks.on_train_batch_end(outputs_of(output, loss), batch, batch_idx)
            if window_ends and (progress.window % log_every == 0 or decided.should_stop):
                trainer.log_point()
                if agreement is not None and not told:
                    agreement.now()
            lap((left, arrived, ready, computed, updated, now()))
            if validates and trainer.validation_due(is_last) and not validate(trainer, is_last, window_ends):
                is_last = False  # a signal cut it short: the epoch is left open
                break
            if stepped and automatic and schedules.plateau_by_step:
                schedules.move(schedules.plateau_by_step, progress.step)

            # Stop or save, but only between accumulation windows.
            if is_last or (window_ends and trainer.stopping):
                break
            if window_ends:
                hooks.on_save_point()
            batch = output = loss = metrics.batch = None  # freed before the next batch is needed
            left = now()

        # A limit inside an epoch ends it early; a signal leaves it open.
        if is_last or (trainer.at_limit and not progress.validating):
            metrics.end_batches(empty and progress.batch == 1)
            trainer.strategy.be_patient()  # what an epoch's end does, one process may do alone
            metrics.x = max(progress.window - 1, 0)  # that of the epoch's last row
            hooks.on_train_epoch_end()
            if is_last and automatic:
                schedules.move(schedules.plateau_by_epoch, progress.epoch + 1)
            trainer.log_metrics(metrics.end_epoch(whole=is_last))
            metrics.x = progress.window
        if is_last:
            progress.epoch, progress.batch = progress.epoch + 1, 0
        if agreement is not None:
            agreement.now()
        hooks.on_save_point()
        trainer.leave_if_interrupted()
    if trainer.interrupted:  # since the last save point
        hooks.on_save_point()
        trainer.leave_if_interrupted()
    timing.end()
    hooks.on_train_end()


def validate(trainer: Trainer, is_last: bool, window_ends: bool) -> bool:
    """Validate after a training batch; False when a signal cut that short and the resumed run begins with it."""
    metrics, progress, alone = trainer.metrics, trainer.progress, trainer.agreement is None
    began = perf_counter() - trainer.timing.logging
    may_be_cut = window_ends and not trainer.schedules.plateau_by_step  # else there is no save point before its end
    progress.validating = 0
    if may_be_cut and trainer.signal is not None:
        progress.validating = 1 + is_last
        return False
    if window_ends:
        metrics.hook = "on_validation_model_zero_grad"
        trainer.module.on_validation_model_zero_grad()
    undo = Undo(trainer) if may_be_cut and alone else None
    try:
        evaluate(trainer, "validation", trainer.sources.validation(), undo)
    except CutShort as cut:
        progress.validating = 1 + is_last
        cut.undo.take_back()
    if trainer.agreement is not None:
        trainer.agreement.now()
    metrics.leave_evaluation(TRAIN_BATCH)
    trainer.is_last_batch = is_last
    trainer.timing.validation += perf_counter() - trainer.timing.logging - began  # without the rows that it wrote
    return not progress.validating


def evaluate(trainer: Trainer, stage: str, loaders: list[Batches], undo: Undo | None = None) -> list[dict[str, float]]:
    """Run "validation" or "test" over every loader in turn and return what was logged, a dict for each loader.

    Loaders that are drawn from at once are one here. Without a batch nothing runs.

    Args:
        trainer: whose.
        stage: which.
        loaders: the batches.
        undo: takes everything back when a signal cuts this short; None: it goes on to its end.

    Raises:
        CutShort: a signal came, and it is as if nothing had happened.
    """
    if not any(loader.num_batches or loader.elsewhere for loader in loaders):
        return []
    check_dataloader_idx(trainer.module, stage, several=len(loaders) > 1)
    hooks, metrics, transfer = trainer.hooks.evaluation(stage, len(loaders)), trainer.metrics, trainer.transfer
    step_name = f"{stage}_step"
    step, interruption = trainer.wrapped_step(step_name, len(loaders)), trainer.interruption
    table = metrics.begin(stage, len(loaders))

    with evaluation_mode(trainer, stage):
        hooks.start()
        hooks.epoch_start()
        for dataloader_idx, loader in enumerate(loaders):
            evaluated, batch_idx = metrics.begin_loader(dataloader_idx, step_name), -1
            batches = trainer.sources.epoch(loader, trainer.progress.epoch)
            if trainer.strategy.sharded:  # all take part in each step, also those whose batches are over
                batches = accompanied(trainer, loader, batches, step, dataloader_idx)
            for batch_idx, batch, is_last in batches:
                if undo is not None and interruption.signal is not None and undo.possible():
                    raise CutShort(undo)
                trainer.is_last_batch, trainer.evaluation_idx = is_last, batch_idx
                if transfer is not None:
                    batch = transfer(batch, dataloader_idx)
                if batch_idx == 0:
                    trainer.check_batch(batch)
                metrics.batch = batch
                hooks.batch_start(batch, batch_idx, dataloader_idx)
                output = step(batch, batch_idx, dataloader_idx)
                hooks.batch_end(output, batch, batch_idx, dataloader_idx)
                if table.logs_steps:
                    trainer.log_metrics(metrics.row(), step=evaluated + batch_idx)
            metrics.end_loader(dataloader_idx, batch_idx + 1)
        metrics.end_loaders()
        hooks.epoch_end()
        results, values = metrics.end_evaluation()
        trainer.log_metrics(values)
        hooks.end()
    return results


def predict(trainer: Trainer, loaders: list[Batches], keep: bool) -> list[Any] | None:
    """Run `predict_step` over every loader and return what it gave, on the host; a list for each of several loaders.

    Without a batch nothing runs, and there is nothing to return.
    """
    if not any(loader.num_batches or loader.elsewhere for loader in loaders):
        return None
    check_dataloader_idx(trainer.module, "predict", several=len(loaders) > 1)
    hooks, metrics, transfer = trainer.hooks.evaluation("predict", len(loaders)), trainer.metrics, trainer.transfer
    step = trainer.wrapped_step("predict_step", len(loaders))
    predictions: list[list[Any]] = [[] for _ in loaders]

    with evaluation_mode(trainer, "predict"):
        hooks.start()
        hooks.epoch_start()
        metrics.hook = "predict_step"
        for dataloader_idx, loader in enumerate(loaders):
            batches = trainer.sources.epoch(loader, trainer.progress.epoch)
            if trainer.strategy.sharded:
                batches = accompanied(trainer, loader, batches, step, dataloader_idx)
            for batch_idx, batch, is_last in batches:
                trainer.is_last_batch, trainer.evaluation_idx = is_last, batch_idx
                if transfer is not None:
                    batch = transfer(batch, dataloader_idx)
                if batch_idx == 0:
                    trainer.check_batch(batch)
                hooks.batch_start(batch, batch_idx, dataloader_idx)
                output = step(batch, batch_idx, dataloader_idx)
                hooks.batch_end(output, batch, batch_idx, dataloader_idx)
                if keep:
                    predictions[dataloader_idx].append(trainer.to_host(output))
        hooks.epoch_end()
        hooks.end()
    if any(prediction is None for of_loader in predictions for prediction in of_loader):
        warn("predict_step returned None. Return the prediction, or call predict with return_predictions=False.")
    return predictions[0] if len(loaders) == 1 else predictions


def loss_of(output: Any, needs_grad: bool = True) -> Tensor | None:
    """Return the loss in what `training_step` returned: a tensor, a mapping with "loss", or None for "skip".

    A `backward` of the module's own may know what to do with a loss that does not require grad.
    """
    if type(output) is Tensor and not output.ndim and (output.requires_grad or not needs_grad):
        return output  # most steps': all that follows is for the others
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    if output is None:
        warn(
            "a batch is skipped: training_step returned None, or its loader yielded None. If that is not meant, return "
            "the loss."
        )
        return None
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            "training_step must return the loss as a tensor, a dict with the key 'loss', or None to skip the batch. "
            f"Received: {f'a dict with {sorted(output)}' if isinstance(output, Mapping) else repr(output)}."
        )
    if loss.ndim and loss.numel() != 1:
        raise MisconfigurationException(
            f"training_step must return one number as the loss. Received: shape {tuple(loss.shape)}. Reduce it first, "
            "for example with .mean()."
        )
    if needs_grad and not loss.requires_grad:
        raise MisconfigurationException(
            "training_step returned a loss that does not require grad, so nothing can be learned from it. Was it "
            "detached, turned into a number, or computed under torch.no_grad()? Are all parameters frozen?"
        )
    return loss


def outputs_of(output: Any, loss: Tensor | None) -> dict[str, Any]:
    """Return what `on_train_batch_end` gets: the "loss" and whatever else the step returned, without the graph."""
    if output is loss and loss is not None:
        return {"loss": loss.detach()}
    outputs = dict(output) if isinstance(output, Mapping) else {"loss": output} if output is not None else {}
    if loss is not None:
        outputs["loss"] = loss.detach()
    return outputs
