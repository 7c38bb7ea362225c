"""Fetch one training batch again, in the process that trained on it or in a new one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainkit.data.position import fetch
from trainkit.data.sources import Sources
from trainkit.datamodule import DataModule
from trainkit.errors import MisconfigurationException
from trainkit.hooks import is_overridden
from trainkit.module import Module
from trainkit.random import seed_of_state

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


def replayed(trainer: Trainer, position: Any, model: Module | None, loaders: Any, datamodule: DataModule | None) -> Any:
    """Do what `Trainer.replay` says."""
    position = read_position(position)
    if isinstance(loaders, DataModule):
        loaders, datamodule = None, loaders
    if loaders is None and datamodule is not None:
        datamodule.trainer = trainer
        datamodule.prepare_data()
        datamodule.setup("fit")
        loaders = datamodule.train_dataloader()
    elif loaders is None and model is not None and is_overridden(model, "train_dataloader"):
        loaders = model.train_dataloader()
    if loaders is None:
        if not trainer.sources.loaders.get("train"):
            raise MisconfigurationException(
                "replay needs the training data, and this Trainer has not trained yet. Give train_dataloaders, a "
                "datamodule, or a model with train_dataloader."
            )
        return fetch(trainer.sources.train, position)
    sources = Sources(trainer, {"train": loaders}, seed_of_state())
    try:
        sources.load_train()
        return fetch(sources.train, position)
    finally:
        sources.close()


def read_position(position: Any) -> Mapping[str, Any]:
    """Return a position in whichever way it was given.

    Raises:
        MisconfigurationException: it is none.
    """
    found: Any = position
    if isinstance(position, (str, os.PathLike)):
        with open(position) as file:
            found = json.load(file)
    elif isinstance(position, (tuple, list)) and len(position) == 2:
        found = {"epoch": position[0], "batch": position[1]}
    if not isinstance(found, Mapping) or not {"epoch", "batch"} <= found.keys():
        raise MisconfigurationException(
            "replay(position): expected a file that nan_policy wrote, what is in it, or (epoch, batch_idx). "
            f"Received: {position!r}."
        )
    return found
