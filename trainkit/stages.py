"""What a run is doing, in Lightning's words: `trainer.state.fn`, `.status` and `.stage`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class _Word(StrEnum):
    """A name that is also the string it stands for."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self.value.lower(), other.lower()) if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value.lower())


class TrainerFn(_Word):
    """Which of its four methods a Trainer is in."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class TrainerStatus(_Word):
    """How far it has come."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Whether it is over, well or not."""
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


class RunningStage(_Word):
    """Which loop is running."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether it is one without training."""
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str | None:
        """The kind of its loaders: "train", "val", "test" or "predict"."""
        return "val" if self in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING) else str(self.value)


@dataclass
class TrainerState:
    """The three together."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        """Whether the last run ended well."""
        return self.status == TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether the last run is over."""
        return self.status.stopped
