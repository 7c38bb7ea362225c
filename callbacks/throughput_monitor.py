"""ThroughputMonitor: log how much is done in a second, and how much of the device that takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainkit import Callback
from trainkit.errors import warn
from trainkit.flops import get_available_flops
from trainkit.throughput import Throughput

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class ThroughputMonitor(Callback):
    """Log batches, samples, items and floating-point operations a second to the loggers, every `log_every_n_steps`.

    In between, batches are only counted: the device is waited for when values are logged, and the time is read then.
    Names begin with "train", "validate", "test" or "predict"; see `Throughput.compute` for the rest. Validation does
    not count in the time of the training.

    For FLOPs and MFU the module needs `flops_per_batch`, a number or a property: the operations of one batch on one
    device, which `measure_flops` can tell.

    Args:
        batch_size_fn: returns the number of samples in a batch.
        length_fn: returns the number of items in a batch, for example of tokens.
        kwargs: of `Throughput`: `window_size` (over how many batches a rate is taken, default 100; rates are there
            after so many), `separator`.

    Raises:
        ValueError, TypeError: `Throughput` can't be made with these.

    Example:
        >>> class Net(torch.nn.Module):  # a trainkit.Module
        ...     flops_per_batch = 2_000_000
        >>> monitor = ThroughputMonitor(batch_size_fn=len, window_size=50)
    """

    def __init__(
        self, batch_size_fn: Callable[[Any], int], length_fn: Callable[[Any], int] | None = None, **kwargs: Any
    ) -> None:
        Throughput(available_flops=None, world_size=1, **kwargs)  # does it work? then before anything runs
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.kwargs = kwargs
        self.available_flops: int | None = None
        self._meters: dict[str, _Meter] = {}
        self._paused = 0.0

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Find out what the device could do."""
        self.available_flops = get_available_flops(trainer.device, compute_dtype(trainer.precision))
        if not hasattr(pl_module, "flops_per_batch") and trainer.is_global_zero:
            warn(
                f"ThroughputMonitor: {type(pl_module).__name__} has no flops_per_batch, so FLOPs and MFU are left out. "
                "Set it, for example in setup, to what trainkit.throughput.measure_flops returns."
            )

    # ---- a part of the run begins, or pauses
    def _start(self, trainer: Trainer, pl_module: Module, stage: str, batches_per_log: int) -> None:
        window = self.kwargs.get("window_size", 100)
        if batches_per_log > 1:  # the first batch, and then one measurement each time something is logged
            window = math.ceil(window / batches_per_log) + 1
        throughput = Throughput(
            available_flops=self.available_flops,
            world_size=trainer.world_size,
            **{**self.kwargs, "window_size": max(window, 2)},
        )
        before, fitting = self._meters.get(stage), trainer.stage == "fit"
        meter = before if before is not None and not fitting else _Meter(hasattr(pl_module, "flops_per_batch"))
        self._meters[stage] = meter  # a second test goes on counting
        if before is not None and stage == "validate":
            if not fitting and before.epoch is not None:
                meter.offset = -before.batches  # evaluations alone have x values of their own
            elif fitting and before.epoch == trainer.current_epoch:  # several validations of one epoch share theirs
                meter.offset = before.offset + before.batches
        meter.epoch = trainer.current_epoch if fitting else None
        meter.throughput, meter.began, meter.measured = throughput, now(trainer.device), 0
        meter.first, meter.step = meter.batches + 1, trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.is_global_zero:
            self._start(trainer, pl_module, "train", trainer.log_every_n_steps * trainer.accumulate_grad_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._start(trainer, pl_module, "validate", trainer.log_every_n_steps)
            self._paused = self._meters["validate"].began

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking and trainer.stage == "fit":
            self._meters["train"].began += now(trainer.device) - self._paused

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.is_global_zero:
            self._start(trainer, pl_module, "test", trainer.log_every_n_steps)

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.is_global_zero:
            self._start(trainer, pl_module, "predict", trainer.log_every_n_steps)

    # ---- a batch is done
    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        meter = self._meters["train"]
        self._count(trainer, pl_module, meter, batch)
        step, every = trainer.global_step, trainer.log_every_n_steps
        if step != meter.step and every and (step % every == 0 or trainer.should_stop):
            self._log(trainer, "train", None)
        meter.step = step

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._evaluated(trainer, pl_module, "validate", batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluated(trainer, pl_module, "test", batch)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluated(trainer, pl_module, "predict", batch)

    def _evaluated(self, trainer: Trainer, pl_module: Module, stage: str, batch: Any) -> None:
        if not trainer.is_global_zero:
            return
        meter, every = self._meters[stage], trainer.log_every_n_steps
        self._count(trainer, pl_module, meter, batch)
        if every and (meter.batches - meter.first + 1) % every == 0:
            self._log(trainer, stage, meter.offset + meter.batches)

    # ---- measuring
    def _count(self, trainer: Trainer, pl_module: Module, meter: _Meter, batch: Any) -> None:
        meter.batches += 1
        meter.samples += self.batch_size_fn(batch)
        if self.length_fn is not None:
            meter.lengths += self.length_fn(batch)
        if meter.has_flops:
            flops: Any = pl_module.flops_per_batch
            meter.flops += flops
        if meter.batches == meter.first and trainer.loggers:  # rates begin after it: it compiles, allocates, warms up
            self._measure(trainer, meter)

    def _measure(self, trainer: Trainer, meter: _Meter) -> None:
        if meter.measured == meter.batches:
            return
        meter.throughput.update(
            time=now(trainer.device) - meter.began,
            batches=meter.batches,
            samples=int(meter.samples),
            lengths=int(meter.lengths) if self.length_fn is not None else None,
            flops=int(meter.flops) if meter.has_flops else None,
        )
        meter.measured, meter.flops = meter.batches, 0

    def _log(self, trainer: Trainer, stage: str, step: int | None) -> None:
        if trainer.loggers:
            meter = self._meters[stage]
            self._measure(trainer, meter)
            values = meter.throughput.compute()
            trainer.log_metrics({f"{stage}{meter.throughput.separator}{name}": v for name, v in values.items()}, step)


class _Meter:
    """What was counted in one part of a run."""

    throughput: Throughput

    def __init__(self, has_flops: bool) -> None:
        self.has_flops = has_flops
        self.batches = self.samples = self.lengths = self.flops = 0  # flops: since the last measurement
        self.began = 0.0
        self.first = 1  # the batch at which measuring begins
        self.measured = 0  # how many batches there were then
        self.step = 0
        self.offset = 0  # from the batches to the x value of an evaluation
        self.epoch: int | None = None  # of the fit it is part of


def now(device: torch.device) -> float:
    """Return the time in seconds when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def compute_dtype(precision: str) -> torch.dtype:
    """Return what a precision multiplies matrices in."""
    for start, dtype in (("bf16", torch.bfloat16), ("16", torch.float16), ("64", torch.float64)):
        if precision.startswith(start):
            return dtype
    return torch.float32
