"""Tuner: find a learning rate or a batch size without training."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from trainkit.callbacks.batch_size_finder import BatchSizeFinder
from trainkit.callbacks.lr_finder import LearningRateFinder
from trainkit.errors import MisconfigurationException, SearchOver
from trainkit.random import isolated_random
from trainkit.rehearsal import Muted

if TYPE_CHECKING:
    from trainkit.datamodule import DataModule
    from trainkit.lr_range import LRFinder
    from trainkit.module import Module
    from trainkit.trainer import Trainer

STAGES = ("fit", "validate", "test", "predict")
Method = Literal["fit", "validate", "test", "predict"]


class Tuner:
    """Search settings with a Trainer, and leave it, the module, the data order and the random state as they were.

    Nothing is logged or saved, and the trainer's callbacks do not hear of it. What is found is set on the module.

    Args:
        trainer: with which to search; its device, precision and limits of batches are used.

    Example:
        >>> tuner = Tuner(trainer)
        >>> tuner.scale_batch_size(module, datamodule=data, mode="binsearch")
        >>> finder = tuner.lr_find(module, datamodule=data)
        >>> finder.plot(suggest=True).savefig("lr.png")
        >>> trainer.fit(module, datamodule=data)
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def scale_batch_size(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        method: Method = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Find the largest batch size that fits into memory, set it, and return it; None in a fast_dev_run.

        Args:
            model: the module; it or the data module has the batch size as an attribute.
            train_dataloaders: the DataModule; loaders made elsewhere can't be given another size.
            val_dataloaders: an iterable of batches, or several; not used in the search.
            dataloaders: the DataModule, for the other methods than "fit".
            datamodule: where the loaders come from, if not from the module.
            method: what to run: "fit", "validate", "test" or "predict".
            mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val: see `BatchSizeFinder`.

        Raises:
            ValueError: `method`, `mode` or `margin` is none; several processes; or there is a BatchSizeFinder already.
            MisconfigurationException: see `BatchSizeFinder`.
        """
        self._check(method, train_dataloaders, val_dataloaders, dataloaders)
        if self._trainer.world_size > 1:
            raise ValueError("scale_batch_size works on one device only.")
        self._refuse(BatchSizeFinder)
        finder = BatchSizeFinder(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        self._run(finder, method, model, train_dataloaders, val_dataloaders, dataloaders, datamodule)
        return finder.optimal_batch_size

    def lr_find(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        method: Method = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LRFinder | None:
        """Raise the learning rate with every update, and return what the loss did; None in a fast_dev_run.

        Args:
            model: the module.
            train_dataloaders: an iterable of batches; or the DataModule.
            val_dataloaders: an iterable of batches, or several; not used in the search.
            dataloaders: must be None; it is for other methods than "fit".
            datamodule: where the loaders come from, if not from here or the module.
            method: must be "fit".
            num_training: how many rates to try.
            min_lr, max_lr, mode, early_stop_threshold, update_attr, attr_name: see `LearningRateFinder`.

        Raises:
            ValueError: `mode` is none, or there is a LearningRateFinder already.
            MisconfigurationException: the method is another, or the module has more than one optimizer.
            AttributeError: update_attr=True, and there is no such attribute.
        """
        if method != "fit":
            raise MisconfigurationException(f"lr_find works with method='fit' only. Received: {method!r}.")
        self._check(method, train_dataloaders, val_dataloaders, dataloaders)
        self._refuse(LearningRateFinder)
        finder = LearningRateFinder(min_lr, max_lr, num_training, mode, early_stop_threshold, update_attr, attr_name)
        self._run(finder, method, model, train_dataloaders, val_dataloaders, dataloaders, datamodule)
        return finder.optimal_lr

    def _check(self, method: str, train_dataloaders: Any, val_dataloaders: Any, dataloaders: Any) -> None:
        if method not in STAGES:
            raise ValueError(f"method must be one of {', '.join(map(repr, STAGES))}. Received: {method!r}.")
        wrong = [dataloaders] if method == "fit" else [train_dataloaders, val_dataloaders]
        if any(given is not None for given in wrong):
            wanted = "train_dataloaders and val_dataloaders" if method == "fit" else "dataloaders"
            raise MisconfigurationException(f"with method={method!r}, give {wanted}, not the others.")

    def _refuse(self, kind: type) -> None:
        if any(isinstance(callback, kind) for callback in self._trainer.callbacks):
            raise ValueError(
                f"the Trainer has a {kind.__name__} among its callbacks, which searches when the run begins. "
                "Leave it out, or do without the Tuner."
            )

    def _run(
        self,
        finder: LearningRateFinder | BatchSizeFinder,
        method: Method,
        model: Module,
        train_dataloaders: Any,
        val_dataloaders: Any,
        dataloaders: Any,
        datamodule: DataModule | None,
    ) -> None:
        """Begin a run that ends when the finder has found, and take back what the trainer's beginning changed."""
        trainer, finder._early_exit = self._trainer, True
        before = dict(vars(trainer))
        trainer.callbacks, trainer.loggers = [finder], [Muted(logger) for logger in trainer.loggers]
        try:
            with isolated_random(), suppress(SearchOver):
                if method == "fit":
                    trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
                else:
                    getattr(trainer, method)(model, dataloaders, datamodule=datamodule)
        finally:
            seen = {
                name: getattr(trainer, name)
                for name in ("module", "datamodule", "sources", "state")
                if hasattr(trainer, name)
            }
            for name in vars(trainer).keys() - before.keys():
                del vars(trainer)[name]
            vars(trainer).update({**before, **seen})
            if "module" in seen:
                seen["module"].attach(trainer, trainer.metrics)
