"""Lightning's small helpers that trainkit itself has no use for, and Lightning programs do."""

from __future__ import annotations

import os
import pickle
import random
import warnings
from collections.abc import MutableMapping
from enum import Enum, StrEnum
from typing import Any

import torch
from torch.utils.data import IterableDataset

from trainkit.errors import warn
from trainkit.metrics.batch_size import BatchSize
from trainkit.random import seed_everything


class LightningEnum(StrEnum):
    """An enum of words that compare without regard to case."""

    @classmethod
    def from_str(cls, value: str, source: str = "key") -> Any:
        """Return the member that a word means: its name, its value or either ("any").

        Raises:
            ValueError: no member; the message lists them.
        """
        for member in cls:
            if (source in ("key", "any") and member.name.lower() == value.lower()) or (
                source in ("value", "any") and member == value
            ):
                return member
        raise ValueError(f"must be one of {', '.join(member.name for member in cls)}. Received: {value!r}.")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Enum):
            other = other.value
        return isinstance(other, str) and self.value.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.value.lower())


class GradClipAlgorithmType(LightningEnum):
    """What `Trainer(gradient_clip_algorithm=...)` takes."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Whether there is an algorithm of that name."""
        return any(member.value == val for member in GradClipAlgorithmType)

    @staticmethod
    def supported_types() -> list[str]:
        """Return the names."""
        return [member.value for member in GradClipAlgorithmType]


class Interval(LightningEnum):
    """How often `Timer(interval=...)` looks at the clock."""

    step = "step"
    epoch = "epoch"


class PossibleUserWarning(UserWarning):
    """Warn of something that may well be meant."""


def disable_possible_user_warnings(module: str = "") -> None:
    """Show no PossibleUserWarning from now on.

    Args:
        module: a pattern for where they come from; "" for everywhere.
    """
    warnings.filterwarnings("ignore", category=PossibleUserWarning, module=module)


def is_picklable(obj: object) -> bool:
    """Whether an object can be pickled."""
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def clean_namespace(hparams: MutableMapping[str, Any]) -> None:
    """Remove what can't be pickled, with a warning."""
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        del hparams[name]
        warn(f"{name!r} can't be pickled and is left out; say so: save_hyperparameters(ignore=[{name!r}]).")


def sized_len(dataloader: Any) -> int | None:
    """Return a loader's length, None if it does not know it."""
    try:
        return len(dataloader)
    except (TypeError, NotImplementedError):
        return None


def has_len(dataloader: object) -> bool:
    """Whether a loader knows its length."""
    return sized_len(dataloader) is not None


def has_iterable_dataset(dataloader: object) -> bool:
    """Whether a loader's data is a stream."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def extract_batch_size(batch: Any) -> int:
    """Return the first dimension of the first tensor in a batch.

    Raises:
        MisconfigurationException: there is no tensor in it.
    """
    return BatchSize().of(batch)


def reset_seed() -> None:
    """Seed everything again with the last seed of `seed_everything`, if there was one."""
    if "PL_GLOBAL_SEED" in os.environ:
        workers = os.environ.get("PL_SEED_WORKERS", "0") == "1"
        seed_everything(int(os.environ["PL_GLOBAL_SEED"]), workers=workers, verbose=False)


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Seed python, numpy and torch in a worker, for a DataLoader of your own with `worker_init_fn`.

    Args:
        worker_id: the worker.
        rank: the process it works for; None takes the launcher's.
    """
    import numpy as np

    from trainkit.rank_zero import current_rank

    rank = current_rank() if rank is None else rank
    source = np.random.SeedSequence([torch.initial_seed() - worker_id, worker_id, rank])
    for_torch, for_python = (int(word) for word in source.generate_state(2, np.uint64))
    torch.manual_seed(for_torch)
    random.seed(for_python)
    np.random.seed(source.spawn(1)[0].generate_state(4))


def get_torchvision_model(model_name: str, **kwargs: Any) -> torch.nn.Module:
    """Return the torchvision model of that name; `kwargs` are for it."""
    from torchvision import models  # type: ignore[import-untyped, unused-ignore]

    model: torch.nn.Module = models.get_model(model_name, **kwargs)
    return model
