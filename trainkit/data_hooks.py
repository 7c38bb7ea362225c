"""DataHooks: how a Module or a DataModule brings data, and how its batches come to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainkit.errors import MisconfigurationException
from trainkit.moving import move_data_to_device

if TYPE_CHECKING:
    import torch


class DataHooks:
    """The methods that bring data. Override what you need; a DataModule's come before the module's.

    A loader is a DataLoader or any other iterable of batches; several of them may come in lists, tuples and dicts, or
    in a `trainkit.data.CombinedLoader`. Training draws from several at once: a batch has their structure, and shorter
    loaders begin again. Evaluations go through them one after the other.
    """

    prepare_data_per_node: bool = True
    """Whether `prepare_data` is called once on each machine; False: once in all, for a shared file system."""

    allow_zero_length_dataloader_with_multiple_devices: bool = False
    """Whether a loader whose length is 0 is no error, where a process may get no data."""

    def prepare_data(self) -> None:
        """Download or unpack. Called once on each machine; assign nothing to `self` here."""

    def train_dataloader(self) -> Any:
        """Return the training loader, or several."""
        raise self._missing("train_dataloader")

    def val_dataloader(self) -> Any:
        """Return the validation loader, or several; None for no validation."""
        raise self._missing("val_dataloader")

    def test_dataloader(self) -> Any:
        """Return the test loader, or several."""
        raise self._missing("test_dataloader")

    def predict_dataloader(self) -> Any:
        """Return the loader of what is to be predicted, or several."""
        raise self._missing("predict_dataloader")

    def _missing(self, name: str) -> MisconfigurationException:
        return MisconfigurationException(f"{type(self).__name__} has no {name}. Write one that returns the loader.")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch as it goes to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch on the device; override it for batches of a type of your own.

        This one moves tensors and whatever else has a `.to`, in nested containers and dataclasses.
        """
        return move_data_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch as the steps get it: the place for augmentation on the device."""
        return batch
