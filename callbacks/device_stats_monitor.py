"""DeviceStatsMonitor: log how full the device's memory is, and how busy the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainkit import Callback
from trainkit.accelerators import CPUAccelerator
from trainkit.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class DeviceStatsMonitor(Callback):
    """Log statistics of the device before and after batches of training, validation and test.

    That is done at every `log_every_n_steps`-th update, and at every so-manieth batch of an evaluation. A name is made
    of the class, the hook and the statistic: "DeviceStatsMonitor.on_train_batch_end/allocated_bytes.all.peak". On cuda
    they are those of `torch.cuda.memory_stats`, which does not wait for the device; of the host they are "cpu_percent",
    "cpu_vm_percent" (memory) and "cpu_swap_percent", and need psutil. An `Accelerator` of your own says what it likes.

    Args:
        cpu_stats: log those of the host: True always, False never, None when the run is on the cpu.

    Raises:
        MisconfigurationException: when fit begins, the Trainer has no logger.
        ModuleNotFoundError: when a run begins, statistics of the host are wanted and psutil is not installed.

    Example:
        >>> monitor = DeviceStatsMonitor(cpu_stats=True)  # Trainer(callbacks=[monitor])
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self.cpu_stats = cpu_stats
        self._x = 0  # of the training batch that runs
        self._due = False  # whether it is logged
        self._evaluated = 0  # batches, of the evaluation that runs

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Find out before anything runs if something is missing."""
        if stage == "fit" and not trainer.loggers and not trainer.fast_dev_run:  # which has taken them away
            raise MisconfigurationException(
                "DeviceStatsMonitor needs a logger, and this Trainer has none. "
                "Leave out logger=False or take DeviceStatsMonitor out of the callbacks."
            )
        self._stats(trainer)  # thrown away: the first percentages are those since the process began

    # ---- training
    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        self._x, every = trainer.global_step, trainer.log_every_n_steps
        self._due = every > 0 and ((self._x + 1) % every == 0 or trainer.should_stop)
        if self._due:
            self._log(trainer, "on_train_batch_start", self._x)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._due or (trainer.should_stop and trainer.log_every_n_steps):
            self._log(trainer, "on_train_batch_end", self._x)

    # ---- evaluation
    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._evaluated = 0

    on_test_start = on_validation_start

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluated += 1
        self._evaluation(trainer, "on_validation_batch_start")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluation(trainer, "on_validation_batch_end")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluated += 1
        self._evaluation(trainer, "on_test_batch_start")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluation(trainer, "on_test_batch_end")

    def _evaluation(self, trainer: Trainer, hook: str) -> None:
        every = trainer.log_every_n_steps
        if every and (self._evaluated % every == 0 or trainer.should_stop):
            self._log(trainer, hook, trainer.log_step if trainer.stage == "fit" else trainer.global_step)

    # ---- logging
    def _log(self, trainer: Trainer, hook: str, step: int) -> None:
        stats = self._stats(trainer) if trainer.loggers else {}
        for logger in trainer.loggers if stats else ():
            prefix = f"{type(self).__qualname__}.{hook}{logger.group_separator}"
            logger.log_metrics(metrics={f"{prefix}{name}": value for name, value in stats.items()}, step=step)

    def _stats(self, trainer: Trainer) -> dict[str, Any]:
        on_cpu = trainer.device.type == "cpu"
        if on_cpu and self.cpu_stats is False:
            return {}
        stats = trainer.accelerator.get_device_stats(trainer.device)
        if self.cpu_stats and not on_cpu:
            stats = {**stats, **CPUAccelerator().get_device_stats("cpu")}
        return stats
