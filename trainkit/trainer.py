"""Trainer: settings become components; a run is set up, handed to its loop, and torn down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit import arguments, components, launch, loop, slurm
from trainkit.accelerators import Accelerator
from trainkit.advice import Report, report
from trainkit.callback import Callback
from trainkit.checkpoint import restore, saving
from trainkit.checkpoint.background import Background
from trainkit.data.sources import Clock, Sources
from trainkit.data.transfer import Transfer, check_device
from trainkit.datamodule import DataModule
from trainkit.errors import MisconfigurationException, NoCheckpointError, warn
from trainkit.fused import Watch
from trainkit.hooks import is_overridden
from trainkit.loggers import Logger
from trainkit.metrics import Metrics, numbers
from trainkit.module import Module
from trainkit.optim import LRSchedulerConfig
from trainkit.precision import Precision
from trainkit.random import isolated_random, seed_for_rank
from trainkit.replay import replayed
from trainkit.run import running
from trainkit.signals import NOTED, STOPS, Interruption
from trainkit.stages import RunningStage, TrainerFn, TrainerState
from trainkit.state import Progress, Switches
from trainkit.status import Status, results_table
from trainkit.steps import wrapped_step
from trainkit.strategies import Strategy
from trainkit.timing import Timing
from trainkit.tree import map_tensors
from trainkit.update import StepOptimizer

if TYPE_CHECKING:
    from trainkit.agreement import Agreement
    from trainkit.profiler import Profiler
    from trainkit.profiler.actions import Actions

PrecisionName = Literal[
    "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "32", "16", "64", "bf16"
]  # fmt: skip


class Trainer(Status):
    """Train, validate, test and predict with a Module.

    Args:
        accelerator: "auto" (cuda, else mps, else cpu), "cpu", "gpu", "cuda" or "mps", or an Accelerator object.
        strategy: "auto", or a Strategy object.
        devices: "auto", how many, or which (a list of indices).
        num_nodes: how many machines; a run uses one.
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
        profiler: "simple", "advanced", "pytorch" or a Profiler: report where the time of a run goes.
        detect_anomaly: let autograd name the operation that made a NaN. Slow.
        nan_policy: what to do about an update whose loss or gradients are not finite. "off" (default): nothing;
            "raise": raise a NonFiniteError before it is made, and write down which samples it was; "skip": leave it
            out, count it in `skipped_updates`, and raise after 100 in a row.
        compile: True compiles the module's steps with torch.compile; a mode ("default", "reduce-overhead",
            "max-autotune", "max-autotune-no-cudagraphs") or a dict of its arguments (backend, mode, dynamic,
            fullgraph, options) does so, too. "auto" goes on without, after a warning, where they can't be compiled.
            "graph" replays the training step as CUDA graphs. See docs/speed.md.
        fused_optimizers: let torch's SGD, Adam and AdamW use their fused kernels where `configure_optimizers` chose
            neither `fused` nor `foreach`, and the parameters allow it. False leaves them torch's own update, whose
            last bits may differ.
        matmul_precision: how exact products of float32 matrices are while the Trainer runs: "highest", "high" (TF32 on
            cuda) or "medium" (bfloat16 inside). None leaves torch's setting alone.
        channels_last: lay images (4 dimensions) and volumes (5) of batches and of the module in channels-last memory
            format during a run. Shapes, numbers and checkpoints are the same without it.
        reload_dataloaders_every_n_epochs: ask for new loaders every n epochs; 0 for never.
        default_root_dir: where logs and checkpoints go (default: the current directory).
        barebones: turn off everything that could cost time (loggers, checkpoints, progress bar, summary, sanity check,
            `log`), to measure the loop alone.
        plugins: a Precision, a CheckpointIO, or both.
        sync_batchnorm: share batch statistics between processes; on accelerators.
        use_distributed_sampler: deal the data out to the processes; False: each has data of its own.
        keep_batch: whose batch stays as large when a run goes on with another number of processes: "all", or "each".
        enable_autolog_hparams: tell the loggers the hyperparameters when fit begins (default True).
        watchdog: say who waits for whom when a step takes ten times as long as usual, and at least so many seconds;
            True: 30 s, None: True for several processes only. See docs/scale.md.
        model_registry: must be None; there is no model registry here.

    Every argument can also come from the environment: PL_TRAINER_MAX_EPOCHS=3 is max_epochs=3.

    Raises:
        ValueError, TypeError: an argument that can't work; the message names it and what is possible.
    """

    @arguments.from_environment
    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int = 1,
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
        use_distributed_sampler: bool = True,
        keep_batch: Literal["all", "each"] = "all",
        profiler: Profiler | str | None = None,
        detect_anomaly: bool = False,
        nan_policy: Literal["off", "raise", "skip"] = "off",
        compile: bool
        | Literal["auto", "graph", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
        | dict[str, Any]
        | None = None,
        fused_optimizers: bool = True,
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        channels_last: bool = False,
        barebones: bool = False,
        plugins: Any = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True,
        watchdog: bool | float | timedelta | None = None,
        model_registry: None = None,
    ) -> None:
        for name, value in arguments.checked(locals()).items():
            setattr(self, name, value)
        parts = components.Parts(self, locals())
        self.accelerator, self.strategy, self.precision_plugin = parts.accelerator, parts.strategy, parts.precision
        self.checkpoint_io, self.profiler = parts.checkpoint_io, parts.profiler
        self.compiler, self.graphs = parts.compiler, parts.graphs
        self.background = Background()
        self.loggers, self.callbacks = parts.loggers, parts.callbacks
        self.actions: Actions | None = None
        """What records this run's calls, when a profiler is on."""

        self.progress = Progress()
        self.switches = Switches()
        self.metrics = Metrics()
        self.timing = self.fit_timing = Timing()
        """The clocks of the run, and of the last fit."""
        self.state = TrainerState()
        self.interruption = Interruption()
        self.agreement: Agreement | None = None
        """What the processes of a fit agree on; None with one process."""
        self.command: str | None = None
        """The shell command that started this run, when the command line did."""
        self.resume_path: str | None = None
        """The checkpoint this run was resumed from."""
        self.restarted_in: list[str | None] | None = None  # the loggers' directories, when torchrun starts a run again
        self.should_stop = False
        """Set it to end the run after this batch."""
        self.batch_idx = self.evaluation_idx = -1
        self.is_last_batch = False
        self.optimizers: list[Optimizer] = []
        self.step_optimizers: list[StepOptimizer] = []
        """The optimizers as user code gets them."""
        self.watches: list[Watch] = []
        """What looks at gradients for the optimizers' fused kernels."""
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self.stepped_manually = False
        self.datamodule: DataModule | None = None
        self.transfer: Transfer | None = None
        self.sources = Sources(self, {})
        self.resumed_by_name = False
        self.checkpoint: dict[str, Any] | None = None
        """The contents of the checkpoint that this run begins from."""
        self.ckpt_strict = True
        """Whether a checkpoint must be of a run that saw the same samples in the same order."""
        self.ranks: list[dict[str, Any]] = []
        """What each process had for itself at the last save."""
        self.made_of: dict[str, Any] = {}
        """What the last fit began with, as its checkpoints say it."""
        self.weights_before: dict[str, Any] | None = None
        """Those of the module before a checkpoint's, until all of that one fits."""
        self.weights_finite: tuple[int, bool] | None = None
        """A step, and whether the weights were numbers then in all processes."""
        self.predictions: list[Any] = []
        self._given_ckpt_path: str | os.PathLike[str] | None = None
        self._since_validation = Clock()

    # ------------------------------------------------------------------ the four things a Trainer does
    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        ckpt_strict: bool = True,
    ) -> None:
        """Train.

        Args:
            model: what to train.
            train_dataloaders: an iterable of batches; or the DataModule.
            val_dataloaders: an iterable of batches, or several.
            datamodule: instead of loaders.
            ckpt_path: go on from this file, from "last" (the newest checkpoint of the newest run) or "best".
            weights_only: kept for Lightning's signature; nothing in a file is ever executed.
            ckpt_strict: refuse a checkpoint whose run saw other samples or another order of them: another length of the
                data set, batch size or sampler. False goes on with a warning. Other differences are always warnings.

        Raises:
            MisconfigurationException: something in the module, the data or the settings can't work.
            CheckpointError: the checkpoint is missing, damaged or does not fit.
        """
        if launch.needed(self.strategy.world):
            launch.launch(self, "fit", locals())
            return
        self.ckpt_strict = ckpt_strict
        sources = {"train": train_dataloaders, "val": val_dataloaders}
        ckpt_path = slurm.noted_checkpoint(self) or self._named_checkpoint(ckpt_path)
        run = running(self, TrainerFn.FITTING, model, datamodule, ckpt_path, sources)
        anomalies = torch.autograd.set_detect_anomaly(self.detect_anomaly or torch.is_anomaly_enabled())
        with anomalies, slurm.queued_again(self), self.interruption.listening(at_once=STOPS), run:
            self._sanity_check()
            self._load_data()
            ended = self.done and self.checkpoint is None  # one that was killed at its end has yet to be told of it
            self.interruption.at_once = ()  # from here on there is something to finish and to save
            if not ended and self.num_training_batches > 0:
                loop.fit(self)
                self.settle()
            self.leave_if_interrupted()  # a signal before the first batch or after the last save
        self.interruption.leave()  # one that came while the run was closed

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
        if launch.needed(self.strategy.world):
            results: list[dict[str, float]] = launch.launch(self, "validate", locals())
            return results
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
        if launch.needed(self.strategy.world):
            results: list[dict[str, float]] = launch.launch(self, "test", locals())
            return results
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
        if launch.needed(self.strategy.world):
            launched: list[Any] | None = launch.launch(self, "predict", locals())
            return launched
        keep = return_predictions is not False
        ckpt_path = self._default_checkpoint(model, ckpt_path)
        run = running(self, TrainerFn.PREDICTING, model, datamodule, ckpt_path, {"predict": dataloaders})
        with self.interruption.listening(at_once=NOTED), run:
            if self.module.predict_step is None or self.module.forward is None:
                raise MisconfigurationException(
                    f"{type(self.module).__name__} has None for predict_step or forward, which predict calls."
                )
            self.sources.load_evaluation("predict")
            predictions = loop.predict(self, self.sources.loaders["predict"], keep)
        self.predictions = (predictions or []) if keep else []
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
        run = running(self, TrainerFn(stage), model, datamodule, ckpt_path, {kind: dataloaders})
        with self.interruption.listening(at_once=NOTED), run:
            if not is_overridden(self.module, f"{event}_step"):
                raise MisconfigurationException(
                    f"{type(self.module).__name__} has no {event}_step, which {stage} calls with each batch."
                )
            self.sources.load_evaluation(kind)
            results = loop.evaluate(self, event, self.sources.loaders[kind])
        if verbose:
            self.print(results_table(stage, results))
        return results

    def replay(
        self,
        position: str | os.PathLike[str] | Mapping[str, Any] | tuple[int, int],
        model: Module | None = None,
        train_dataloaders: Any = None,
        datamodule: DataModule | None = None,
    ) -> Any:
        """Fetch a training batch again: the same samples with the same random draws, on the host.

        Args:
            position: what `nan_policy="raise"` wrote down, a file or what is in it; or (epoch, batch_idx), both
                counted from 0.
            model: whose `train_dataloader` brings the data.
            train_dataloaders: the data themselves; or the DataModule.
            datamodule: instead of loaders. Without any of the three, the data are those of the last fit.

        Raises:
            MisconfigurationException: there is no such batch, or no data.

        Example:
            >>> trainer = Trainer(nan_policy="raise")
            >>> batch = trainer.replay("lightning_logs/version_0/nonfinite-step=120.json", model)  # doctest: +SKIP
        """
        return replayed(self, position, model, train_dataloaders, datamodule)

    def report_timing(self) -> Report:
        """Return where the time of the last fit went, or of the one that runs until now: `print` it for the table.

        It has the seconds of each part and of each callback, and advice where something is wrong.
        """
        return report(self)

    # ------------------------------------------------------------------ a run begins
    def _sanity_check(self) -> None:
        """Try a few validation batches, so that a mistake in validation shows before an epoch is spent."""
        steps = self.num_sanity_val_steps
        if steps == 0 or self.checkpoint is not None or not self.enable_validation:
            return
        self.state.stage = RunningStage.SANITY_CHECKING
        self.metrics.forget()
        try:
            with isolated_random():
                self.hooks.on_sanity_check_start()
                self.sources.load_evaluation("val")
                loop.evaluate(self, "validation", [loader.limited_to(steps) for loader in self.sources.loaders["val"]])
                self.hooks.on_sanity_check_end()
        finally:
            self.state.stage = RunningStage.TRAINING
            self.metrics.forget()

    def _load_data(self) -> None:
        """Ask for the loaders that fit needs and has not got yet, and put the run where its checkpoint left it."""
        if "train" not in self.sources.loaders:  # estimated_stepping_batches may have asked for it
            self.sources.load_train()
        if "val" not in self.sources.loaders:
            self.sources.load_evaluation("val")
        if self.checkpoint is not None:
            restore.restore_run(self, self.checkpoint, Path(self.resume_path or ""))
        elif self.global_rank > 0:
            seed_for_rank(self.global_rank)
        self.sources.prepare()

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make modules inside this block on the run's device and in its precision.

        Args:
            empty_init: True leaves parameters uninitialised, for weights that are loaded next. With strategies that
                spread parameters over processes they have no memory until the run begins, and get their first values
                then, by each part's `reset_parameters`.
        """
        with self.strategy.init_context(empty_init), self.precision_plugin.init_context():
            yield

    def leave_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt or SystemExit when a signal asked this run to end. Called where it can be saved."""
        if self.signal is not None:
            slurm.save_if_nobody_does(self)
            self.interruption.leave()

    # ------------------------------------------------------------------ checkpoints
    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool | None = None,
        storage_options: Any = None,
        *,
        overwrite: bool = True,
    ) -> None:
        """Write a checkpoint: whole, or not at all; when this returns, it is on the disk.

        Args:
            filepath: where to; "s3://bucket/x.ckpt" and the like are files of a place that fsspec knows.
            weights_only: leave out what only a resumed run needs.
            storage_options: for a CheckpointIO of your own; trainkit's files have none.
            overwrite: False refuses a name that is taken.

        Raises:
            CheckpointError: it could not be written; an earlier file of that name is intact.
            CheckpointExistsError: the name is taken, and overwrite=False.
        """
        if getattr(self, "module", None) is None:
            raise AttributeError("save_checkpoint needs a module: call it during or after fit.")
        began = time.monotonic()
        self.strategy.be_patient()
        with self.profiler.profile("save_checkpoint"):
            saving.save(self, filepath, bool(weights_only), storage_options, overwrite)
        self.interruption.saved_in(time.monotonic() - began)

    def _named_checkpoint(self, ckpt_path: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
        """Return the checkpoint that a call names, or the one `trainer.ckpt_path` was set to, which a call ends."""
        if not ckpt_path:
            return self._given_ckpt_path
        if self._given_ckpt_path:
            warn(f"trainer.ckpt_path was set to {self._given_ckpt_path!s}; the call's ckpt_path={ckpt_path!s} is used.")
            self._given_ckpt_path = None
        return ckpt_path

    def _default_checkpoint(
        self, model: Module | None, ckpt_path: str | os.PathLike[str] | None
    ) -> str | os.PathLike[str] | None:
        """Return "best" when neither a module nor a file is named.

        Raises:
            NoCheckpointError: this Trainer has not saved one.
        """
        ckpt_path = self._named_checkpoint(ckpt_path)
        if model is not None or ckpt_path is not None or self.model is None:
            return ckpt_path
        best: str = getattr(self.checkpoint_callback, "best_model_path", "")
        if not best:
            raise NoCheckpointError(
                "neither a module nor a ckpt_path was given, which means the best checkpoint of the last fit, and this "
                "Trainer has saved none. Give the module to evaluate it as it is: trainer.test(module)."
            )
        warn(f"no module was given: {best}, the best checkpoint of the last fit, is loaded.")
        return best

    # ------------------------------------------------------------------ what the loops ask
    def wrapped_step(self, name: str, num_dataloaders: int = 1) -> Callable[..., Any]:
        """Return a step of the module as the loop calls it, in the run's precision and strategy."""
        return wrapped_step(self, name, num_dataloaders)

    def check_batch(self, batch: Any) -> None:
        """Refuse a first batch that is not where the module is."""
        check_device(batch, self.device)

    def settle(self) -> None:
        """Hear of updates that were not finite and of which only the device knows so far (`nan_policy`)."""
        update = getattr(self, "update", None) if self.fitting else None
        if update is not None and update.guard is not None:
            update.guard.settle()

    def take_manual_step(self) -> bool:
        """Whether the module stepped an optimizer by itself in this batch."""
        stepped, self.stepped_manually = self.stepped_manually, False
        return stepped

    def to_host(self, output: Any) -> Any:
        """Return predictions on the cpu."""
        if self.device.type == "cpu":
            return output
        return map_tensors(lambda value: value.cpu() if isinstance(value, Tensor) else value, output)

    # ------------------------------------------------------------------ logging
    def log_metrics(self, values: dict[str, Any], step: int | None = None) -> None:
        """Hand values to every logger.

        Args:
            values: numbers, or tensors, which are read here.
            step: their x value. Left out, a value called "step" is that; without one, it is `log_step`, and the
                number of the epoch goes with the values.
        """
        if not values or self.sanity_checking or not self.loggers:
            return
        began = perf_counter()
        row = numbers(values)
        self.metrics.note_row(values)
        if step is None:
            x = row.pop("step", None)
            if x is None:
                row.setdefault("epoch", self.current_epoch)
            step = self.log_step if x is None else int(x)
        save = self.timing.writing_due(began)
        for logger in self.loggers:
            try:
                logger.log_metrics(metrics=row, step=step)
                if save:
                    logger.save()
            except OSError as error:  # a full disk must not cost the run; file loggers keep the rows and try again
                warn(f"step {step} was not logged: {error}.")
        self.timing.logging += perf_counter() - began

    def log_point(self) -> None:
        """Hand the loggers what was logged last in the training steps, and where their time went."""
        self.timing.fold()
        if self.metrics.exchange is not None:
            self.metrics.agree_on_steps()
        if self.loggers and self.log_every_n_steps:
            self.log_metrics(self.metrics.row() | self.timing.row())

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, above the progress bar if there is one; on rank 0 only."""
        if not self.is_global_zero:
            return
        bar = self.progress_bar_callback
        if bar is not None and not kwargs:
            bar.print(*args)
        else:
            print(*args, **kwargs)
