"""Trainer: settings become components; a run is set up, handed to its loop, and torn down."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit import arguments, components, loop
from trainkit.callback import Callback
from trainkit.checkpoint import restore, store
from trainkit.data.sources import Clock, Sources
from trainkit.data.transfer import Transfer, check_device, transfer_of
from trainkit.datamodule import DataModule
from trainkit.devices import resolve as resolve_device
from trainkit.duration import parse_duration
from trainkit.errors import MisconfigurationException
from trainkit.hooks import Hooks, fitted, is_overridden
from trainkit.hparams import merged_hparams
from trainkit.loggers import Logger
from trainkit.metrics import Metrics
from trainkit.module import Module
from trainkit.optim import LRSchedulerConfig, ManualOptimizer, Schedules, check_closures, configure
from trainkit.precision import Precision, precision_of
from trainkit.random import isolated_random
from trainkit.signals import Interruption
from trainkit.state import Progress
from trainkit.status import Status, results_table
from trainkit.strategies import Strategy
from trainkit.tree import map_tensors

Stage = Literal["fit", "validate", "test", "predict"]
PrecisionName = Literal[
    "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "32", "16", "64", "bf16"
]  # fmt: skip


class Trainer(Status):
    """Train, validate, test and predict with a Module.

    Args:
        accelerator: "auto" (cuda, else mps, else cpu), "cpu", "gpu", "cuda" or "mps".
        strategy: "auto", or a Strategy object.
        devices: "auto", how many, or which (a list of indices).
        gpus: short for accelerator="gpu", devices=gpus.
        precision: "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", or a Precision object.
        logger: True (default) for a TensorBoardLogger, False for none, or one or several loggers.
        callbacks: one or several callbacks.
        fast_dev_run: True or a number of batches to run of every loop, to see that the code works; nothing is saved.
        max_epochs: stop after so many; -1 for no limit. Default 1000 if nothing else limits the run.
        min_epochs: go on for at least so many, whatever asks to stop.
        max_steps: stop after so many optimizer updates; -1 for no limit.
        min_steps: go on for at least so many updates.
        max_time: stop after a time: "DD:HH:MM:SS", a timedelta or a dict of its arguments.
        limit_train_batches: how many batches of an epoch (int) or what fraction (float); 0 turns training off.
        limit_val_batches: the same for validation, for each loader.
        limit_test_batches: the same for test.
        limit_predict_batches: the same for predict.
        overfit_batches: train and validate on so many batches (int) or that fraction, always the same ones.
        val_check_interval: when to validate: a fraction of the epoch (float), every n batches (int), or a time.
        check_val_every_n_epoch: validate in every n-th epoch only; None counts batches across epochs.
        num_sanity_val_steps: validation batches to try before training. Default 2; -1 for all.
        log_every_n_steps: hand step metrics to the loggers every n updates. Default 50; 0 for never.
        enable_checkpointing: add a ModelCheckpoint if there is none (default True).
        enable_progress_bar: add a RichProgressBar if there is none (default True).
        enable_model_summary: add a ModelSummary if there is none (default True).
        accumulate_grad_batches: update the weights every n batches, with the mean of their gradients.
        gradient_clip_val: clip gradients at this value.
        gradient_clip_algorithm: "norm" (default): their common 2-norm; "value": each element.
        deterministic: use deterministic algorithms only; "warn" warns where there is none.
        benchmark: let cuDNN try its algorithms and take the fastest.
        inference_mode: evaluate under torch.inference_mode (else torch.no_grad).
        detect_anomaly: let autograd name the operation that made a NaN. Slow.
        reload_dataloaders_every_n_epochs: ask for new loaders every n epochs; 0 for never.
        default_root_dir: where logs and checkpoints go (default: the current directory).

    Raises:
        ValueError, TypeError: an argument that can't work; the message names it and what is possible.
    """

    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        strategy: str | Strategy = "auto",
        devices: int | str | list[int] = "auto",
        gpus: int | None = None,
        precision: PrecisionName | int | Precision | None = None,
        logger: Logger | list[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        detect_anomaly: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check = arguments
        self.fast_dev_run = check.trial(fast_dev_run)
        self.max_epochs: int | None = check.count("max_epochs", max_epochs, least=-1)
        self.max_steps: int = check.count("max_steps", max_steps, least=-1, required=True)
        self.min_epochs: int | None = check.count("min_epochs", min_epochs, least=0)
        self.min_steps: int | None = check.count("min_steps", min_steps, least=0)
        check.order("min_epochs", min_epochs, "max_epochs", max_epochs)
        check.order("min_steps", min_steps, "max_steps", max_steps)
        self.max_time = parse_duration(max_time, argument="max_time") if max_time is not None else None
        self.limit_train_batches = check.limit("limit_train_batches", limit_train_batches)
        self.limit_val_batches = check.limit("limit_val_batches", limit_val_batches)
        self.limit_test_batches = check.limit("limit_test_batches", limit_test_batches)
        self.limit_predict_batches = check.limit("limit_predict_batches", limit_predict_batches)
        self.overfit_batches = check.limit("overfit_batches", overfit_batches, default=0.0)
        self.check_val_every_n_epoch = check.count("check_val_every_n_epoch", check_val_every_n_epoch, least=1)
        self.val_check_interval = check.validation_interval(val_check_interval, check_val_every_n_epoch)
        self.num_sanity_val_steps = check.count(
            "num_sanity_val_steps", 2 if num_sanity_val_steps is None else num_sanity_val_steps, least=-1
        )
        self.log_every_n_steps: int = check.count(
            "log_every_n_steps", 50 if log_every_n_steps is None else log_every_n_steps, least=0
        )
        self.accumulate_grad_batches: int = check.count(
            "accumulate_grad_batches", accumulate_grad_batches, least=1, required=True
        )
        self.gradient_clip_val = check.clip_value(gradient_clip_val)
        self.gradient_clip_algorithm = (
            check.choice("gradient_clip_algorithm", gradient_clip_algorithm, ("norm", "value")) or "norm"
        )
        self.reload_dataloaders_every_n_epochs: int = check.count(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, least=0, required=True
        )
        self.deterministic = check.flag("deterministic", deterministic, "warn")
        self.benchmark = check.flag("benchmark", benchmark)
        self.inference_mode = check.flag("inference_mode", inference_mode)
        self.detect_anomaly = check.flag("detect_anomaly", detect_anomaly)
        self.default_root_dir = check.folder("default_root_dir", default_root_dir)

        device = resolve_device(accelerator, devices, gpus)
        self.strategy = components.strategy_of(strategy, device)
        self.precision = precision_of(precision)
        if self.fast_dev_run:
            self._shorten(self.fast_dev_run)
        components.set_torch_switches(self.deterministic, self.benchmark)
        self.loggers = components.loggers_of(logger, self.default_root_dir, trial=bool(self.fast_dev_run))
        self.callbacks = components.callbacks_of(
            callbacks,
            enable_checkpointing=check.flag("enable_checkpointing", enable_checkpointing),
            enable_progress_bar=check.flag("enable_progress_bar", enable_progress_bar),
            enable_model_summary=check.flag("enable_model_summary", enable_model_summary),
            max_time=self.max_time,
        )
        if self.max_epochs is None:
            self.max_epochs = -1 if self.max_steps != -1 or self.max_time is not None else 1000
        if self.min_epochs is None and self.min_steps is not None:
            self.min_epochs = 1

        self.progress = Progress()
        self.metrics = Metrics()
        self.interruption = Interruption()
        self.command: str | None = None
        """The shell command that started this run, when the command line did."""
        self.resume_path: str | None = None
        """The checkpoint this run was resumed from."""
        self.should_stop = False
        """Set it to end the run after this batch."""
        self.is_last_batch = False
        self.stage: Stage | None = None
        self.sanity_checking = False
        self._inside_evaluation = False
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self.manual_optimizers: list[ManualOptimizer] = []
        self.stepped_manually = False
        self.datamodule: DataModule | None = None
        self.transfer: Transfer | None = None
        self.clip: Callable[[Optimizer], None] | None = None
        self.sources = Sources(self, {})
        self._since_validation = Clock()
        self._checkpoint: dict[str, Any] | None = None

    def _shorten(self, batches: int) -> None:
        """Make every loop a few batches long (`fast_dev_run`)."""
        self.max_epochs, self.max_steps, self.num_sanity_val_steps = 1, batches, 0
        self.val_check_interval, self.check_val_every_n_epoch = 1.0, 1
        self.limit_train_batches = self.limit_val_batches = batches
        self.limit_test_batches = self.limit_predict_batches = batches

    # ------------------------------------------------------------------ the four things a Trainer does
    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train.

        Args:
            model: what to train.
            train_dataloaders: an iterable of batches; or the DataModule.
            val_dataloaders: an iterable of batches, or several.
            datamodule: instead of loaders.
            ckpt_path: go on from this file, from "last" (the newest checkpoint of the newest run) or "best".
            weights_only: kept for Lightning's signature; nothing in a file is ever executed.

        Raises:
            MisconfigurationException: something in the module, the data or the settings can't work.
            CheckpointError: the checkpoint is missing, damaged or does not fit.
        """
        with self._running("fit", model, datamodule, train=train_dataloaders, val=val_dataloaders, ckpt_path=ckpt_path):
            if "train" not in self.sources.loaders:  # estimated_stepping_batches may have asked for it
                self.sources.load_train()
            self.sources.load_evaluation("val")
            self._restore_run()
            if not self.done and self.num_training_batches > 0:
                anomalies = torch.autograd.set_detect_anomaly(True) if self.detect_anomaly else nullcontext()
                with self.interruption.listening(), anomalies:
                    self._sanity_check()
                    loop.fit(self)
                    self.leave_if_interrupted()  # a signal before the first batch or after the last save

    def validate(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Evaluate on the validation set and return what was logged, a dict for each loader.

        Args:
            model: what to evaluate; None takes the module of the last fit, from its best checkpoint.
            dataloaders: an iterable of batches, or several; or the DataModule.
            ckpt_path: load the weights of this file first, of "best" or of "last".
            verbose: print the results.
            datamodule: instead of loaders.
            weights_only: kept for Lightning's signature; nothing in a file is ever executed.
        """
        return self._evaluate("validate", "val", model, dataloaders, ckpt_path, verbose, datamodule)

    def test(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Evaluate on the test set; arguments and result as for `validate`."""
        return self._evaluate("test", "test", model, dataloaders, ckpt_path, verbose, datamodule)

    def predict(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Run `predict_step` over the data and return what it gave for each batch, on the cpu.

        Args:
            model: what predicts; None takes the module of the last fit, from its best checkpoint.
            dataloaders: an iterable of batches, or several (then a list for each is returned); or the DataModule.
            datamodule: instead of loaders.
            return_predictions: False keeps nothing and returns None, for callbacks that write predictions out.
            ckpt_path: load the weights of this file first, of "best" or of "last".
            weights_only: kept for Lightning's signature; nothing in a file is ever executed.
        """
        keep = return_predictions is not False
        ckpt_path = self._default_checkpoint(model, ckpt_path)
        with self._running("predict", model, datamodule, predict=dataloaders, ckpt_path=ckpt_path):
            self.sources.load_evaluation("predict")
            predictions = loop.predict(self, self.sources.loaders["predict"], keep)
        return predictions if keep else None

    def _evaluate(
        self,
        stage: Literal["validate", "test"],
        kind: str,
        model: Module | None,
        dataloaders: Any,
        ckpt_path: str | os.PathLike[str] | None,
        verbose: bool,
        datamodule: DataModule | None,
    ) -> list[dict[str, float]]:
        ckpt_path = self._default_checkpoint(model, ckpt_path)
        event = "validation" if stage == "validate" else "test"
        with self._running(stage, model, datamodule, ckpt_path=ckpt_path, **{kind: dataloaders}):
            if not is_overridden(self.module, f"{event}_step"):
                raise MisconfigurationException(
                    f"{type(self.module).__name__} has no {event}_step, which {stage} calls with each batch."
                )
            self.sources.load_evaluation(kind)
            results = loop.evaluate(self, event, self.sources.loaders[kind])
        if verbose:
            self.print(results_table(stage, results))
        return results

    # ------------------------------------------------------------------ a run: set up, tear down, errors
    @contextmanager
    def _running(
        self,
        stage: Stage,
        model: Module | None,
        datamodule: DataModule | None,
        ckpt_path: str | os.PathLike[str] | None = None,
        **sources: Any,
    ) -> Iterator[None]:
        """Set a run up in Lightning's order, and tear it down whatever happens."""
        self._attach(stage, model, datamodule, sources)
        if stage == "fit":
            components.check_can_train(self)
        module, hooks = self.module, self.hooks
        data: list[DataModule] = [self.datamodule] if self.datamodule is not None else []
        status = "failed"
        try:
            for prepare_data in [*(part.prepare_data for part in data), module.prepare_data]:
                prepare_data()
            self._read_checkpoint(ckpt_path, stage)
            if stage == "fit":
                components.claim_directories(self.loggers)
            for part in data:
                part.setup(stage)
            hooks.setup(stage)
            if self._checkpoint is not None:
                restore.restore_weights(self, self._checkpoint, Path(self.resume_path or ""))
            self.precision.convert_module(module)
            self.strategy.setup(module)
            if stage == "fit":
                self._configure_optimizers()
                hooks.on_fit_start()
            if stage != "predict":
                self._log_hyperparameters()
            self.precision.attach(self.optimizers if stage == "fit" else [], self.device)
            self.transfer = transfer_of(self.strategy, module, self.datamodule)
            yield
            self.strategy.teardown(module)
            if stage == "fit":
                hooks.on_fit_end()
            status = "success"
        except BaseException as error:
            status = "interrupted" if self.interrupted or isinstance(error, KeyboardInterrupt) else "failed"
            hooks.on_exception(error)
            for part in data:
                part.on_exception(error)
            self.strategy.teardown(module)
            raise
        finally:
            self._tear_down(stage, data, status)

    def _attach(
        self, stage: Stage, model: Module | None, datamodule: DataModule | None, sources: dict[str, Any]
    ) -> None:
        """Check what the run is called with, and make its table of hooks."""
        module = components.module_of(getattr(self, "module", None) if model is None else model, stage)
        first = next(iter(sources))
        if isinstance(sources[first], DataModule):
            if datamodule is not None:
                raise MisconfigurationException(f"{stage} received two data modules; give one.")
            sources[first], datamodule = None, sources[first]
        if datamodule is not None and not isinstance(datamodule, DataModule):
            raise TypeError(f"datamodule must be a trainkit.DataModule. Received: {type(datamodule).__name__}.")
        given = [name for name, source in sources.items() if source is not None]
        if datamodule is not None and given:
            raise MisconfigurationException(
                f"{stage} received loaders ({', '.join(given)}) and a datamodule, which has loaders of its own. "
                "Give one or the other."
            )
        self.module: Module = module
        self.datamodule = datamodule
        trained = self.sources.loaders.get("train") if stage != "fit" else None
        self.sources = Sources(self, sources)
        if trained is not None:  # so that what fit left behind can still be saved
            self.sources.loaders["train"] = trained
        self.stage = stage
        self.should_stop = False
        self.interruption.signal = None
        self.metrics = Metrics()
        if stage == "fit":
            self.optimizers, self.lr_scheduler_configs = [], []
        self.metrics.hook = "setup"
        module.attach(self, self.metrics)
        if datamodule is not None:
            datamodule.trainer = self
        self.callbacks = components.with_callbacks_of(module, self.callbacks)
        keys = [callback.state_key for callback in self.callbacks if callback.state_dict()]
        for key in {key for key in keys if keys.count(key) > 1}:
            raise MisconfigurationException(
                f"two callbacks keep their state under {key!r}: a checkpoint could hold only one of them. "
                "Give one of the classes a state_key property of its own."
            )
        self.hooks = Hooks(self, module, self.callbacks)

    def _tear_down(self, stage: Stage, data: list[DataModule], status: str) -> None:
        """Give everything back, errors or not; an error in here does not hide the one that came before."""
        ongoing = sys.exc_info()[1]
        for teardown in [*(part.teardown for part in data), self.hooks.teardown]:
            try:
                teardown(stage)
            except BaseException as error:
                if ongoing is None:
                    raise
                ongoing.add_note(f"teardown({stage!r}) failed too: {type(error).__name__}: {error}")
        self.sources.close()
        for logger in self.loggers:
            logger.finalize(status)
        self.stage = None
        self.metrics.batch = None

    def _configure_optimizers(self) -> None:
        """Make optimizers and schedules, when the parameters are where they will be trained."""
        self.metrics.hook = "configure_optimizers"
        self.optimizers, self.lr_scheduler_configs = configure(self.module)
        if self.module.automatic_optimization:
            check_closures(self.optimizers)
        self.schedules = Schedules(self.lr_scheduler_configs, self)
        self.manual_optimizers = [ManualOptimizer(optimizer, self) for optimizer in self.optimizers]
        if self.gradient_clip_val is not None:
            self.clip = partial(self._clip, limit=self.gradient_clip_val)
        else:
            self.clip = None

    def _clip(self, optimizer: Optimizer, limit: float) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.strategy.clip_gradients(parameters, limit, self.gradient_clip_algorithm)

    def _sanity_check(self) -> None:
        """Try a few validation batches, so that a mistake in validation shows before an epoch is spent."""
        steps = self.num_sanity_val_steps
        val_loaders = self.sources.loaders.get("val")
        if not val_loaders or steps == 0 or self._checkpoint is not None:
            return
        loaders = [loader.limited_to(math.inf if steps == -1 else steps) for loader in val_loaders]
        self.sanity_checking = True
        try:
            with isolated_random():
                self.hooks.on_sanity_check_start()
                loop.evaluate(self, "validation", loaders)
                self.hooks.on_sanity_check_end()
        finally:
            self.sanity_checking = False
            self.metrics.forget()

    def leave_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt or SystemExit when a signal asked this run to end."""
        self.interruption.leave()

    # ------------------------------------------------------------------ checkpoints
    def save_checkpoint(
        self, filepath: str | os.PathLike[str], weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write a checkpoint: whole, or not at all.

        Args:
            filepath: where to.
            weights_only: leave out what only a resumed run needs.
            storage_options: must be None; files are written by trainkit itself.

        Raises:
            CheckpointError: it could not be written; an earlier file of that name is intact.
        """
        if storage_options is not None:
            raise TypeError(f"save_checkpoint takes no storage_options. Received: {storage_options!r}.")
        if getattr(self, "module", None) is None:
            raise RuntimeError("save_checkpoint needs a module: call it during or after fit.")
        checkpoint = restore.collect(self, bool(weights_only))
        for logger in self.loggers:
            logger.sync()  # a run resumed from here expects the earlier rows to be there
        store.save(Path(filepath), checkpoint)

    def _read_checkpoint(self, ckpt_path: str | os.PathLike[str] | None, stage: Stage) -> None:
        """Read the checkpoint that `ckpt_path` means, and let the loggers go on where it was written."""
        self._checkpoint, self.resume_path = None, None
        path = restore.resolve(self, ckpt_path, stage)
        if path is None:
            return
        self._checkpoint, self.resume_path = store.load(path), str(path)
        if stage == "fit":
            restore.continue_loggers(self.loggers, path, int(self._checkpoint.get("global_step", 0)))

    def _restore_run(self) -> None:
        """Load what a resumed run needs beside the weights, when optimizers and loaders are there."""
        if self._checkpoint is None:
            return
        restore.restore_run(self, self._checkpoint, Path(self.resume_path or ""))
        self.strategy.optimizers_to_device(self.optimizers)

    def _default_checkpoint(
        self, model: Module | None, ckpt_path: str | os.PathLike[str] | None
    ) -> str | os.PathLike[str] | None:
        """Return "best" when neither a module nor a file is named and this Trainer has saved one."""
        if model is None and ckpt_path is None and getattr(self.checkpoint_callback, "best_model_path", None):
            return "best"
        return ckpt_path

    # ------------------------------------------------------------------ what the loops ask
    def wrapped_step(self, name: str, num_dataloaders: int = 1) -> Callable[..., Any]:
        """Return a step of the module as the loop calls it, in the run's precision and strategy."""
        given = ("batch", "batch_idx") if name == "training_step" else ("batch", "batch_idx", "dataloader_idx")
        step = fitted(getattr(self.module, name), name, given, least=1 if num_dataloaders == 1 else 3)
        return self.strategy.wrap(self.precision.wrap(step))

    def check_batch(self, batch: Any) -> None:
        """Refuse a first batch that is not where the module is."""
        check_device(batch, self.device)

    def take_manual_step(self) -> bool:
        """Whether the module stepped an optimizer by itself in this batch."""
        stepped, self.stepped_manually = self.stepped_manually, False
        return stepped

    @contextmanager
    def evaluation_mode(self, stage: str) -> Iterator[None]:
        """Run without gradients and with the module in evaluation mode, and give each part its own mode back."""
        modes = [(part, part.training) for part in self.module.modules()]
        use_inference_mode = self.inference_mode and self.stage != "fit"
        self.module.eval()
        self._inside_evaluation = True
        try:
            with torch.inference_mode() if use_inference_mode else torch.no_grad():
                yield
        finally:
            self._inside_evaluation = False
            self._since_validation.restart()
            for part, training in modes:
                part.training = training

    def to_host(self, output: Any) -> Any:
        """Return predictions on the cpu."""
        if self.device.type == "cpu":
            return output
        return map_tensors(lambda value: value.cpu() if isinstance(value, Tensor) else value, output)

    # ------------------------------------------------------------------ logging
    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None:
        """Hand values to every logger; "epoch" is added, and a value called "step" is the x value."""
        if not values or self.sanity_checking:
            return
        self.metrics.logged.update(values)
        x = self.log_step if step is None else step
        if "step" in values:
            x = int(values["step"])
        row = {"epoch": self.current_epoch, **{name: value for name, value in values.items() if name != "step"}}
        for logger in self.loggers:
            logger.log_metrics(row, x)
            logger.save()

    def _log_hyperparameters(self) -> None:
        """Hand the hyperparameters of module and data module, and the module for its graph, to the loggers."""
        hparams = merged_hparams([self.module] if self.datamodule is None else [self.module, self.datamodule])
        for logger in self.loggers:
            if hparams:
                logger.log_hyperparams(hparams)
            logger.log_graph(self.module)
            logger.save()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, above the progress bar if there is one."""
        bar = self.progress_bar_callback
        if bar is not None and not kwargs:
            bar.print(*args)
        else:
            print(*args, **kwargs)
