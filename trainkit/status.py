"""What a run tells about itself: counters, stage, metrics, data, components. Reading any of it changes nothing."""

from __future__ import annotations

import math
import os
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch

from trainkit.errors import MisconfigurationException
from trainkit.loggers.base import FileLogger, run_directory
from trainkit.loops import EvaluationLoop, FitLoop, PredictionLoop
from trainkit.stages import RunningStage, TrainerFn, TrainerStatus

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from trainkit.accelerators import Accelerator
    from trainkit.agreement import Agreement
    from trainkit.callback import Callback
    from trainkit.callbacks import ProgressBar
    from trainkit.checkpoint.io import CheckpointIO
    from trainkit.compiling import Compiler
    from trainkit.cuda_graphs import Graphs
    from trainkit.data.sources import Clock, Sources
    from trainkit.fused import Watch
    from trainkit.hooks import Hooks
    from trainkit.loggers import Logger
    from trainkit.metrics import Metrics
    from trainkit.module import Module
    from trainkit.optim import Schedules
    from trainkit.precision import Precision
    from trainkit.profiler import Profiler
    from trainkit.signals import Interruption
    from trainkit.stages import TrainerState
    from trainkit.state import Progress
    from trainkit.strategies import Strategy
    from trainkit.trainer import Trainer
    from trainkit.update import Update


class Status:
    """The read-only side of a Trainer, under Lightning's names. No property communicates between processes."""

    module: Module
    hooks: Hooks
    schedules: Schedules
    update: Update
    progress: Progress
    metrics: Metrics
    sources: Sources
    interruption: Interruption
    agreement: Agreement | None
    callbacks: list[Callback]
    loggers: list[Logger]
    accelerator: Accelerator
    precision_plugin: Precision
    strategy: Strategy
    checkpoint_io: CheckpointIO
    profiler: Profiler
    optimizers: list[Optimizer]
    watches: list[Watch]
    state: TrainerState
    default_root_dir: str
    fast_dev_run: int | bool
    barebones: bool
    compile: bool | str | dict[str, Any]
    fused_optimizers: bool
    matmul_precision: str | None
    channels_last: bool
    compiler: Compiler | None
    graphs: Graphs | None
    num_nodes: int
    num_sanity_val_steps: int | float
    log_every_n_steps: int
    limit_train_batches: int | float
    limit_val_batches: int | float
    limit_test_batches: int | float
    limit_predict_batches: int | float
    overfit_batches: int | float
    reload_dataloaders_every_n_epochs: int
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: str | None
    deterministic: bool | str | None
    benchmark: bool | None
    inference_mode: bool
    detect_anomaly: bool
    nan_policy: str
    sync_batchnorm: bool
    use_distributed_sampler: bool
    keep_batch: str
    enable_autolog_hparams: bool
    max_time: timedelta | None
    should_stop: bool
    batch_idx: int
    evaluation_idx: int
    watchdog: bool | float | None
    is_last_batch: bool
    max_epochs: int | None
    accumulate_grad_batches: int
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    val_check_interval: float | timedelta
    check_val_every_n_epoch: int | None
    _since_validation: Clock
    _given_ckpt_path: str | os.PathLike[str] | None
    resume_path: str | None

    # ---- counters
    @property
    def current_epoch(self) -> int:
        """The epoch that is running, from 0; one more after its end, which a limit may bring about."""
        cut_short = not self.fitting and not self.interrupted and self.progress.batch > 0
        return self.progress.epoch + cut_short

    @property
    def fitting(self) -> bool:
        """Whether fit is running, sanity check and validation included."""
        return self.state.fn is TrainerFn.FITTING and self.state.status is TrainerStatus.RUNNING

    @property
    def global_step(self) -> int:
        """How many optimizer updates are done; several optimizers stepping in one batch count once."""
        return self.progress.step

    @property
    def skipped_updates(self) -> int:
        """How many updates `nan_policy="skip"` left out so far; `global_step` counts them, too."""
        return self.progress.skipped

    @property
    def recompiles(self) -> int:
        """How often `Trainer(compile=...)` had to compile a step again; each time costs seconds, and warns."""
        return self.compiler.recompiles if self.compiler is not None else 0

    @property
    def estimated_stepping_batches(self) -> int | float:
        """How many optimizer updates the whole run has, for schedules that need to know; infinity without a limit."""
        if "train" not in self.sources.loaders:
            if self.model is None:
                raise MisconfigurationException(
                    "estimated_stepping_batches depends on the training data: it is known from fit on, for example in "
                    "configure_optimizers."
                )
            self.sources.load_train()
        batches = self.num_training_batches
        if self.max_epochs is None or self.max_epochs == -1 or batches == math.inf:
            return self.max_steps if self.max_steps != -1 else math.inf
        updates = math.ceil(batches / self.accumulate_grad_batches) * max(self.max_epochs, 1)
        return min(updates, self.max_steps) if self.max_steps != -1 else updates

    @property
    def log_step(self) -> int:
        """The x value of what is logged now: in fit, how many updates were over before this batch."""
        return self.metrics.x

    # ---- limits
    @property
    def done(self) -> bool:
        """Whether the run has reached one of its limits."""
        epochs_over = self.max_epochs is not None and 0 <= self.max_epochs <= self.progress.epoch
        return not self.progress.validating and (epochs_over or self.stopping)

    @property
    def stopping(self) -> bool:
        """Whether the run ends after this batch: a step limit, `should_stop`, or a signal."""
        heard = self.interruption if self.agreement is None else self.agreement
        return heard.signal is not None or self.at_limit

    @property
    def signal(self) -> int | None:
        """The signal that ends this run; with several processes, one that all of them know of."""
        return self.interruption.signal if self.agreement is None else self.agreement.signal

    @property
    def stop_wanted(self) -> bool:
        """Whether `should_stop` is set; with several processes, where all of them know of it."""
        return self.should_stop if self.agreement is None else self.agreement.should_stop

    @property
    def at_limit(self) -> bool:
        """Whether this batch is the run's last by its own settings: a step limit, or `should_stop`."""
        if 0 <= self.max_steps <= self.progress.step:
            return True
        return (self.should_stop if self.agreement is None else self.agreement.should_stop) and self._may_stop()

    def _may_stop(self) -> bool:
        """Whether min_epochs and min_steps are reached, so that `should_stop` is honoured."""
        epochs = self.progress.epoch + (self.is_last_batch and self.progress.batch > 0)
        return epochs >= (self.min_epochs or 0) and self.progress.step >= (self.min_steps or 0)

    def validation_due(self, is_last: bool) -> bool:
        """Whether to validate after the batch that has just been counted."""
        if not self.sources.loaders.get("val"):
            return False
        every, interval, n = self.sources.val_every, self.val_check_interval, self.check_val_every_n_epoch
        if n is not None and (self.progress.epoch + 1) % n:
            return False
        if isinstance(interval, timedelta):
            if self.agreement is not None:
                return self.agreement.due("validation")
            return self._since_validation.passed(interval)
        if self.stop_wanted and self._may_stop():
            return True
        if every is None:
            return is_last
        return (self.progress.batch if n is not None else self.progress.total_batch) % every == 0

    # ---- stage
    @property
    def stage(self) -> str | None:
        """ "fit", "validate", "test" or "predict" while one of them runs, else None."""
        return None if self.state.stage is None or self.state.fn is None else str(self.state.fn.value)

    @property
    def training(self) -> bool:
        """Whether the run is in fit and not validating."""
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        """Whether the run is validating, inside fit or alone."""
        return self.state.stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        """Whether the run is in test."""
        return self.state.stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        """Whether the run is in predict."""
        return self.state.stage is RunningStage.PREDICTING

    @property
    def sanity_checking(self) -> bool:
        """Whether the run tries its validation before training."""
        return self.state.stage is RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        """Whether the run is validating or testing, a sanity check included."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether a signal or an exception ended the last run, or is about to."""
        heard = self.interruption if self.agreement is None else self.agreement
        return heard.signal is not None or self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """Whether SIGTERM asked this run to end."""
        return self.interruption.signal == signal.SIGTERM

    # ---- metrics
    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Everything that was logged, newest values, as 0-dimensional tensors."""
        return self.metrics.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """What the loggers got, newest values, as 0-dimensional tensors."""
        return self.metrics.logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What was logged with prog_bar=True, newest values. Reading it waits for the device."""
        return self.metrics.progress_bar_metrics

    # ---- data
    @property
    def num_training_batches(self) -> int | float:
        """Training batches of an epoch; infinity when the loader does not say."""
        return next((loader.num_batches for loader in self.sources.loaders.get("train", [])), math.inf)

    @property
    def num_val_batches(self) -> list[int | float]:
        """Validation batches of each loader."""
        return self.sources.num_batches("val")

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Validation batches of each loader that the sanity check tries."""
        batches = self.num_val_batches if self.state.fn is TrainerFn.FITTING else []
        return [min(self.num_sanity_val_steps, number) for number in batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """Test batches of each loader."""
        return self.sources.num_batches("test")

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Batches to predict of each loader."""
        return self.sources.num_batches("predict")

    @property
    def train_dataloader(self) -> Any:
        """The training loader as the user gave it, in its structure; None before there is one."""
        return self.sources.objects.get("train")

    @property
    def val_dataloaders(self) -> Any:
        """The validation loaders as the user gave them, in their structure."""
        return self.sources.objects.get("val")

    @property
    def test_dataloaders(self) -> Any:
        """The test loaders as the user gave them, in their structure."""
        return self.sources.objects.get("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The predict loaders as the user gave them, in their structure."""
        return self.sources.objects.get("predict")

    @property
    def enable_validation(self) -> bool:
        """Whether fit validates."""
        return self.sources.defined("val")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """What a sampler needs to know to give each process its part; None with one process."""
        return self.strategy.distributed_sampler_kwargs

    # ---- Lightning's loops
    @property
    def fit_loop(self) -> FitLoop:
        """The limits and counters of fit, as Lightning code reads and sets them."""
        return FitLoop(cast("Trainer", self))

    @property
    def validate_loop(self) -> EvaluationLoop:
        """The limits of validate."""
        return EvaluationLoop(cast("Trainer", self), "val")

    @property
    def test_loop(self) -> EvaluationLoop:
        """The limits of test."""
        return EvaluationLoop(cast("Trainer", self), "test")

    @property
    def predict_loop(self) -> PredictionLoop:
        """The limits of predict, and what it returned."""
        return PredictionLoop(cast("Trainer", self), "predict")

    # ---- components
    @property
    def model(self) -> Module | None:
        """The module, as Lightning calls it; None before the first run."""
        return getattr(self, "module", None)

    @property
    def lightning_module(self) -> Module | None:
        """The module, as Lightning calls it; None before the first run."""
        return getattr(self, "module", None)

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None. Setting it replaces all loggers by one, or by none."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    @property
    def log_dir(self) -> str | None:
        """The first logger's run directory; of one that has none of its own, the `save_dir`, which may be None.

        Without loggers it is `default_root_dir`.
        """
        if not self.loggers:
            return self.default_root_dir
        first = self.loggers[0]
        directory = first.log_dir if isinstance(first, FileLogger) else first.save_dir
        return None if directory is None else str(directory)

    @property
    def run_dir(self) -> str:
        """Where files of this run go that are not a logger's, checkpoints first of all.

        `<save_dir>/<name>/<version>` of the first logger, in `default_root_dir` if it has no save_dir; without loggers
        `default_root_dir`.
        """
        return run_directory(self.loggers[0], self.default_root_dir) if self.loggers else self.default_root_dir

    @property
    def device(self) -> torch.device:
        """Where the module and its batches are during a run."""
        return self.strategy.device

    @property
    def precision(self) -> str:
        """The precision as it is written: "32-true", "bf16-mixed", ..."""
        return self.precision_plugin.precision

    @property
    def scaler(self) -> Any:
        """The gradient scaler of float16, None elsewhere."""
        return getattr(self.precision_plugin, "scaler", None)

    @property
    def ckpt_path(self) -> str | os.PathLike[str] | None:
        """The checkpoint that this or the last run began from. Set, it is the `ckpt_path` of every later call."""
        return self.resume_path or self._given_ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, path: str | os.PathLike[str] | None) -> None:
        self._given_ckpt_path = path

    @property
    def checkpoint_callback(self) -> Callback | None:
        """The first callback that writes checkpoints, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def checkpoint_callbacks(self) -> list[Callback]:
        """The callbacks that write checkpoints."""
        return [callback for callback in self.callbacks if callback.saves]

    @property
    def early_stopping_callback(self) -> Callback | None:
        """The first EarlyStopping, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Callback]:
        """The EarlyStopping callbacks."""
        from trainkit.callbacks import EarlyStopping

        return [callback for callback in self.callbacks if isinstance(callback, EarlyStopping)]

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress bar, or None."""
        from trainkit.callbacks import ProgressBar

        return next((callback for callback in self.callbacks if isinstance(callback, ProgressBar)), None)

    @property
    def seed(self) -> int | None:
        """What `seed_everything` was called with in this process, None when it was not."""
        given = os.environ.get("PL_GLOBAL_SEED", "")
        return int(given) if given.isdigit() else None

    # ---- processes
    @property
    def global_rank(self) -> int:
        """The number of this process, from 0."""
        return self.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine, from 0."""
        return self.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """The number of this machine, from 0."""
        return self.strategy.node_rank

    @property
    def num_devices(self) -> int:
        """How many devices the run uses on this machine."""
        return self.strategy.world.local_size

    @property
    def device_ids(self) -> list[int]:
        """Which devices the run uses on this machine."""
        devices = self.num_devices
        return list(range(devices)) if devices > 1 else [self.device.index or 0]

    @property
    def world_size(self) -> int:
        """How many processes the run has."""
        return self.strategy.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return self.global_rank == 0


def results_table(stage: str, results: list[dict[str, float]]) -> str:
    """Return an evaluation's results as a table, a column for each loader."""
    columns = [
        {name.removesuffix(f"/dataloader_idx_{i}"): value for name, value in result.items()}
        for i, result in enumerate(results)
    ]
    names = sorted({name for column in columns for name in column})
    if not names:
        return f"{stage}: nothing was logged"
    title = f"{stage.capitalize()} metric"
    width = max(map(len, [title, *names]))
    lines = [f"{title:<{width}}" + "".join(f"  {f'DataLoader {i}':>13}" for i in range(len(columns)))]
    for name in names:
        cells = "".join(f"  {column[name]:>13.6g}" if name in column else " " * 15 for column in columns)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(line.rstrip() for line in lines)
