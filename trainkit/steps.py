"""A step of the module as the loops call it: compiled, watched, in the run's precision and strategy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from trainkit.hooks import fitted, takes_iterator, with_iterator

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

Step = Callable[..., Any]


def wrapped_step(trainer: Trainer, name: str, num_dataloaders: int) -> Step:
    """Return a step under its name, put together once; where nothing is asked for, it is the method itself."""
    module, compiler, actions = trainer.module, trainer.compiler, trainer.actions
    training = name == "training_step"
    step = as_called(
        getattr(module, name) if compiler is None else compiler.compiled(trainer, name), name, num_dataloaders
    )
    if training and trainer.update.guard is not None:
        step = trainer.update.guard.watch_step(step)
    if actions is not None:
        step = actions.wrap(f"[LightningModule]{type(module).__name__}.{name}", step)
    step = trainer.precision_plugin.wrap(step)
    if training:
        wishes = trainer.agreement.wishes if trainer.agreement is not None and module.automatic_optimization else None
        step = trainer.strategy.wrap_training(module, step, wishes)
    else:
        step = trainer.strategy.wrap(step)
    if training and trainer.graphs is not None:
        step = trainer.graphs.training_step(step)
    if actions is not None:
        step = actions.wrap(f"[Strategy]{type(trainer.strategy).__name__}.{name}", step)
    return step


def as_called(method: Step, name: str, num_dataloaders: int) -> Step:
    """Return a method that takes what the loops pass, of which it may want less, or an iterator."""
    if takes_iterator(method):
        return partial(with_iterator, method)
    given = ("batch", "batch_idx") if name == "training_step" else ("batch", "batch_idx", "dataloader_idx")
    return fitted(method, name, given, 1 if num_dataloaders == 1 else 3, num_dataloaders)
