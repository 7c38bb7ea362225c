"""A run: everything between the call of fit, validate, test or predict and its end, around the loops.

running      set up in Lightning's order, hand over, tear down whatever happens
  attach       who takes part: module, data module, callbacks, the table of hooks
  start        data, checkpoint, setup hooks, the model on its device, optimizers
  tear_down    everything that the run made is given back
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit import channels_last, components, elastic, launched, resume_hint
from trainkit.agreement import Agreement
from trainkit.checkpoint import changes, restore
from trainkit.data.sources import Sources
from trainkit.data.transfer import TRANSFER_HOOKS, transfer_of
from trainkit.datamodule import DataModule
from trainkit.errors import MisconfigurationException, SearchOver, warn
from trainkit.fused import choose_fused
from trainkit.hooks import Hooks, announced, is_overridden
from trainkit.hparams import HyperParameters, merged_hparams, tell_of_secrets
from trainkit.lazy_compiler import defer_compiler
from trainkit.metrics import Metrics, NoMetrics
from trainkit.module import Module
from trainkit.optim import Schedules, configure
from trainkit.profiler.actions import actions_of, recorded
from trainkit.random import seed_of_state
from trainkit.redaction import redacted
from trainkit.signals import Interrupted
from trainkit.stages import RunningStage, TrainerFn, TrainerState, TrainerStatus
from trainkit.timing import timing_of
from trainkit.update import StepOptimizer, Update
from trainkit.watchdog import watching

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

LOOP = {
    TrainerFn.FITTING: RunningStage.TRAINING,
    TrainerFn.VALIDATING: RunningStage.VALIDATING,
    TrainerFn.TESTING: RunningStage.TESTING,
    TrainerFn.PREDICTING: RunningStage.PREDICTING,
}


@contextmanager
def running(
    trainer: Trainer,
    fn: TrainerFn,
    model: Module | None,
    datamodule: DataModule | None,
    ckpt_path: str | PathLike[str] | None,
    sources: Mapping[str, Any],
) -> Iterator[None]:
    """Set a run up, and tear it down whatever happens in between."""
    trainer.strategy.setup_environment()
    with components.torch_switches(trainer):
        attach(trainer, fn, model, datamodule, dict(sources))
        if fn == TrainerFn.FITTING:
            components.check_can_train(trainer)
        data = [trainer.datamodule] if trainer.datamodule is not None else []
        status = "failed"
        try:
            with watching(trainer):
                start(trainer, fn, data, ckpt_path)
                yield
                trainer.strategy.teardown(trainer.module)
                if fn == TrainerFn.FITTING:
                    trainer.hooks.on_fit_end()
            status = "success"
            trainer.state.status = TrainerStatus.FINISHED
        except SearchOver:
            trainer.strategy.teardown(trainer.module)
            status = "success"
            trainer.state.status = TrainerStatus.FINISHED
            raise
        except BaseException as error:
            launched.note(error)
            interrupted = trainer.interruption.signal is not None or isinstance(error, KeyboardInterrupt)
            status = "interrupted" if interrupted else "failed"
            trainer.state.status = TrainerStatus.INTERRUPTED
            trainer.strategy.on_exception(error)
            trainer.hooks.on_exception(error)
            for part in data:
                part.on_exception(error)
            if interrupted and fn == TrainerFn.FITTING:
                resume_hint.tell(trainer, error)
                elastic.note(trainer, stopped=True)
            trainer.strategy.teardown(trainer.module)
            if type(error) is KeyboardInterrupt and trainer.interruption.signal is None:
                # raised by the user's code: it ends a script as the first Ctrl-C does
                raise Interrupted(130) from error
            raise
        finally:
            tear_down(trainer, fn, data, status)


def attach(
    trainer: Trainer, fn: TrainerFn, model: Module | None, datamodule: DataModule | None, sources: dict[str, Any]
) -> None:
    """Check what the run is called with, and make its table of hooks."""
    stage = str(fn.value)
    module = components.module_of(getattr(trainer, "module", None) if model is None else model, stage)
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
    trainer.module = module
    trainer.datamodule = datamodule
    trained = trainer.sources.loaders.get("train") if fn != TrainerFn.FITTING else None
    trainer.sources = Sources(trainer, sources, seed_of_state(), earlier=trainer.sources)
    if trained is not None:  # so that what fit left behind can still be saved
        trainer.sources.loaders["train"] = trained
    trainer.state = TrainerState(TrainerStatus.RUNNING, fn, LOOP[fn])
    trainer.should_stop = False
    kind = NoMetrics if trainer.barebones else Metrics
    trainer.metrics = kind(module, has_logger=bool(trainer.loggers), strategy=trainer.strategy)
    trainer.metrics.x = trainer.progress.window
    if fn == TrainerFn.FITTING:
        if trainer.max_epochs is None:
            trainer.max_epochs = 1000  # nothing else limits the run
        trainer.optimizers, trainer.lr_scheduler_configs = [], []
    trainer.timing = timing_of(trainer.device)
    if fn == TrainerFn.FITTING:
        trainer.fit_timing = trainer.timing
    trainer.actions = actions_of(trainer.profiler)
    trainer.profiler._lightning_module = module
    trainer.agreement = Agreement(trainer) if fn == TrainerFn.FITTING and trainer.strategy.parallel else None
    trainer.metrics.hook = "setup"
    module.attach(trainer, trainer.metrics)
    if datamodule is not None:
        datamodule.trainer = trainer
    trainer.metrics.hook = "configure_callbacks"
    trainer.callbacks = components.with_callbacks_of(module, trainer.callbacks)
    for callback in trainer.callbacks:
        callback._run_metrics = trainer.metrics
    trainer.hooks = Hooks(trainer, module, trainer.callbacks)


def start(trainer: Trainer, fn: TrainerFn, data: list[DataModule], ckpt_path: str | PathLike[str] | None) -> None:
    """Bring a run to where its loop can begin, in Lightning's order."""
    module, hooks, fitting = trainer.module, trainer.hooks, fn == TrainerFn.FITTING
    stage = str(fn.value)
    for part in data:
        prepare_data(trainer, "LightningDataModule", part)
    prepare_data(trainer, "LightningModule", module)
    elastic.read_checkpoint(trainer, ckpt_path, stage)
    if fitting:
        components.claim_directories(trainer.loggers, trainer.strategy)
        elastic.note(trainer)
    launched.keep_log(trainer)
    if trainer.actions is not None:  # the run's directory is known by now
        set_profiler_up(trainer, stage)
    for part in data:
        recorded(trainer, "LightningDataModule", part, "setup")(stage)
    hooks.setup(stage)
    trainer.strategy.begin(module)
    if is_overridden(module, "configure_model"):
        with trainer.init_module():
            recorded(trainer, "LightningModule", module, "configure_model")()
    trainer.precision_plugin.convert_module(module)  # before weights are loaded: float64 ones must not pass float32
    after_setup = trainer.strategy.sharded  # each process takes its piece, when it is known what that is
    if trainer.checkpoint is not None and not after_setup:
        restore.restore_weights(trainer, trainer.checkpoint, Path(trainer.resume_path or ""))
    if fitting:
        trainer.sources.muster()
    trainer.strategy.setup(module)
    if trainer.checkpoint is not None and after_setup:
        restore.restore_weights(trainer, trainer.checkpoint, Path(trainer.resume_path or ""))
    trainer.transfer = transfer_of(trainer.strategy, module, trainer.datamodule)
    if trainer.channels_last:
        channels_last.lay(module, (), channels_last.channels_last)
        trainer.transfer = channels_last.after(trainer.transfer)
    if trainer.transfer is not None and any(is_overridden(o, name) for o in (*data, module) for name in TRANSFER_HOOKS):
        trainer.transfer = announced(trainer, "transfer_batch_to_device", trainer.transfer)
    if trainer.actions is not None and trainer.transfer is not None:
        name = f"[Strategy]{type(trainer.strategy).__name__}.batch_to_device"
        trainer.transfer = trainer.actions.wrap(name, trainer.transfer)
    if fitting:
        configure_optimizers(trainer)
        trainer.made_of = changes.made_of(trainer)  # as the user's code made it: callbacks may change it from here on
    trainer.precision_plugin.attach(trainer.optimizers if fitting else [], trainer.device)
    if fitting:
        hooks.on_fit_start()  # from here on the loops can be called, as those who search a setting do
    if trainer.enable_autolog_hparams:
        log_hyperparameters(trainer)
    module.zero_grad()


def prepare_data(trainer: Trainer, kind: str, owner: DataModule | Module) -> None:
    """Let one process of each node, or one in all, download the data, while the others wait."""
    prepare, strategy = recorded(trainer, kind, owner, "prepare_data"), trainer.strategy
    if not strategy.parallel:
        prepare()
    elif is_overridden(owner, "prepare_data"):
        once = strategy.on_each_node if owner.prepare_data_per_node else strategy.on_rank_zero
        once("prepare_data", lambda: prepare() and None)  # what it returns is nobody's


def set_profiler_up(trainer: Trainer, stage: str) -> None:
    """Tell the profiler of the run, as Lightning does."""
    rank = trainer.local_rank if trainer.world_size > 1 else None
    trainer.profiler.setup(stage=stage, local_rank=rank, log_dir=trainer.log_dir)


def configure_optimizers(trainer: Trainer) -> None:
    """Make optimizers and schedules, when the parameters are where they will be trained."""
    trainer.metrics.hook = "configure_optimizers"
    defer_compiler()
    with trainer.profiler.profile(f"[LightningModule]{type(trainer.module).__name__}.configure_optimizers"):
        trainer.optimizers, trainer.lr_scheduler_configs = configure(trainer.module)
    if trainer.actions is not None:
        names = [f"[Strategy]{type(trainer.strategy).__name__}.optimizer_step"]
        if not trainer.module.automatic_optimization:
            names = ["optimizer_step", *names]
        elif not is_overridden(trainer.module, "optimizer_step"):
            names = [f"[LightningModule]{type(trainer.module).__name__}.optimizer_step", *names]
        trainer.actions.watch(trainer.optimizers, *names)
    trainer.strategy.optimizers_made(trainer.optimizers)
    trainer.watches = choose_fused(trainer) if trainer.fused_optimizers else []
    trainer.schedules = Schedules(trainer.lr_scheduler_configs, trainer)
    trainer.step_optimizers = [StepOptimizer(optimizer, trainer) for optimizer in trainer.optimizers]
    trainer.update = Update(trainer)
    if trainer.graphs is not None:
        trainer.graphs.attach(trainer)


def log_hyperparameters(trainer: Trainer) -> None:
    """Hand the module's and the data module's hyperparameters, and the graph, to the loggers, once a run."""
    if not trainer.loggers:
        return
    owners: list[HyperParameters] = [owner for owner in (trainer.module, trainer.datamodule) if owner is not None]
    for owner in owners:
        tell_of_secrets(owner)
    hparams = redacted(merged_hparams(owners))
    for logger in trainer.loggers:
        if hparams:
            logger.log_hyperparams(hparams)
        logger.log_graph(trainer.module)
        logger.save()


def tear_down(trainer: Trainer, fn: TrainerFn, data: list[DataModule], status: str) -> None:
    """Give everything back, errors or not; an error in here does not hide the one that came before."""
    ongoing, stage = sys.exc_info()[1], str(fn.value)
    parts = [recorded(trainer, "LightningDataModule", part, "teardown") for part in data]
    for teardown in [*parts, trainer.hooks.teardown]:
        try:
            teardown(stage)
        except BaseException as error:
            if ongoing is None:
                raise
            ongoing.add_note(f"teardown({stage!r}) failed too: {type(error).__name__}: {error}")
    trainer.sources.close()
    trainer.timing.end()  # an error may have come before
    for logger in trainer.loggers:
        try:
            logger.finalize(status)
        except OSError as error:  # a run that is over is not lost for its last rows
            warn(f"the last rows were not logged: {error}.")
    trainer.checkpoint_io.teardown()
    trainer.accelerator.teardown()
    if trainer.channels_last:
        channels_last.lay(trainer.module, trainer.optimizers, channels_last.contiguous)
    for watch in trainer.watches:
        watch.close()
    if trainer.compiler is not None:
        trainer.compiler.close()
    if trainer.graphs is not None:
        trainer.graphs.close()
    trainer.state.stage = None
    trainer.metrics.finish()
    if trainer.actions is not None:
        trainer.actions.close()
        trainer.actions = None
        trainer.profiler.describe()
    trainer.profiler._lightning_module = None
