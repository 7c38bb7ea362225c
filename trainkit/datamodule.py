"""DataModule: where data comes from, apart from the model that learns from it."""

from __future__ import annotations

from os import PathLike
from typing import IO, TYPE_CHECKING, Any, Self

from trainkit.hparams import HyperParameters, class_only

if TYPE_CHECKING:
    import torch

    from trainkit.trainer import Trainer


class DataModule(HyperParameters):
    """Download, prepare and load the data of a run. Override what you need.

    Called in the order `prepare_data`, `setup(stage)`, the loaders of the stage, `teardown(stage)`.
    """

    trainer: Trainer | None = None
    """The trainer of the run, while there is one."""

    def prepare_data(self) -> None:
        """Download or unpack. Called once on each machine; assign nothing to `self` here."""

    def setup(self, stage: str) -> None:
        """Make the data sets that a stage needs: "fit", "validate", "test" or "predict"."""

    def train_dataloader(self) -> Any:
        """Return the training loader: a DataLoader or any iterable of batches."""
        return None

    def val_dataloader(self) -> Any:
        """Return the validation loader, or a list of them; None for no validation."""
        return None

    def test_dataloader(self) -> Any:
        """Return the test loader, or a list of them."""
        return None

    def predict_dataloader(self) -> Any:
        """Return the loader of what is to be predicted, or a list of them."""
        return None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch as it goes to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch on the device; override it for batches of a type of your own."""
        assert self.trainer is not None, "batches are transferred during a run"
        return self.trainer.strategy.to_device(batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch as the steps get it: the place for augmentation on the device."""
        return batch

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
        checkpoint_path: str | PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | PathLike[str] | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make the data module again from a checkpoint: its saved hyperparameters, then its state.

        Args:
            checkpoint_path: the file, trainkit's or Lightning's, or an open one.
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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "trainer"}  # a copy is not in the run
