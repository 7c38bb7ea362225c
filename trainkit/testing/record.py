"""What a certified run writes down of itself while it lives: a line for each batch, each validation, and its end.

Lines go straight to the file, so that those of a process that is killed are all there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit import Callback, Module, Trainer
from trainkit.metrics import numbers

MANY_WEIGHTS = 4_000_000
"""Above so many the weights are looked at after validations and at the end only."""


class Record(Callback):
    """Write down what a run saw, computed and became.

    Args:
        path: the file, which is appended to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._often = True

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._often = sum(parameter.numel() for parameter in pl_module.parameters()) <= MANY_WEIGHTS
        self._write(trainer, "begin")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._write(
            trainer,
            "batch",
            batch=digest(batch),
            **{f"output {key}": digest(value) for key, value in outputs.items() if isinstance(value, Tensor)},
            **{"learning rate": [group["lr"] for o in trainer.optimizers for group in o.param_groups]},
            **({"weights": digest(pl_module.state_dict())} if self._often else {}),
        )

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, "validation", **_metrics(trainer), weights=digest(pl_module.state_dict()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._write(trainer, "epoch", **_metrics(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        self._write(
            trainer,
            "end",
            weights=digest(pl_module.state_dict()),
            **{"optimizer state": digest(optimizers), "schedules": digest(schedules)},
            counters=trainer.progress.state_dict(),
        )

    def _write(self, trainer: Trainer, event: str, **values: Any) -> None:
        progress = trainer.progress
        line = {"event": event, "at": progress.total_batch, "step": progress.step, **values}
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, f"{json.dumps(line)}\n".encode())
        finally:
            os.close(descriptor)


def _metrics(trainer: Trainer) -> dict[str, str]:
    return {f"metric {name}": value.hex() for name, value in numbers(trainer.callback_metrics).items()}


def digest(value: Any) -> str:
    """Return a digest of everything in a value, to the last bit."""
    sha = hashlib.sha256()
    _update(sha, value)
    return sha.hexdigest()[:16]


def _update(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        host = value.detach().cpu().contiguous()
        sha.update(f"{host.dtype}{tuple(host.shape)}".encode())
        if host.is_sparse or not host.numel():
            sha.update(repr(host.coalesce() if host.layout is torch.sparse_coo else host).encode())
        else:
            sha.update(host.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            sha.update(repr(key).encode())
            _update(sha, inner)
    elif isinstance(value, (list, tuple)):
        sha.update(f"{len(value)}".encode())
        for inner in value:
            _update(sha, inner)
    elif " at 0x" in (text := repr(value)):  # its address would tell it from itself
        _update(sha, vars(value) if hasattr(value, "__dict__") else type(value).__qualname__)
    else:
        sha.update(text.encode())
