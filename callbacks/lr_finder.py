"""LearningRateFinder: find a learning rate before training begins, and train with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainkit import Callback
from trainkit.errors import SearchOver
from trainkit.lr_range import MODES, LRFinder, find_lr

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class LearningRateFinder(Callback):
    """Run a learning-rate range test when fit begins, and train with the rate at which the loss fell fastest.

    The test trains for `num_training_steps` updates, and takes them back: weights, optimizer, data order, random state
    and counters are afterwards what they were before. Only the learning rate is another.

    Args:
        min_lr: the first rate to try.
        max_lr: the last one.
        num_training_steps: how many rates to try, an update each.
        mode: how the rate is raised: "exponential" (default) or "linear".
        early_stop_threshold: stop when the loss is more than so many times its best; None goes through to the end.
        update_attr: set the attribute of the module (or of its hparams) that holds the learning rate.
        attr_name: its name (default: `lr` or `learning_rate`).

    Raises:
        ValueError: `mode` is neither; when it is constructed.
        MisconfigurationException: the module has more than one optimizer; when fit begins.
        AttributeError: there is no such attribute; when fit begins.

    Example:
        Search again at some epochs, for instance after layers were unfrozen:

        >>> class AtEpochs(LearningRateFinder):
        ...     def on_fit_start(self, trainer, pl_module):
        ...         pass
        ...     def on_train_epoch_start(self, trainer, pl_module):
        ...         if trainer.current_epoch in (0, 5, 10):
        ...             self.lr_find(trainer, pl_module)
    """

    tunes = True

    SUPPORTED_MODES = MODES

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        mode = mode.lower()
        if mode not in MODES:
            raise ValueError(f"mode must be 'exponential' or 'linear'. Received: {mode!r}.")
        self._min_lr, self._max_lr = min_lr, max_lr
        self._num_training_steps = num_training_steps
        self._mode = mode
        self._early_stop_threshold = early_stop_threshold
        self._update_attr, self._attr_name = update_attr, attr_name
        self._early_exit = False  # a Tuner sets it: the run is over when the rate is found
        self.optimal_lr: LRFinder | None = None
        """What the last test saw: `optimal_lr.suggestion()` is the rate, `optimal_lr.plot()` shows why."""

    def lr_find(self, trainer: Trainer, pl_module: Module) -> None:
        """Run the test now: when fit begins, or when an epoch does."""
        self.optimal_lr = find_lr(
            trainer,
            pl_module,
            min_lr=self._min_lr,
            max_lr=self._max_lr,
            num_training=self._num_training_steps,
            mode=self._mode,
            early_stop_threshold=self._early_stop_threshold,
            update_attr=self._update_attr,
            attr_name=self._attr_name,
        )
        if self._early_exit:
            raise SearchOver

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.lr_find(trainer, pl_module)
