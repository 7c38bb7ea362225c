"""Lightning's names for the loops, for code that reads or sets a run's limits through them.

`trainer.fit_loop.max_epochs = 20` is how Lightning code lets a second `fit` go on. The loops themselves are the
functions in trainkit/loop.py; there is nothing else to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


class FitLoop:
    """The limits and counters of `trainer.fit`.

    Args:
        trainer: whose.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def epoch_loop(self) -> FitLoop:
        """The limits and counters once more: there is one loop."""
        return self

    @property
    def max_epochs(self) -> int | None:
        """After how many epochs the run ends; may be set, -1 is never."""
        return self._trainer.max_epochs

    @max_epochs.setter
    def max_epochs(self, number: int | None) -> None:
        self._trainer.max_epochs = number

    @property
    def min_epochs(self) -> int | None:
        """How many epochs `should_stop` has to wait for; may be set."""
        return self._trainer.min_epochs

    @min_epochs.setter
    def min_epochs(self, number: int | None) -> None:
        self._trainer.min_epochs = number

    @property
    def max_steps(self) -> int:
        """After how many optimizer updates the run ends; may be set, -1 is never."""
        return self._trainer.max_steps

    @max_steps.setter
    def max_steps(self, number: int) -> None:
        self._trainer.max_steps = number

    @property
    def min_steps(self) -> int | None:
        """How many optimizer updates `should_stop` has to wait for; may be set."""
        return self._trainer.min_steps

    @min_steps.setter
    def min_steps(self, number: int | None) -> None:
        self._trainer.min_steps = number

    @property
    def global_step(self) -> int:
        """Optimizer updates done."""
        return self._trainer.global_step

    @property
    def max_batches(self) -> int | float:
        """Batches of an epoch."""
        return self._trainer.num_training_batches

    @property
    def batch_idx(self) -> int:
        """The index of the running batch in its epoch, else of the last one; -1 before the first."""
        return self._trainer.batch_idx

    @property
    def total_batch_idx(self) -> int:
        """The same, counted over all epochs."""
        trainer = self._trainer
        counted = trainer.metrics.batch is None or trainer.progress.batch != trainer.batch_idx
        return trainer.progress.total_batch - counted

    @property
    def done(self) -> bool:
        """Whether a limit is reached."""
        return self._trainer.done


class EvaluationLoop:
    """The limits of `trainer.validate` and `test`.

    Args:
        trainer: whose.
        kind: "val", "test" or "predict", whose loaders it goes through.
    """

    def __init__(self, trainer: Trainer, kind: str) -> None:
        self._trainer, self._kind = trainer, kind

    @property
    def max_batches(self) -> list[int | float]:
        """Batches of each loader."""
        return self._trainer.sources.num_batches(self._kind)

    @property
    def num_dataloaders(self) -> int:
        """How many loaders there are."""
        return len(self.max_batches)


class PredictionLoop(EvaluationLoop):
    """The limits of `trainer.predict`, and what it returned."""

    @property
    def predictions(self) -> list[Any]:
        """What the last `predict` returned; empty with return_predictions=False."""
        return self._trainer.predictions
