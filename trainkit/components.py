"""The parts a Trainer makes from its settings: strategy, loggers, callbacks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainkit import arguments, launched
from trainkit.accelerators import Accelerator, of_device
from trainkit.callback import Callback
from trainkit.checkpoint.io import CheckpointIO
from trainkit.devices import resolve as resolve_devices
from trainkit.environment import announce, world_of
from trainkit.errors import DuplicateStateError, MisconfigurationException, warn
from trainkit.hooks import is_overridden, overrides
from trainkit.loggers import DummyLogger, FileLogger, Logger, TensorBoardLogger
from trainkit.module import Module
from trainkit.precision import Precision, precision_of
from trainkit.profiler import PROFILERS, PassThroughProfiler, Profiler
from trainkit.strategies import DDPStrategy, FSDPStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy
from trainkit.world import World

if TYPE_CHECKING:
    from trainkit.compiling import Compiler
    from trainkit.cuda_graphs import Graphs
    from trainkit.trainer import Trainer


STARTS = ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
"""Names of DDP, by how its processes start: as the script again, or as this process's children."""
DDP_NAMES: dict[str, dict[str, Any]] = {
    f"{name}{unused}": {"start_method": name.removeprefix("ddp").strip("_") or None, **settings}
    for name in STARTS
    for unused, settings in (
        ("", {}),
        ("_find_unused_parameters_false", {"find_unused_parameters": False}),
        ("_find_unused_parameters_true", {"find_unused_parameters": True}),
    )
}
FSDP_NAMES: dict[str, dict[str, Any]] = {"fsdp": {}, "fsdp_cpu_offload": {"cpu_offload": True}}


class Parts:
    """What a Trainer works with.

    Args:
        trainer: whose settings are checked already.
        given: the Trainer's arguments, by name.

    Raises:
        MisconfigurationException: arguments that can't work together; the message names them.
    """

    def __init__(self, trainer: Trainer, given: Mapping[str, Any]) -> None:
        self.accelerator, devices = accelerator_of(given["accelerator"], given["devices"], given["gpus"])
        counted = given["devices"] != "auto" or given["gpus"] is not None
        self.world = world_of(len(devices) if counted else None, trainer.num_nodes, len(devices))
        launched.begin(self.world)
        if self.world.launcher and not launched.is_ours():  # else the process that starts the others tells
            announce(self.world)
        self.strategy = strategy_of(given["strategy"], devices, self.world)
        if isinstance(self.strategy, ParallelStrategy):
            self.strategy.sync_batchnorm = trainer.sync_batchnorm
        if given["model_registry"] is not None:
            raise MisconfigurationException("model_registry: there is none here; save checkpoints with a callback.")
        plugins = plugins_of(given["plugins"])
        if "precision" in plugins and given["precision"] is not None:
            raise MisconfigurationException(
                f"precision={given['precision']!r} and plugins={given['plugins']!r} both say the precision. Give one."
            )
        self.precision: Precision = plugins.get("precision") or precision_of(given["precision"])
        self.strategy.precision_plugin = self.precision
        if trainer.channels_last and self.strategy.sharded:
            raise MisconfigurationException(
                f"channels_last=True lays whole parameters, and {type(self.strategy).__name__} gives each process a "
                "piece of them. Leave one of the two out."
            )
        self.checkpoint_io: CheckpointIO = plugins.get("checkpoint_io") or CheckpointIO()
        self.compiler = compiler_of(trainer.compile, self.strategy.device)
        self.graphs = graphs_of(trainer.compile, self.strategy.device)
        set_torch_switches(trainer.deterministic, trainer.benchmark)
        bare = trainer.barebones
        self.profiler = profiler_of(given["profiler"])
        logger = False if bare else given["logger"]
        self.loggers = loggers_of(logger, trainer.default_root_dir, trial=bool(trainer.fast_dev_run))
        flags = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        self.callbacks = callbacks_of(
            given["callbacks"],
            **{name: False if bare else arguments.flag(name, given[name]) for name in flags},
            max_time=trainer.max_time,
        )


def accelerator_of(given: Any, devices: Any, gpus: int | None) -> tuple[Accelerator, list[torch.device]]:
    """Return the accelerator and the devices that a run uses on this machine."""
    if not isinstance(given, Accelerator):
        found = resolve_devices(given, devices, gpus)
        return of_device(found[0]), found
    return given, given.get_parallel_devices(given.parse_devices(devices))


def plugins_of(given: Any) -> dict[str, Any]:
    """Return the plugins by what they are: "precision", "checkpoint_io"; at most one of each."""
    plugins: dict[str, Any] = {}
    for plugin in given if isinstance(given, (list, tuple)) else [] if given is None else [given]:
        if isinstance(plugin, Precision):
            kind = "precision"
        elif isinstance(plugin, CheckpointIO):
            kind = "checkpoint_io"
        else:
            raise MisconfigurationException(
                f"plugins takes Precision and CheckpointIO objects. Received: {plugin!r}. A precision's name goes to "
                "precision=."
            )
        if kind in plugins:
            raise MisconfigurationException(f"plugins has two of a kind: {plugins[kind]!r} and {plugin!r}. Give one.")
        plugins[kind] = plugin
    return plugins


def strategy_of(given: str | Strategy, devices: list[torch.device], world: World) -> Strategy:
    """Return the strategy with that name, or the object itself, for this process's device.

    Raises:
        MisconfigurationException: there is no such strategy, or it is for one process and there are several.
    """
    device = devices[world.local_rank % len(devices)]
    if isinstance(given, ParallelStrategy):
        given.device, given.world, given.devices = device, world, devices
        return given
    if isinstance(given, Strategy):
        return given
    if given in ("auto", "single_device") and world.size == 1 and not world.launcher:
        return SingleDeviceStrategy(device)
    if given == "single_device":
        raise MisconfigurationException(
            f"strategy='single_device' is for one process, and there are {world.size}. Use strategy='ddp' or 'auto'."
        )
    if isinstance(given, str) and given in FSDP_NAMES:
        fsdp = FSDPStrategy(device=device, world=world, **FSDP_NAMES[given])
        fsdp.devices = devices
        return fsdp
    settings = DDP_NAMES.get("ddp" if given == "auto" else given) if isinstance(given, str) else None
    if settings is None:
        raise MisconfigurationException(
            f"strategy must be one of 'auto', 'single_device', {', '.join(map(repr, (*STARTS, *FSDP_NAMES)))}, or a "
            f"Strategy object. Received: {given!r}."
        )
    strategy = DDPStrategy(device=device, world=world, **settings)
    strategy.devices = devices
    return strategy


def compiler_of(given: bool | str | dict[str, Any], device: torch.device) -> Compiler | None:
    """Return what compiles the steps, None when nothing does."""
    if not given or given == "graph":
        return None
    from trainkit.compiling import Compiler

    return Compiler(given, device)


def graphs_of(given: bool | str | dict[str, Any], device: torch.device) -> Graphs | None:
    """Return what captures training steps, None when nothing does."""
    if given != "graph":
        return None
    if device.type != "cuda":
        raise MisconfigurationException(
            f"compile='graph' replays CUDA graphs and needs a cuda device. This run's is {device.type!r}. Use "
            "compile=True, or leave it out."
        )
    from trainkit.cuda_graphs import Graphs

    return Graphs.on(device)


def set_torch_switches(deterministic: bool | str | None, benchmark: bool | None) -> None:
    """Set torch's process-wide switches; None leaves them alone."""
    if benchmark is not None or deterministic is not None:
        torch.backends.cudnn.benchmark = bool(benchmark) and not deterministic
    if deterministic is not None:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")


@contextmanager
def torch_switches(trainer: Trainer) -> Iterator[None]:
    """Have torch's process-wide switches as a Trainer wants them for a run of it, and as they were after it.

    `deterministic` and `benchmark` are set when a Trainer is made, too, as in Lightning; another one, made since, may
    have set them otherwise.
    """
    cudnn, precision = torch.backends.cudnn, trainer.matmul_precision
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, matmul = cudnn.benchmark, precision and torch.get_float32_matmul_precision()
    set_torch_switches(trainer.deterministic, trainer.benchmark)
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if precision is not None:
            torch.set_float32_matmul_precision(str(matmul))


def loggers_of(given: Any, root: str, trial: bool) -> list[Logger]:
    """Return the run's loggers: None and True make the default one, False none; for a trial one that does nothing."""
    if given is False:
        return []
    if given is None or given is True:
        loggers: list[Any] = [TensorBoardLogger(root, version=slurm_job())]
    else:
        loggers = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Logger)) else [given]
    for logger in loggers:
        if isinstance(logger, Logger):
            continue
        methods = [name for name, value in vars(Logger).items() if callable(value) and not name.startswith("_")]
        lacking = [name for name in methods if not hasattr(logger, name)]
        if isinstance(logger, type) or lacking:
            hint = "Did you forget the brackets?" if isinstance(logger, type) else f"It has no {', '.join(lacking)}."
            raise TypeError(f"logger must be True, False, or Logger objects. Received: {logger!r}. {hint}")
    return [DummyLogger()] if trial and loggers else loggers


def profiler_of(given: Any) -> Profiler:
    """Return the profiler with that name, or the object itself; one that does nothing for None."""
    if given is None:
        return PassThroughProfiler()
    if isinstance(given, str) and given.lower() in PROFILERS:
        return PROFILERS[given.lower()]()
    if not isinstance(given, Profiler):
        hint = " Did you forget the brackets?" if isinstance(given, type) else ""
        raise MisconfigurationException(
            f"profiler must be one of {sorted(PROFILERS)}, a Profiler object or None. Received: {given!r}.{hint}"
        )
    return given


def slurm_job() -> int | None:
    """Return the id of the SLURM job that runs this, so that one requeued goes on in its directory; None elsewhere."""
    job = os.environ.get("SLURM_JOB_ID", "")
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(job) if job.isdigit() and not interactive else None


def claim_directories(loggers: list[Logger], strategy: Strategy) -> None:
    """Make the run directories, or fail with the reason; loggers of one root share the first one's directory.

    All processes have those of rank 0, which alone makes them.
    """
    for index, logger in enumerate(loggers):
        sharing = [other for other in loggers[:index] if other.root_dir == logger.root_dir is not None]
        if sharing and logger.log_dir != sharing[0].log_dir:
            logger.continue_run(Path(str(sharing[0].log_dir)), 0)

        def claim(logger: Logger = logger) -> Any:
            logger.check_writable()
            return logger.version

        version = strategy.on_rank_zero("making the run directory", claim)
        if isinstance(logger, FileLogger) and strategy.global_rank > 0:
            logger.settle_version(version)


def callbacks_of(
    given: Any,
    *,
    enable_checkpointing: bool | None,
    enable_progress_bar: bool | None,
    enable_model_summary: bool | None,
    max_time: timedelta | None,
) -> list[Callback]:
    """Return the user's callbacks and the default ones, those that save last."""
    from trainkit.callbacks import ModelCheckpoint, ModelSummary, ProgressBar, RichProgressBar, Timer

    callbacks: list[Any] = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            hint = " Did you forget the brackets?" if isinstance(callback, type) else ""
            raise TypeError(f"callbacks must be Callback objects. Received: {callback!r}.{hint}")

    def complete(
        argument: str, enabled: bool | None, belongs: Callable[[Any], bool], make: Callable[[], Callback]
    ) -> None:
        there = [callback for callback in callbacks if belongs(callback)]
        if there and enabled is False and argument != "enable_model_summary":  # that one means the default only
            raise MisconfigurationException(
                f"{argument}=False, but callbacks has a {type(there[0]).__name__}. Leave one of the two out."
            )
        if not there and enabled is not False:
            callbacks.append(make())

    bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    if len(bars) > 1:
        raise MisconfigurationException(f"callbacks has {len(bars)} progress bars; give one.")
    complete("enable_progress_bar", enable_progress_bar, lambda c: isinstance(c, ProgressBar), RichProgressBar)
    complete("enable_model_summary", enable_model_summary, lambda c: isinstance(c, ModelSummary), ModelSummary)
    complete("enable_checkpointing", enable_checkpointing, lambda c: bool(c.saves), ModelCheckpoint)
    if max_time is not None and not any(isinstance(callback, Timer) for callback in callbacks):
        callbacks.append(Timer(max_time))
    return in_order(callbacks)


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks in order, those that tune before and those that write checkpoints behind all others.

    Raises:
        DuplicateStateError: two of them have one name for their state.
    """
    ordered = sorted(callbacks, key=lambda callback: callback.saves - callback.tunes)
    by_key: dict[str, list[Callback]] = {}
    for callback in ordered:
        if overrides(callback, "state_dict", Callback):
            by_key.setdefault(callback.state_key, []).append(callback)
    for key, several in by_key.items():
        # only these are asked for their state: that of others may have to wait for their setup
        if len(several) == 1 or sum(bool(callback.state_dict()) for callback in several) < 2:
            continue
        raise DuplicateStateError(
            f"two callbacks keep their state under {key!r}: a checkpoint could hold only one of them. Give one of the "
            "classes a state_key property of its own."
        )
    return ordered


def module_of(given: Any, stage: str) -> Module:
    """Return the module that a run was given, taken out of `torch.compile` if need be."""
    if isinstance(given, Module):
        return given
    inner = getattr(given, "_orig_mod", None)
    if isinstance(inner, Module):
        warn(
            "the module was wrapped by torch.compile, which compiles forward only; the run uses it as it was. "
            "Compile what the steps call instead, for example self.net.compile()."
        )
        return inner
    hint = " Derive it from trainkit.Module." if isinstance(given, torch.nn.Module) else ""
    raise TypeError(f"{stage} needs a trainkit.Module. Received: {type(given).__name__}.{hint}")


def with_callbacks_of(module: Module, callbacks: list[Callback]) -> list[Callback]:
    """Return the callbacks with the module's own, which replace those of the same type or of one they derive from."""
    own = module.configure_callbacks()
    own = list(own) if isinstance(own, Sequence) else [own]
    kept = [
        callback
        for callback in callbacks
        if type(callback) is Callback or not any(isinstance(other, type(callback)) for other in own)
    ]
    return in_order([*kept, *own])


def check_can_train(trainer: Trainer) -> None:
    """Refuse a module or settings that can't train, before anything is loaded."""
    module = trainer.module
    if not is_overridden(module, "training_step"):
        raise MisconfigurationException(
            f"{type(module).__name__} has no training_step(self, batch, batch_idx), which fit calls with each "
            "batch and which returns the loss."
        )
    if not is_overridden(module, "configure_optimizers"):
        Module.configure_optimizers(module)  # the one that is not overridden raises, and says what to write
    if not module.automatic_optimization:
        for name, value, off in (
            ("accumulate_grad_batches", trainer.accumulate_grad_batches, 1),
            ("gradient_clip_val", trainer.gradient_clip_val or None, None),
        ):
            if value != off:
                raise MisconfigurationException(
                    f"{name}={value} does nothing with automatic_optimization=False: do it in training_step."
                )
    if is_overridden(module, "validation_step") and not trainer.sources.has_loader("val"):
        warn(f"{type(module).__name__} has a validation_step, but there is no val_dataloader: nothing is validated.")
    frozen = [name for name, part in module.named_modules() if not part.training]
    if frozen:
        warn(
            f"{len(frozen)} modules are in evaluation mode at the start of training, {frozen[0] or 'the module'!r} "
            "first; call module.train() if that is not meant."
        )
