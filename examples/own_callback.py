"""Write a callback: follow the gradients of each layer, log them, remember the largest, through a resume too.

Run it with `trainkit fit --config configs/own_callback.yaml`, or without YAML with `python -m examples.own_callback`.
A callback is a class with the hooks it needs; they are called in the order that trainkit/callback.py shows. The run
is that of examples/digits.py: 0.99 of the digits held back are read right after ten epochs (six seconds of one CPU
core), and the largest gradient is that of the last layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.digits import Digits, DigitsCNN
from trainkit import Callback, Module, Trainer, seed_everything


class GradientNorms(Callback):
    """Log the 2-norm of the gradients of every parameter that has two dimensions or more, and tell the largest.

    Args:
        every_n_steps: how often; a multiple of the Trainer's log_every_n_steps wastes nothing.

    Raises:
        ValueError: `every_n_steps` is not at least 1.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1. Received: {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.largest: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Called when the gradients are complete; they are not clipped yet."""
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is None or parameter.ndim < 2:
                continue
            norm = parameter.grad.norm()  # stays on its device: nothing here waits for it
            pl_module.log(f"gradients/{name}", norm)
            self.largest[name] = torch.maximum(norm, self.largest.get(name, norm).to(norm.device))

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        for name, norm in sorted(self.largest.items(), key=lambda item: float(item[1]), reverse=True):
            trainer.print(f"largest gradient of {name}: {float(norm):.3f}")

    # What these return goes into every checkpoint, and comes back on resume.
    def state_dict(self) -> dict[str, Any]:
        return {"largest": dict(self.largest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.largest = dict(state_dict["largest"])


if __name__ == "__main__":
    seed_everything(42)
    trainer = Trainer(
        max_epochs=10, log_every_n_steps=10, callbacks=GradientNorms(), default_root_dir="runs/own_callback"
    )
    trainer.fit(DigitsCNN(), datamodule=Digits())
