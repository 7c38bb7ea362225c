"""Callback: every hook of a run, each with one sentence, under a picture of where it fires.

Callbacks answer in the order in which they are listed, then the module answers under the same name; callbacks that
watch a metric (`monitors = True`) answer `on_train_epoch_end` after the module.

    fit                                                         validate / test / predict
    ---                                                         -------------------------
    [ configure_callbacks ]                                     [ configure_callbacks ]
    [ prepare_data ]                                            [ prepare_data ]
    setup                                                       setup
    [ configure_model ]                                         [ configure_model ]
    on_load_checkpoint, load_state_dict     when it resumes     [ on_load_checkpoint ]   with a ckpt_path
    [ configure_optimizers ]                                    [ {stage}_dataloader ]
    on_fit_start                                                [ on_{stage}_model_eval ]
    on_sanity_check_start                                       on_{stage}_start
      ( a few validation batches )                              on_{stage}_epoch_start
    on_sanity_check_end                                           per batch:
    [ train_dataloader ]                                          [ on_before_batch_transfer, transfer_batch_to_device,
    on_train_start                                                  on_after_batch_transfer ]
    per epoch:                                                    on_{stage}_batch_start
      on_train_epoch_start                                        [ validation_step | test_step | predict_step ]
      per batch:                                                  on_{stage}_batch_end
        [ on_before_batch_transfer, transfer_batch_to_device,   on_{stage}_epoch_end
          on_after_batch_transfer ]                             on_{stage}_end
        on_train_batch_start                                    [ on_{stage}_model_train ]
        on_before_zero_grad         first batch of a window     teardown
        [ optimizer_zero_grad ]
        [ training_step ]
        on_before_backward
        [ backward ]
        on_after_backward
        [ optimizer_step ]          last batch of a window
        on_before_optimizer_step
        [ configure_gradient_clipping ]
        [ lr_scheduler_step ]       interval "step", and "epoch" after the epoch's last batch
        on_train_batch_end
        ( validation, when due )    before it [ on_validation_model_zero_grad ]
        on_save_point               between windows, nothing pending
      on_train_epoch_end
      [ lr_scheduler_step ]         schedules that follow a metric
      on_save_point
    on_train_end
    on_fit_end
    teardown

    Hooks in brackets are the module's (or the data module's) alone; a window is the accumulate_grad_batches batches of
    one update. on_save_checkpoint: whenever a checkpoint is written. on_exception: when anything raises, Ctrl-C
    included; teardown comes after it, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from trainkit.log import Logs

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from trainkit.module import Module
    from trainkit.trainer import Trainer


class Callback(Logs):
    """Act at any point of a run. Override the hooks you need; the others cost nothing."""

    monitors: ClassVar[bool] = False
    """True for callbacks that watch a metric: their `on_train_epoch_end` comes after the module's."""

    saves: ClassVar[bool] = False
    """True for callbacks that write checkpoints: they are moved behind all others."""

    tunes: ClassVar[bool] = False
    """True for callbacks that find a setting before the run uses it: they are moved before all others."""

    @property
    def state_key(self) -> str:
        """Name this callback's state in a checkpoint; two callbacks of one run need two names."""
        return type(self).__qualname__

    def _generate_state_key(self, **settings: Any) -> str:
        """Return a `state_key` made of settings, for a class that a run may have several of."""
        return f"{type(self).__qualname__}{settings!r}"

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    # ---- a run begins
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Called when a run begins; `stage` is "fit", "validate", "test" or "predict"."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Called with a checkpoint's whole contents before this callback's own state is loaded."""

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the module is on its device and has its optimizers."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called before the few validation batches that prove the validation code runs."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after the sanity check; what it logged is thrown away."""

    # ---- training
    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called before the first epoch of this run."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called before the first batch of an epoch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> int | None:
        """Called with the batch on its device; returning -1 skips the rest of the epoch."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        """Called before an optimizer's gradients are cleared."""

    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: Tensor) -> None:
        """Called before the backward pass; `loss` is divided by the accumulation already."""

    def on_after_backward(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after the backward pass; float16 gradients are still scaled."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        """Called when the window's gradients are complete and unscaled, before they are clipped."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        """Called after the update; `outputs` has the "loss" and what else the step returned."""

    def on_save_point(self, trainer: Trainer, pl_module: Module) -> None:
        """Called between accumulation windows and after epochs: a checkpoint written here resumes exactly."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after an epoch's last batch and its validation, when the epoch's metrics are there."""

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after the last epoch."""

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when fit is done and the module is back where it was."""

    # ---- validation
    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the module is in evaluation mode."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called before the first validation batch."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before `validation_step`."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called with what `validation_step` returned."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after the last validation batch; the last place to log."""

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the validation's metrics are in `trainer.callback_metrics`."""

    # ---- test
    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the module is in evaluation mode."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called before the first test batch."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before `test_step`."""

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called with what `test_step` returned."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after the last test batch; the last place to log."""

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the test's metrics are in `trainer.callback_metrics`."""

    # ---- predict
    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when the module is in evaluation mode."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Called before the first batch to predict."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before `predict_step`."""

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called with what `predict_step` returned."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called after the last batch to predict."""

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Called when all predictions are there."""

    # ---- at any time
    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Called with a checkpoint's contents before it is written; add keys of your own here."""

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Called when anything in the run raises, KeyboardInterrupt included, before it is raised again."""

    # ---- a run ends
    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Called when a run ends, after an error too."""
