"""BasePredictionWriter: write predictions out while they are made, or when all are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from trainkit import Callback
from trainkit.data.indices import note_indices
from trainkit.errors import MisconfigurationException, warn
from trainkit.hooks import overrides

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class WriteInterval(StrEnum):
    """When predictions are written."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        """Whether each batch is written."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """Whether all are written at the end."""
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback):
    """Base of callbacks that write predictions. Override `write_on_batch_end`, `write_on_epoch_end`, or both.

    With "batch" nothing is kept: together with `trainer.predict(..., return_predictions=False)` the memory does not
    grow with the data. With "epoch" the predictions wait on the host until the end.

    Args:
        write_interval: "batch" writes each batch, "epoch" all of them at the end, "batch_and_epoch" does both.

    Raises:
        MisconfigurationException: `write_interval` is none of the three.
        NotImplementedError: when predict begins, the method for this interval is not overridden.

    Example:
        >>> class Writer(BasePredictionWriter):
        ...     def write_on_batch_end(
        ...         self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
        ...     ):
        ...         torch.save({"samples": batch_indices, "prediction": prediction}, f"{dataloader_idx}-{batch_idx}.pt")
        >>> writer = Writer("batch")  # Trainer(callbacks=writer).predict(module, loader, return_predictions=False)
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        if write_interval not in [interval.value for interval in WriteInterval]:
            raise MisconfigurationException(
                f'{type(self).__name__}(write_interval=...) must be "batch", "epoch" or "batch_and_epoch". '
                f"Received: {write_interval!r}."
            )
        self.interval = WriteInterval(write_interval)
        self._forget()

    def _forget(self) -> None:
        self._noted: list[deque[list[int]] | None] = []  # for each loader: the samples of the batches on their way
        self._predictions: list[list[Any]] = []
        self._indices: list[list[list[int] | None]] = []

    # ---- to be overridden
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch.

        Args:
            trainer: whose run it is.
            pl_module: the module that predicted.
            prediction: what `predict_step` returned, on its device.
            batch_indices: which samples of the data set it is about; None where that can't be known.
            batch: what it was predicted from.
            batch_idx: which batch of its loader.
            dataloader_idx: which loader.
        """
        raise NotImplementedError(f"{type(self).__name__} has no write_on_batch_end.")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: Module, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write everything.

        Args:
            trainer: whose run it is.
            pl_module: the module that predicted.
            predictions: an entry a batch, on the host; with several loaders a list of them for each.
            batch_indices: for each loader, also when it is the only one, the samples of each of its batches; None
                for a batch where that can't be known.
        """
        raise NotImplementedError(f"{type(self).__name__} has no write_on_epoch_end.")

    # ---- hooks
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Refuse a writer that can't write, before anything is predicted."""
        wanted = {"write_on_batch_end": self.interval.on_batch, "write_on_epoch_end": self.interval.on_epoch}
        for name, needed in wanted.items():
            if stage == "predict" and needed and not overrides(self, name, BasePredictionWriter):
                raise NotImplementedError(
                    f"{type(self).__name__}({self.interval.value!r}) needs {name}, which is not overridden."
                )

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Begin to note which samples the batches are made of."""
        loaders = [part for loader in trainer.sources.loaders["predict"] for part in loader.parts]
        self._noted = [note_indices(loader) for loader in loaders]
        self._predictions, self._indices = [[] for _ in loaders], [[] for _ in loaders]
        for loader, noted in zip(loaders, self._noted, strict=True):
            if noted is None:
                warn(
                    f"{type(self).__name__}: which samples the batches of {loader.name} are made of can't be known, so "
                    "batch_indices is None. It is known for a DataLoader over data with indices."
                )

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write a batch, or keep it for the end."""
        noted = self._noted[dataloader_idx]
        indices = None if noted is None else noted.popleft()
        if self.interval.on_batch:
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)
        if self.interval.on_epoch:
            self._predictions[dataloader_idx].append(trainer.to_host(outputs))
            self._indices[dataloader_idx].append(indices)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Write everything, if that is wanted."""
        if self.interval.on_epoch:
            predictions = self._predictions[0] if len(self._predictions) == 1 else self._predictions
            self.write_on_epoch_end(trainer, pl_module, predictions, self._indices)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Let go of what was kept."""
        self._forget()
