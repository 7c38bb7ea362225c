"""BatchSizeFinder: find the largest batch size that fits into memory, and run with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainkit import Callback
from trainkit.attributes import has_attribute
from trainkit.batch_size import KINDS, MODES, find_batch_size
from trainkit.errors import MisconfigurationException, SearchOver, warn
from trainkit.hooks import is_overridden

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class BatchSizeFinder(Callback):
    """Try larger and larger batches before a run begins, and run with the largest that fits into memory.

    Each try runs a few steps and takes them back: weights, optimizer, random state and counters are afterwards what
    they were before. The module or the data module must have the batch size as an attribute (or among its hparams), and
    make its loaders with it.

    Args:
        mode: "power" doubles the size until one does not fit; "binsearch" then looks between the last two.
        steps_per_trial: how many steps to run with each size.
        init_val: the first size to try.
        max_trials: how many sizes to try at most; "binsearch" counts those that fit.
        batch_arg_name: the attribute's name.
        margin: what part of the size found to leave as a reserve, with "binsearch" only.
        max_val: the largest size to try; where memory never runs out, the search ends there.

    Raises:
        ValueError: `mode` or `margin` is none; when it is constructed.
        MisconfigurationException: the run has no such attribute, gets its loaders from outside, has several loaders to
            evaluate, or several processes; when it begins.

    Example:
        Search before a test instead:

        >>> class BeforeTest(BatchSizeFinder):
        ...     def on_fit_start(self, trainer, pl_module):
        ...         pass
        ...     def on_test_start(self, trainer, pl_module):
        ...         self.scale_batch_size(trainer, pl_module)
    """

    tunes = True

    SUPPORTED_MODES = MODES

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        mode = mode.lower()
        if mode not in MODES:
            raise ValueError(f"mode must be 'power' or 'binsearch'. Received: {mode!r}.")
        if not 0.0 <= margin < 1.0:
            raise ValueError(f"margin must be at least 0 and less than 1. Received: {margin}.")
        self.optimal_batch_size: int | None = init_val
        """The size found last."""
        self._mode, self._steps_per_trial, self._init_val = mode, steps_per_trial, init_val
        self._max_trials, self._batch_arg_name = max_trials, batch_arg_name
        self._margin, self._max_val = margin, max_val
        self._early_exit = False  # a Tuner sets it: the run is over when the size is found

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        name = self._batch_arg_name
        if trainer.world_size > 1:
            raise MisconfigurationException("the batch-size finder works on one device only.")
        if trainer.sources.given.get(KINDS[stage]) is not None:
            raise MisconfigurationException(
                f"the batch-size finder can't change loaders that were handed to {stage}. Make them in the module's or "
                f"a data module's {KINDS[stage]}_dataloader, with self.{name}."
            )
        if not has_attribute(pl_module, name):
            raise MisconfigurationException(
                f"the batch-size finder looked for {name!r} in {type(pl_module).__name__}, its data module and their "
                "hparams. Add it, or name another with batch_arg_name."
            )
        if stage != "fit" and (trainer.datamodule is not None or not is_overridden(pl_module, "setup")):
            trainer.sources.load_evaluation(KINDS[stage])  # else: they are there only after the module's setup
            self._refuse_several(trainer, stage)
        if hasattr(pl_module, name) and name in pl_module.hparams:
            warn(f"{name!r} is an attribute of {type(pl_module).__name__} and one of its hparams; both will be set.")

    def scale_batch_size(self, trainer: Trainer, pl_module: Module) -> None:
        """Search now, for the stage that is running: before its first batch, or when an epoch of training begins."""
        stage = trainer.stage or "fit"
        self._refuse_several(trainer, stage)
        self.optimal_batch_size = find_batch_size(
            trainer,
            self._mode,
            self._steps_per_trial,
            self._init_val,
            self._max_trials,
            self._batch_arg_name,
            self._margin,
            self._max_val,
        )
        if self._early_exit:
            if stage == "fit":  # so that the trainer has the loaders that it would train with
                trainer.sources.load_train()
                trainer.sources.load_evaluation("val")
            raise SearchOver

    def _refuse_several(self, trainer: Trainer, stage: str) -> None:
        if stage != "fit" and len(trainer.sources.num_batches(KINDS[stage])) > 1:
            raise MisconfigurationException(f"the batch-size finder can't tell several {KINDS[stage]} loaders apart.")

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.scale_batch_size(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.stage == "validate":
            self.scale_batch_size(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.scale_batch_size(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.scale_batch_size(trainer, pl_module)
