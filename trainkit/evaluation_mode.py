"""The mode that evaluations run in: no gradients, the module in evaluation mode, everything as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from trainkit.hooks import is_overridden
from trainkit.stages import RunningStage, TrainerFn

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


@contextmanager
def evaluation_mode(trainer: Trainer, stage: str) -> Iterator[None]:
    """Run without gradients and with the module in evaluation mode, and give each part its own mode back."""
    module, before = trainer.module, trainer.state.stage
    modes = [(part, part.training) for part in module.modules()]
    use_inference_mode = trainer.inference_mode and trainer.state.fn != TrainerFn.FITTING
    use_inference_mode = use_inference_mode and not trainer.strategy.sharded  # what is gathered is used again to train
    trainer.strategy.be_patient()
    trainer.evaluation_idx = -1
    if before == RunningStage.TRAINING:
        trainer.state.stage = RunningStage.VALIDATING
    if trainer.world_size > 1:  # each process has seen other batches
        trainer.strategy.same_everywhere(module.buffers())
    trainer.metrics.hook = f"on_{stage}_model_eval"
    getattr(module, f"on_{stage}_model_eval")()
    try:
        with torch.inference_mode() if use_inference_mode else torch.no_grad():
            yield
    finally:
        trainer.state.stage = before
        trainer._since_validation.restart()
        if is_overridden(module, f"on_{stage}_model_train"):
            trainer.metrics.hook = f"on_{stage}_model_train"
            getattr(module, f"on_{stage}_model_train")()
        else:
            for part, training in modes:
                part.training = training
