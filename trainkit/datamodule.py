"""DataModule: where data comes from, apart from the model that learns from it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

from trainkit.data_hooks import DataHooks
from trainkit.hparams import HyperParameters, class_only
from trainkit.tree import leaves, with_leaves

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from trainkit.trainer import Trainer

KINDS = {"train": "Train", "val": "Validation", "test": "Test", "predict": "Predict"}


class DataModule(DataHooks, HyperParameters):
    """Download, prepare and load the data of a run. Override what you need.

    Called in the order `prepare_data`, `setup(stage)`, the loaders of the stage, `teardown(stage)`. Without a Trainer
    you call them yourself. `print(datamodule)` tells how many samples each loader has.

    Example:
        >>> class Squares(DataModule):
        ...     def setup(self, stage):
        ...         x = torch.arange(10.0).reshape(-1, 1)
        ...         self.data = torch.utils.data.TensorDataset(x, x**2)
        ...     def train_dataloader(self):
        ...         return torch.utils.data.DataLoader(self.data, batch_size=5, shuffle=True)
    """

    name: str | None = None
    """What the data are called, for whoever wants to know."""

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "datamodule_hparams_name"
    """Where in a checkpoint the hyperparameters are, and the name of the argument that takes them all."""

    trainer: Trainer | None = None
    """The trainer of the run, while there is one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> Self:
        """Make a DataModule of data sets; the training data are shuffled.

        Args:
            train_dataset: a data set, or several in a list or dict; None for no such loader.
            val_dataset: the same for validation.
            test_dataset: the same for test.
            predict_dataset: the same for predict.
            batch_size: samples in a batch; `__init__` gets it too if it takes it.
            num_workers: worker processes of each loader; `__init__` gets it too if it takes it.
            datamodule_kwargs: other arguments of `__init__`.
        """
        takes = inspect.signature(cls.__init__).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        settings = {"batch_size": batch_size, "num_workers": num_workers}
        given = {name: value for name, value in settings.items() if takes_all or name in takes}
        datamodule = cls(**datamodule_kwargs, **given)
        datasets = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for kind, dataset in datasets.items():
            if dataset is not None:
                make = partial(_loaders_of, dataset, shuffle=kind == "train", **settings)
                setattr(datamodule, f"{kind}_dataloader", make)
        return datamodule

    def setup(self, stage: str) -> None:
        """Make the data sets that a stage needs: "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """Clean up after a stage, after an error too."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when anything in the run raises."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    @class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | PathLike[str] | IO[bytes] | Mapping[str, Any],
        map_location: Any = None,
        hparams_file: str | PathLike[str] | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make the data module again from a checkpoint: its saved hyperparameters, then its state.

        Args:
            checkpoint_path: the file, an open one, or what one holds; see `Module.load_from_checkpoint`.
            map_location: kept for Lightning's signature; tensors are read to the cpu.
            hparams_file: a YAML or CSV file with hyperparameters, in place of the checkpoint's.
            weights_only: kept for Lightning's signature; nothing in a file is ever executed.
            kwargs: arguments of `__init__` that override the saved ones.

        Raises:
            CheckpointError: no such file, or not a checkpoint.
            TypeError: `__init__` needs an argument that was not saved and not given; or it was called on an object.
        """
        from trainkit.checkpoint.rebuild import rebuild_datamodule

        rebuilt: Self = rebuild_datamodule(cls, checkpoint_path, hparams_file, kwargs)
        return rebuilt

    def __str__(self) -> str:
        return os.linesep.join(
            f"{{{title} dataloader: {self._sizes(f'{kind}_dataloader')}}}" for kind, title in KINDS.items()
        )

    def _sizes(self, name: str) -> str:
        """Return how many samples the loaders of a kind have; "None" where there is none yet."""
        from trainkit.data.combined import flattened
        from trainkit.data.samplers import length_of

        try:
            loaders = flattened(getattr(self, name)())
            sizes = [length_of(getattr(loader, "dataset", None)) for loader in loaders]
        except Exception:  # not overridden, or not set up
            return "None"
        told = [f"size={size if isinstance(size, int) else 'NA'}" for size in sizes]
        return told[0] if len(told) == 1 else " ; ".join(f"{number}. {size}" for number, size in enumerate(told, 1))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "trainer"}  # a copy is not in the run


def _loaders_of(dataset: Any, *, batch_size: int, num_workers: int, shuffle: bool) -> Any:
    """Return a DataLoader for a data set, or for each of several in their structure."""
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    def loader_of(data: Any) -> DataLoader[Any]:
        if not isinstance(data, Dataset) and not hasattr(data, "__getitem__"):
            return data  # type: ignore[no-any-return]  # batches already
        return DataLoader(
            data,
            batch_size,
            shuffle=shuffle and not isinstance(data, IterableDataset),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def is_leaf(node: Any) -> bool:
        return isinstance(node, Dataset)

    return with_leaves(dataset, is_leaf, map(loader_of, leaves(dataset, is_leaf)))
