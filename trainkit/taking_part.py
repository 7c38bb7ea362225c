"""Taking part in a step without a sample of one's own.

Where parameters are spread over processes, each forward and backward needs the pieces that all of them have; with
manual optimization only the step knows how often gradients are averaged. So a process that has no sample of a batch, or
whose evaluation is over earlier, goes through the step with a sample of another one: its loss weighs nothing, what it
logs is nowhere, and no hook of a batch hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainkit.data.together import Together
from trainkit.errors import MisconfigurationException
from trainkit.metrics import NoMetrics
from trainkit.module import Module

if TYPE_CHECKING:
    from torch import Tensor

    from trainkit.data.loader import Batches
    from trainkit.trainer import Trainer

Step = Callable[..., Any]


@contextmanager
def unheard(trainer: Trainer) -> Iterator[None]:
    """Let nothing that is logged inside be filed."""
    nowhere = NoMetrics()
    nowhere._warned = True
    parts = [part for part in trainer.module.modules() if isinstance(part, Module)]
    for part in parts:
        part.__dict__["_run_metrics"] = nowhere
    try:
        yield
    finally:
        for part in parts:
            part.__dict__["_run_metrics"] = trainer.metrics


def go_along(trainer: Trainer, training_step: Step, batch_idx: int) -> Any:
    """Go through a training step with a sample of another process, and return what it returned."""
    batch = trainer.sources.train.stand_in(trainer.progress.epoch, batch_idx)
    if trainer.transfer is not None:
        batch = trainer.transfer(batch, 0)
    with unheard(trainer):
        return training_step(batch, batch_idx)


def train_along(trainer: Trainer, training_step: Step, batch_idx: int) -> Tensor:
    """Go through a training step whose loss weighs nothing, and return that loss: it is zero."""
    output = go_along(trainer, training_step, batch_idx)
    loss: Tensor = output["loss"] if isinstance(output, dict) else output
    return loss * 0.0


def accompanied(
    trainer: Trainer, loader: Batches, batches: Iterator[Any], step: Step, dataloader_idx: int
) -> Iterator[Any]:
    """Yield this process's batches of an evaluation, and then go through the steps of those that others still have."""
    epoch, index = trainer.progress.epoch, -1
    if not getattr(loader, "sliced", False):
        yield from _asking(trainer, batches, step, dataloader_idx)
        return
    for index, batch, is_last in batches:
        yield index, batch, is_last
    for others in range(index + 1, int(loader.taken_by_all(epoch))):
        _evaluate_along(trainer, loader.stand_in(epoch, others), others, step, dataloader_idx)


def _asking(trainer: Trainer, batches: Iterator[Any], step: Step, dataloader_idx: int) -> Iterator[Any]:
    """The same for data that each process has for itself: they ask each other before each batch who has one."""
    together, index, batch = Together(trainer.strategy), -1, None
    for index, batch, is_last in batches:
        together.ask(over=False).first_to_end()
        yield index, batch, is_last
    while not together.ask(over=True).everywhere():
        index += 1
        if batch is None:
            raise MisconfigurationException(
                f"rank {trainer.global_rank} has no batch of an evaluation while others have some, and its piece of "
                "the parameters is needed in each of their steps. Let every process have at least one batch."
            )
        _evaluate_along(trainer, batch, index, step, dataloader_idx)


def _evaluate_along(trainer: Trainer, batch: Any, batch_idx: int, step: Step, dataloader_idx: int) -> None:
    if trainer.transfer is not None:
        batch = trainer.transfer(batch, dataloader_idx)
    with unheard(trainer):
        step(batch, batch_idx, dataloader_idx)
