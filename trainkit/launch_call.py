"""A call in several processes that are made of this one: it goes there, and what rank 0 has at its end comes back.

Back come the module's weights, what was logged, the counters, the callbacks' states, where loggers and checkpoints are,
and what the call returned. The optimizers do not: a run goes on from a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.multiprocessing.spawn import ProcessExitedException

from trainkit import launched
from trainkit.checkpoint.layout import whole
from trainkit.components import module_of
from trainkit.environment import detect
from trainkit.errors import warn
from trainkit.hooks import is_overridden
from trainkit.launch import Failure, Workers, private_folder
from trainkit.loggers import FileLogger
from trainkit.metrics import Metrics
from trainkit.stages import TrainerFn, TrainerState
from trainkit.state import ByKey
from trainkit.strategies import ParallelStrategy
from trainkit.tree import map_tensors

if TYPE_CHECKING:
    from trainkit.module import Module
    from trainkit.trainer import Trainer
    from trainkit.world import World

CALL, OUTCOME = "call.pkl", "outcome.pkl"
FUNCTIONS = {"fit": TrainerFn.FITTING, "validate": TrainerFn.VALIDATING, "test": TrainerFn.TESTING}
SEEN = ("seen", "seen_by_loggers", "seen_on_bar")
Call = tuple["Trainer", str, dict[str, Any]]

_inherited: Call | None = None
"""The call, for processes that are forked."""


class RemoteError(Exception):
    """The traceback of an exception in another process, as the cause of that exception in this one."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def call(trainer: Trainer, method: str, arguments: dict[str, Any], way: str) -> Any:
    """Run a method of the Trainer in new processes, and return what rank 0's returned.

    Args:
        trainer: has afterwards what rank 0's had.
        method: "fit", "validate", "test" or "predict".
        arguments: of the call.
        way: "spawn" or "fork".

    Raises:
        Exception: the one that ended the run, with the traceback of its process as the cause.
        ProcessExitedException: a process was killed.
        KeyboardInterrupt, SystemExit: as a signal ends a run of one process.
    """
    global _inherited
    with private_folder() as folder:
        if way == "spawn":
            with (Path(folder) / CALL).open("wb") as to:  # not through shared memory, where all would train one module
                pickle.dump((trainer, method, arguments), to, protocol=pickle.HIGHEST_PROTOCOL)
        _inherited = (trainer, method, arguments) if way == "fork" else None
        sys.stdout.flush()
        sys.stderr.flush()
        workers = Workers(trainer.strategy.world.local_size, folder)
        try:
            failed = workers.run(work, (folder,), report=False, start_method=way)
        finally:
            _inherited = None
        outcome = _read(Path(folder) / OUTCOME)
        if outcome is not None:
            take_over(trainer, method, arguments, outcome)
        if failed is not None or workers.signal is not None:
            error = _read(Path(folder) / f"{failed.rank}.pkl") if failed is not None else None
            workers.leave_if_signalled(failed)
            if failed is not None:
                raise_again(failed, error)
    return None if outcome is None else outcome["value"]


def _read(path: Path) -> Any:
    """Return what one of the processes has left, None if it has left nothing that can be read."""
    try:
        return pickle.loads(path.read_bytes())
    except Exception:
        return None


def raise_again(failed: Failure, error: BaseException | None) -> None:
    """Raise here what ended the run there."""
    if isinstance(error, Exception):
        raise error from RemoteError(failed.trace)
    if failed.trace:
        raise RuntimeError(failed.how) from RemoteError(failed.trace)
    said = f": {failed.said.strip()}" if failed.said.strip() else ""
    raise ProcessExitedException(
        f"{failed.how}{said}", error_index=failed.rank, error_pid=-1, exit_code=failed.code, signal_name=None
    )


# ---------------------------------------------------------------- in one of the processes
def work(folder: str) -> None:
    """Run the call in this process, which is one of several.

    Raises:
        SystemExit: it failed, or a signal ended it; the error is in the folder.
    """
    if _inherited is not None:
        torch.set_num_threads(1)  # first of all: the threads of the process that this one is a copy of are not here
    if hasattr(os, "setsid"):
        with contextlib.suppress(OSError):
            os.setsid()  # Ctrl-C comes from the process that has started this one, and not twice
    world = cast("World", detect())
    if world.rank > 0:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    launched.begin(world)
    try:
        trainer, method, arguments = _inherited or pickle.loads((Path(folder) / CALL).read_bytes())
        join(trainer, world, arguments)
        weights: dict[str, Any] | None = None
        try:
            value = getattr(trainer, method)(**arguments)
            weights = weights_of(trainer)
        finally:
            if world.rank == 0 and trainer.model is not None:
                kept = outcome_of(trainer, weights)
                _leave(Path(folder) / OUTCOME, {**kept, "value": None})
        if world.rank == 0:
            _leave(Path(folder) / OUTCOME, {**kept, "value": value})
    except (KeyboardInterrupt, SystemExit) as left:
        code = left.code if isinstance(left, SystemExit) else 130
        raise SystemExit(code) from None  # multiprocessing takes a KeyboardInterrupt for a good end
    except Exception as error:
        launched.note(error, uncaught=True)
        with contextlib.suppress(Exception):
            _leave(Path(folder) / f"{world.rank}.pkl", error)
        if world.rank > 0:
            traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _leave(path: Path, thing: Any) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(pickle.dumps(thing))
    os.replace(unfinished, path)


def join(trainer: Trainer, world: World, arguments: Mapping[str, Any]) -> None:
    """Make a Trainer from before the processes began one of theirs."""
    strategy = trainer.strategy
    strategy.world = world
    if isinstance(strategy, ParallelStrategy) and strategy.devices:
        strategy.device = strategy.devices[world.local_rank % len(strategy.devices)]
    module = arguments.get("model")
    if isinstance(module, torch.nn.Module):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type == "cpu" and tensor.is_shared():  # type: ignore[no-untyped-call]
                # each process trains weights of its own
                tensor.data = tensor.data.clone()


# ---------------------------------------------------------------- what comes back
def weights_of(trainer: Trainer) -> dict[str, Any] | None:
    """Return the module's weights, which all processes gather where each has a piece; None where they need not."""
    return whole(trainer.module.state_dict()) if trainer.strategy.sharded else None


def outcome_of(trainer: Trainer, weights: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what a Trainer has after a run, as things that can be sent.

    Args:
        trainer: whose.
        weights: those that processes have gathered; None: this process's own. Of a run that failed while each process
            had a piece there are none.
    """
    metrics = trainer.metrics
    if weights is None:
        weights = {} if trainer.strategy.sharded else trainer.module.state_dict()
    return {
        "weights": map_tensors(lambda tensor: tensor.detach().cpu(), weights),
        "progress": trainer.progress.state_dict(),
        "published": sorted(metrics.published),
        **{name: map_tensors(lambda tensor: tensor.detach().cpu(), getattr(metrics, name)) for name in SEEN},
        "callbacks": ByKey(trainer.callbacks).state_dict(),
        "versions": [logger.version if isinstance(logger, FileLogger) else None for logger in trainer.loggers],
        "status": trainer.state.status,
        "signal": trainer.interruption.signal,
        "should_stop": trainer.should_stop,
        "max_epochs": trainer.max_epochs,
        "resume_path": trainer.resume_path,
        "predictions": trainer.predictions,
    }


def take_weights(module: Module, weights: Mapping[str, Any]) -> None:
    """Load the weights that rank 0 had, as far as the module has such parameters here, too."""
    if is_overridden(module, "configure_model"):
        module.configure_model()
    lacking, surplus = module.load_state_dict(weights, strict=False)
    if lacking or surplus:
        warn(
            f"not all weights came back from the processes that trained them: {', '.join([*surplus, *lacking])}. What "
            "a hook such as `setup` makes is made in those processes only; make it in __init__ or configure_model."
        )


def take_over(trainer: Trainer, method: str, arguments: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
    """Give a Trainer what rank 0's had after the run."""
    module = arguments.get("model")
    trainer.module = module_of(getattr(trainer, "module", None) if module is None else module, method)
    if outcome["weights"]:
        take_weights(trainer.module, outcome["weights"])
    trainer.progress.load_state_dict(outcome["progress"])
    trainer.metrics = Metrics(trainer.module, has_logger=bool(trainer.loggers))
    for name in SEEN:
        setattr(trainer.metrics, name, outcome[name])
    trainer.metrics._logged = outcome["seen"].keys() - set(outcome["published"])
    trainer.metrics.hook = "outside"
    trainer.module.attach(trainer, trainer.metrics)
    ByKey(trainer.callbacks).load_state_dict(outcome["callbacks"])
    for logger, version in zip(trainer.loggers, outcome["versions"], strict=False):
        if isinstance(logger, FileLogger) and version is not None:
            logger.settle_version(version)
    trainer.state = TrainerState(outcome["status"], FUNCTIONS.get(method, TrainerFn.PREDICTING), None)
    trainer.interruption.signal = outcome["signal"]
    for name in ("should_stop", "max_epochs", "resume_path", "predictions"):
        setattr(trainer, name, outcome[name])
