"""ProgressBar: what every progress bar knows of its run; it draws nothing itself."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

from trainkit import Callback

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class ProgressBar(Callback):
    """Base of progress bars: knows the run's sizes and metrics, and draws nothing.

    Override the hooks that should draw, and `print`, so that messages do not cut through what is drawn.

    Example:
        >>> class Percent(ProgressBar):
        ...     def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ...         if self.is_enabled:
        ...             print(f"{100 * (batch_idx + 1) / self.total_train_batches:.0f}%", end="\\r")
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._enabled = True
        self._current_eval_dataloader_idx: int | None = None

    @property
    def trainer(self) -> Trainer:
        """The Trainer whose run is shown.

        Raises:
            TypeError: no run has begun yet.
        """
        if self._trainer is None:
            raise TypeError(f"{type(self).__name__} has no trainer yet: it gets one when a run begins.")
        return self._trainer

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._enabled

    @property
    def is_disabled(self) -> bool:
        """Whether nothing is shown."""
        return not self.is_enabled

    def enable(self) -> None:
        """Show the run (again)."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing until `enable`."""
        self._enabled = False

    # ---- how much there is to do
    @property
    def total_train_batches(self) -> int | float:
        """Batches of a training epoch, or what `max_steps` leaves of it; infinite when the loader has no length."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if trainer.max_epochs == -1 and trainer.max_steps > 0:
            return min(batches, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        return batches

    @property
    def total_val_batches(self) -> int | float:
        """Batches of a validation, over all loaders; 0 in an epoch without one."""
        trainer = self.trainer
        if trainer.sanity_checking:
            return sum(trainer.num_sanity_val_batches)
        every = trainer.check_val_every_n_epoch
        skipped = trainer.training and every is not None and (trainer.current_epoch + 1) % every != 0
        return 0 if skipped else sum(trainer.num_val_batches)

    @property
    def total_test_batches(self) -> int | float:
        """Batches of a test, over all loaders."""
        return sum(self.trainer.num_test_batches)

    @property
    def total_predict_batches(self) -> int | float:
        """Batches to predict, over all loaders."""
        return sum(self.trainer.num_predict_batches)

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Batches of the validation loader that `has_dataloader_changed` was last asked about."""
        trainer = self.trainer
        return self._current(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches of the test loader that `has_dataloader_changed` was last asked about."""
        return self._current(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches of the predict loader that `has_dataloader_changed` was last asked about."""
        return self._current(self.trainer.num_predict_batches)

    def _current(self, batches: list[int | float]) -> int | float:
        return batches[self._current_eval_dataloader_idx or 0]

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Whether this is another loader than when it was last asked."""
        before, self._current_eval_dataloader_idx = self._current_eval_dataloader_idx, dataloader_idx
        return before != dataloader_idx

    def reset_dataloader_idx_tracker(self) -> None:
        """Let the next evaluation begin with a new loader."""
        self._current_eval_dataloader_idx = None

    # ---- what is shown
    @property
    def sanity_check_description(self) -> str:
        """What the sanity check is called."""
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        """What training is called before its first epoch."""
        return "Training"

    @property
    def validation_description(self) -> str:
        """What validation is called."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """What a test is called."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """What predicting is called."""
        return "Predicting"

    def get_metrics(self, trainer: Trainer, pl_module: Module) -> dict[str, Any]:
        """Return what to show, by name: "v_num", the run's version, and what was logged with prog_bar=True.

        Override it to show something else.
        """
        return {**get_standard_metrics(trainer), **trainer.progress_bar_metrics}

    def print(self, *values: Any, **kwargs: Any) -> None:
        """Print without cutting through what is drawn; takes what the builtin `print` takes."""
        builtins.print(*values, **kwargs)

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}


def get_standard_metrics(trainer: Trainer) -> dict[str, int | str]:
    """Return what is shown beside the metrics: the version of the first logger's run, of a long one its end."""
    version = trainer.loggers[0].version if trainer.loggers else None
    if version in (None, ""):
        return {}
    return {"v_num": version[-4:] if isinstance(version, str) else version}
