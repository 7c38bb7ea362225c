"""Whose loaders a run uses, wrapped and limited, and when that makes validation due."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from trainkit.data.loader import Loader
from trainkit.errors import MisconfigurationException, warn
from trainkit.hooks import is_overridden
from trainkit.profiler.actions import recorded

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

STEP = {"val": "validation_step", "test": "test_step", "predict": "predict_step"}


class Sources:
    """The data of one run.

    Args:
        trainer: whose settings limit it.
        given: the loaders that the call brought, by kind: "train", "val", "test", "predict".
    """

    def __init__(self, trainer: Trainer, given: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.given = given
        self.loaders: dict[str, list[Loader]] = {}
        self.objects: dict[str, Any] = {}
        """The loaders as the user made them, by kind."""
        self.val_every: int | None = None
        """Validate every n batches; None: at the end of an epoch."""

    @property
    def train(self) -> Loader:
        """The training loader."""
        return self.loaders["train"][0]

    def defined(self, kind: str) -> bool:
        """Whether there will be batches of "val", "test" or "predict": loaders, a step, and a limit above 0."""
        trainer = self.trainer
        limit = trainer.overfit_batches if kind == "val" and trainer.overfit_batches else None
        limit = getattr(trainer, f"limit_{kind}_batches") if limit is None else limit
        module = trainer.model
        if limit == 0 or module is None or not is_overridden(module, STEP[kind]):
            return False
        return self.has_loader(kind) and self.loaders.get(kind) != []  # asked for, and there was none

    def has_loader(self, kind: str) -> bool:
        """Whether a loader was given, or there is a method that makes one."""
        owners = [owner for owner in (self.trainer.datamodule, self.trainer.model) if owner is not None]
        return self.given.get(kind) is not None or any(is_overridden(owner, f"{kind}_dataloader") for owner in owners)

    def num_batches(self, kind: str) -> list[int | float]:
        """Return the number of batches of each loader of a kind."""
        return [loader.num_batches for loader in self.loaders.get(kind, [])]

    def load_train(self) -> None:
        """Ask for the training loader, wrap it, and work out when to validate."""
        trainer = self.trainer
        source = self._object("train")
        if source is None:
            raise MisconfigurationException(
                "fit needs training data: fit(model, train_dataloaders=...), a DataModule with train_dataloader, or "
                f"{type(trainer.module).__name__}.train_dataloader."
            )
        if isinstance(source, (list, tuple, Mapping)):
            raise TypeError(
                f"train_dataloader must be one DataLoader or another iterable of batches. Received: a "
                f"{type(source).__name__} of {len(source)}. Join the data sets (torch.utils.data.ConcatDataset, "
                "StackDataset), or wrap batches that lie in memory in a class with __iter__ and __len__."
            )
        limit = trainer.overfit_batches or trainer.limit_train_batches
        argument = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
        loader = Loader(
            source, limit=limit, name="train_dataloader", argument=argument, sequential=bool(trainer.overfit_batches)
        )
        self.loaders["train"] = self._watched("train", [loader])
        self.val_every = self._validation_interval(loader.num_batches)
        updates = loader.num_batches / trainer.accumulate_grad_batches
        if trainer.loggers and not trainer.fast_dev_run and trainer.log_every_n_steps > updates > 0:
            warn(
                f"log_every_n_steps={trainer.log_every_n_steps} is more than the {math.ceil(updates)} updates of an "
                "epoch; a smaller one logs training metrics in every epoch."
            )

    def _validation_interval(self, batches: int | float) -> int | None:
        """Turn val_check_interval into a number of batches; None means at the epoch's end, or by the clock."""
        interval = self.trainer.val_check_interval
        if isinstance(interval, timedelta) or (isinstance(interval, float) and interval == 1.0):
            return None
        if isinstance(interval, int):
            if self.trainer.check_val_every_n_epoch is not None and interval > batches > 0:
                raise MisconfigurationException(
                    f"val_check_interval={interval} is more than the {batches} training batches of an epoch, so "
                    "validation would never run. Make it smaller, or set check_val_every_n_epoch=None to count "
                    "batches across epochs."
                )
            return interval
        if batches == math.inf:
            raise MisconfigurationException(
                f"val_check_interval={interval} is a fraction, but train_dataloader has no length. Give a whole number."
            )
        return max(1, int(batches * interval))

    def load_evaluation(self, kind: str) -> None:
        """Ask for the loaders of "val", "test" or "predict" and wrap them; in fit they may be missing."""
        trainer = self.trainer
        overfit = kind == "val" and trainer.overfit_batches
        limit = trainer.overfit_batches if overfit else getattr(trainer, f"limit_{kind}_batches")
        optional = trainer.stage == "fit"
        if optional and (limit == 0 or not is_overridden(trainer.module, STEP[kind])):
            if limit != 0 and self.given.get(kind) is not None:
                warn(f"there are validation loaders but no {STEP[kind]}: validation is left out.")
            self.loaders[kind] = []
            return
        source = self._object(kind)
        sources = list(source.values()) if isinstance(source, Mapping) else source
        sources = list(sources) if isinstance(sources, (list, tuple)) else [] if sources is None else [sources]
        name = f"{kind}_dataloader"
        if not sources and not optional:
            raise MisconfigurationException(
                f"{trainer.stage} needs data: {trainer.stage}(model, dataloaders=...), or a {name} of the DataModule "
                "or the module."
            )
        argument = "overfit_batches" if overfit else f"limit_{kind}_batches"
        names = [name] if len(sources) == 1 else [f"{name} {index}" for index in range(len(sources))]
        loaders = [
            Loader(each, limit=limit, name=each_name, argument=argument, sequential=bool(overfit))
            for each, each_name in zip(sources, names, strict=True)
        ]
        self.loaders[kind] = self._watched(kind, loaders)

    def _watched(self, kind: str, loaders: list[Loader]) -> list[Loader]:
        """Let a profiler see how long batches are waited for."""
        if self.trainer.actions is not None:
            for loader in loaders:
                loader.fetching = partial(self.trainer.actions.fetching, kind)
        return loaders

    def _object(self, kind: str) -> Any:
        """Return the loaders of one kind, from whoever brings them: the call, the data module, or the module."""
        source = self.given.get(kind)
        if source is None:
            name, data, module = f"{kind}_dataloader", self.trainer.datamodule, self.trainer.module
            if data is not None and is_overridden(data, name):
                source = recorded(self.trainer, "LightningDataModule", data, name)()
            elif is_overridden(module, name):
                source = recorded(self.trainer, "LightningModule", module, name)()
        self.objects[kind] = source
        return source

    def reload_if_due(self, epoch: int) -> None:
        """Ask for new loaders at the start of every n-th epoch (`reload_dataloaders_every_n_epochs`)."""
        every = self.trainer.reload_dataloaders_every_n_epochs
        if every and epoch and epoch % every == 0:
            self.close()
            seed = self.train.state_dict()
            self.load_train()
            self.train.load_state_dict(seed)  # the order of an epoch stays a function of the run's seed
            self.load_evaluation("val")

    def close(self) -> None:
        """Stop the workers that loaders kept."""
        for loaders in self.loaders.values():
            for loader in loaders:
                loader.close()


class Clock:
    """When the last validation was, for a val_check_interval in time."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count from now."""
        self._since = time.monotonic()

    def passed(self, interval: timedelta) -> bool:
        """Whether the interval is over."""
        return time.monotonic() - self._since >= interval.total_seconds()
