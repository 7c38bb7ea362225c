"""StochasticWeightAveraging: train the last epochs at a high, constant learning rate, and end with their average."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from trainkit import Callback
from trainkit.errors import MisconfigurationException, warn
from trainkit.metrics import TRAIN_BATCH, Metrics
from trainkit.optim import LRSchedulerConfig
from trainkit.random import isolated_random

if TYPE_CHECKING:
    from trainkit import Module, Trainer

AvgFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class StochasticWeightAveraging(Callback):
    """Average the weights that the last epochs start with, and leave the average in the module when training ends.

    From `swa_epoch_start` on the learning rate moves to `swa_lrs`, whatever the module's own schedule says (Izmailov et
    al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018). When the module has batch
    normalization, its statistics are measured anew at the end: once through the training data, in training mode,
    without an update, a log or a hook. Checkpoints have the weights that are being trained; the average is with this
    callback's state.

    Args:
        swa_lrs: the learning rate, or one for each parameter group.
        swa_epoch_start: the first epoch that is averaged, counted from 1, or the fraction of `max_epochs` (float).
        annealing_epochs: epochs until `swa_lrs` is reached.
        annealing_strategy: "cos" or "linear".
        avg_fn: the new average from the average, the weights and how many were averaged; None: the mean.
        device: where the average is kept; None: where the module is.

    Raises:
        MisconfigurationException: an argument that can't work; when fit starts, several optimizers or schedules, a
            fraction without `max_epochs`, or batch normalization with manual optimization.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: AvgFn | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        def refuse(argument: str, expected: str, received: object) -> MisconfigurationException:
            return MisconfigurationException(
                f"StochasticWeightAveraging({argument}=...) must be {expected}. Received: {received!r}."
            )

        rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        if not all(isinstance(rate, float) and rate > 0 for rate in rates):
            raise refuse("swa_lrs", "a positive float or a list of them", swa_lrs)
        whole = isinstance(swa_epoch_start, int) and swa_epoch_start >= 1
        if not whole and not (isinstance(swa_epoch_start, float) and 0 <= swa_epoch_start <= 1):
            raise refuse("swa_epoch_start", "an int from 1 or a float from 0 to 1", swa_epoch_start)
        if not isinstance(annealing_epochs, int) or annealing_epochs < 0:
            raise refuse("annealing_epochs", "an int from 0", annealing_epochs)
        if annealing_strategy not in ("cos", "linear"):
            raise refuse("annealing_strategy", '"cos" or "linear"', annealing_strategy)
        if avg_fn is not None and not callable(avg_fn):
            raise refuse("avg_fn", "a function of three tensors", avg_fn)
        if device is not None and not isinstance(device, (torch.device, str)):
            raise refuse("device", "a torch.device or its name", device)
        self._swa_lrs = swa_lrs
        self._swa_epoch_start = swa_epoch_start
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy: Literal["cos", "linear"] = annealing_strategy
        self._avg_fn: AvgFn = avg_fn or self.avg_fn
        self._device = device
        self._max_epochs = -1
        self._begin_run()

    def _begin_run(self) -> None:
        self.n_averaged: Tensor | None = None
        self._start = 0
        self._latest_update_epoch = -1
        self._average_model: Module | None = None
        self._swa_scheduler: SWALR | None = None
        self._loaded: dict[str, Any] | None = None
        self._trained: dict[str, Any] | None = None  # the weights that were trained, once the module has the average

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle is not part of the run, but it knows as much as a checkpoint does
        return {**self.__dict__, "_average_model": None, "_swa_scheduler": None, "_loaded": self.state_dict()}

    @property
    def swa_start(self) -> int:
        """The first epoch that is averaged, counted from 0; known when fit has started."""
        return self._start

    @property
    def swa_end(self) -> int | float:
        """The last one."""
        return float("inf") if self._max_epochs == -1 else self._max_epochs - 1

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: nn.Module) -> bool:
        """Whether a module has batch normalization in it."""
        return any(isinstance(part, _BatchNorm) for part in pl_module.modules())

    # ---- a run begins
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit":
            self._begin_run()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Give the module the weights that were being trained, from a checkpoint that was saved after training."""
        if trainer.stage == "fit" and "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._check(trainer, pl_module)
        self._max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        first = self._swa_epoch_start
        if isinstance(first, float):
            first = int(self._max_epochs * first)
        self._start = max(first - 1, 0)
        if self._loaded is not None and self._loaded["n_averaged"]:
            self._begin_averaging(trainer, pl_module, self._loaded["n_averaged"])
            assert self._average_model is not None
            self._average_model.load_state_dict(self._loaded["average_model_state"], strict=pl_module.strict_loading)
        self._loaded = None

    def _check(self, trainer: Trainer, pl_module: Module) -> None:
        for what, there in (("optimizer", trainer.optimizers), ("lr scheduler", trainer.lr_scheduler_configs)):
            if len(there) > 1 or (what == "optimizer" and not there):
                raise MisconfigurationException(
                    f"StochasticWeightAveraging works with one {what}. configure_optimizers returned {len(there)}."
                )
        if isinstance(self._swa_epoch_start, float) and trainer.max_epochs in (None, -1):
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_epoch_start={self._swa_epoch_start}) is a share of max_epochs, which "
                "has no limit here. Give an int."
            )
        if not pl_module.automatic_optimization and self.pl_module_contains_batch_norm(pl_module):
            raise MisconfigurationException(
                "StochasticWeightAveraging can't measure batch normalization's statistics anew with "
                "automatic_optimization=False: training_step would train. Use WeightAveraging(), which averages them."
            )

    # ---- averaging
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        epoch = trainer.current_epoch
        if not self.swa_start <= epoch <= self.swa_end:
            return
        if self._average_model is None:
            self._begin_averaging(trainer, pl_module, 0)
        if epoch > self._latest_update_epoch:
            assert self._average_model is not None
            assert self.n_averaged is not None
            self.update_parameters(self._average_model, pl_module, self.n_averaged, self._avg_fn)
            self._latest_update_epoch = epoch

    def _begin_averaging(self, trainer: Trainer, pl_module: Module, averaged: int) -> None:
        """Make the average, and put its schedule in the place of the module's own."""
        with torch.no_grad():
            self._average_model = copy.deepcopy(pl_module).to(
                pl_module.device if self._device is None else self._device
            )
        self.n_averaged = torch.tensor(averaged, dtype=torch.long, device=pl_module.device)
        optimizer = trainer.optimizers[0]
        rates = self._swa_lrs if isinstance(self._swa_lrs, list) else [self._swa_lrs] * len(optimizer.param_groups)
        for rate, group in zip(rates, optimizer.param_groups, strict=False):  # SWALR compares their number
            group["initial_lr"] = rate
        self._swa_scheduler = SWALR(
            optimizer,
            swa_lr=rates,  # type: ignore[arg-type]
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,
        )
        for config in trainer.lr_scheduler_configs:
            if config.interval != "epoch" or config.frequency != 1:
                warn(
                    f"StochasticWeightAveraging replaces {type(config.scheduler).__name__}, which moves every "
                    f"{config.frequency} {config.interval}s, by a schedule that moves every epoch."
                )
        trainer.lr_scheduler_configs[:] = [LRSchedulerConfig(self._swa_scheduler)]
        trainer.schedules.sort(trainer.lr_scheduler_configs)

    @staticmethod
    @torch.no_grad()
    def update_parameters(average_model: nn.Module, model: nn.Module, n_averaged: Tensor, avg_fn: AvgFn) -> None:
        """Take a model's parameters into the average of `n_averaged` earlier ones, and count them."""
        first = not n_averaged
        for average, current in zip(average_model.parameters(), model.parameters(), strict=True):
            value = current.to(average.device)
            average.copy_(value if first else avg_fn(average, value, n_averaged.to(average.device)))
        n_averaged += 1

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor) -> Tensor:
        """Return the mean of all."""
        return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

    @staticmethod
    @torch.no_grad()
    def transfer_weights(src_pl_module: nn.Module, dst_pl_module: nn.Module) -> None:
        """Copy the parameters of one module to another."""
        for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters(), strict=True):
            target.copy_(source)

    # ---- using it
    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._average_model is None:
            return
        self._trained = {
            name: value.to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in pl_module.state_dict().items()
        }
        self.transfer_weights(self._average_model, pl_module)
        if self.pl_module_contains_batch_norm(pl_module):
            measure_batch_norm(trainer, pl_module)

    # ---- resume
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        schedule, average = self._swa_scheduler, self._average_model
        return {
            "n_averaged": 0 if self.n_averaged is None else int(self.n_averaged),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if schedule is None else schedule.state_dict(),
            "average_model_state": None if average is None else average.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_epoch = state_dict["latest_update_epoch"]
        self._loaded = dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """After training, keep the weights that were trained beside the average, so that training can go on."""
        if self._trained is not None and trainer.stage is None and "optimizer_states" in checkpoint:
            checkpoint["current_model_state"] = self._trained


def measure_batch_norm(trainer: Trainer, module: Module) -> None:
    """Measure the statistics of a module's batch normalization anew: once through the run's training data.

    Every layer's statistics are the mean over all batches. Random state and logged values stay as they are.
    """
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean, not a moving average
    step = trainer.wrapped_step("training_step")
    epoch, endless = trainer.current_epoch, trainer.num_training_batches == float("inf")
    seen = trainer.progress.batch if endless and not epoch else None  # its end has not been seen yet
    try:
        with isolated_random(), _logging_nothing(trainer, module) as metrics:
            for batch_idx, batch, _ in islice(trainer.sources.train.epoch(epoch), seen):
                metrics.batch = batch if trainer.transfer is None else trainer.transfer(batch, 0)
                step(metrics.batch, batch_idx)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@contextmanager
def _logging_nothing(trainer: Trainer, module: Module) -> Iterator[Metrics]:
    """Take what the module logs meanwhile, and forget it."""
    metrics = Metrics(module)
    metrics.start_batches(TRAIN_BATCH)
    module.attach(trainer, metrics)
    try:
        yield metrics
    finally:
        metrics.train.reset()  # its metric objects are the run's
        module.attach(trainer, trainer.metrics)
