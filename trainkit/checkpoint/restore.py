"""From a running Trainer to a checkpoint's contents, and back."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from trainkit.channels_last import as_saved
from trainkit.checkpoint import changes, layout, lightning, manifest, store
from trainkit.checkpoint.io import is_own
from trainkit.errors import (
    CheckpointError,
    IncompleteCheckpointError,
    MisconfigurationException,
    NoCheckpointError,
    warn,
)
from trainkit.hparams import namespaces_of, plain_hparams, tell_of_secrets
from trainkit.loggers.base import run_directory, runs_directory
from trainkit.metrics.resumed import share_of
from trainkit.random import seed_for_rank
from trainkit.stages import RunningStage, TrainerFn
from trainkit.state import ByKey, resume_state

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


LAID = ("state_dict", "optimizer_states")
"""Where in a checkpoint tensors are that `channels_last` lays in another order."""


NOT_HELD = ("optimizer_states", "ranks")
"""Where in a checkpoint nothing is kept under the name of a module's tensor."""


def collect(trainer: Trainer, weights_only: bool) -> dict[str, Any]:
    """Return what a checkpoint of this moment holds, under Lightning's keys where Lightning has one."""
    from trainkit import __version__

    module, datamodule, progress = trainer.module, trainer.datamodule, trainer.progress
    between_epochs = progress.batch == 0 and progress.epoch > 0
    checkpoint: dict[str, Any] = {
        # while fit runs the epoch that the last finished batch belongs to, afterwards how many there were
        "epoch": progress.epoch - between_epochs if trainer.fitting else trainer.current_epoch,
        "global_step": progress.step,
        "trainkit_version": __version__,
        "pytorch-lightning_version": lightning.VERSION,
        "state_dict": module.state_dict(),
        "progress": progress.state_dict(),
        "loops": lightning.loops_of(
            progress.state_dict(), trainer.num_training_batches, len(trainer.optimizers), trainer.fitting
        ),
    }
    if not weights_only and "train" in trainer.sources.loaders:
        checkpoint["callbacks"] = ByKey(trainer.callbacks).state_dict()
        for key, part in resume_state(trainer).items():
            checkpoint[key] = part.state_dict()
        if trainer.world_size > 1:
            checkpoint["ranks"] = trainer.ranks
        if switched := _switched(trainer):
            checkpoint["switched"] = switched
        checkpoint["run_dirs"] = [
            os.path.realpath(run_directory(logger, trainer.default_root_dir)) if logger.root_dir else None
            for logger in trainer.loggers
        ]
        checkpoint["made_of"] = {**trainer.made_of, "data": changes.data_of(trainer)}
    if module.hparams:
        tell_of_secrets(module)
        checkpoint[module.CHECKPOINT_HYPER_PARAMS_NAME] = module.hparams_name
        checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = plain_hparams(module.hparams)
        if namespaces := namespaces_of(module.hparams):
            checkpoint["hparams_namespaces"] = namespaces
    if datamodule is not None:
        if state := datamodule.state_dict():
            checkpoint[type(datamodule).__qualname__] = state
        if datamodule.hparams:
            tell_of_secrets(datamodule)
            checkpoint[datamodule.CHECKPOINT_HYPER_PARAMS_NAME] = datamodule.hparams_name
            checkpoint[datamodule.CHECKPOINT_HYPER_PARAMS_KEY] = plain_hparams(datamodule.hparams)
    if trainer.channels_last:  # a file is the same with and without it
        checkpoint.update({key: as_saved(checkpoint[key]) for key in LAID if key in checkpoint})
    trainer.hooks.on_save_checkpoint(checkpoint)
    return checkpoint


OF_A_RANK = ("random", "metrics", "loader")
"""What each process has for itself; of everything else all have the same."""


def state_of_rank(trainer: Trainer) -> dict[str, Any]:
    """Return what this process has for itself."""
    parts = resume_state(trainer)
    return {key: parts[key].state_dict() for key in OF_A_RANK}


def for_rank(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with what this process had, or, with another number of processes, takes over.

    Then rank 0 has what was logged in the epoch so far, of all of them; and as random states those of processes that
    were not there are drawn from the run's.
    """
    ranks, world, rank = checkpoint.get("ranks"), trainer.world_size, trainer.global_rank
    if ranks is None and world == 1:
        return checkpoint
    ranks = ranks or [{key: checkpoint[key] for key in OF_A_RANK if key in checkpoint}]
    own = dict(ranks[rank] if rank < len(ranks) else ranks[0])
    states = [state["metrics"] for state in ranks if "metrics" in state]
    if states:
        own["metrics"] = share_of(states, *trainer.strategy.shard, trainer.module)
    if rank >= len(ranks):
        own.pop("random", None)
    return {**{key: value for key, value in checkpoint.items() if key not in OF_A_RANK}, **own}


def _switched(trainer: Trainer) -> dict[str, dict[str, bool]]:
    """Return what training has frozen or put into another mode, and not what a toggled optimizer or validation has."""
    switched = trainer.switches.state_dict()
    if getattr(trainer.module, "_toggled", None):
        switched.pop("requires_grad", None)
    if trainer.state.stage != RunningStage.TRAINING:
        switched.pop("training", None)
    return switched


def restore_weights(trainer: Trainer, checkpoint: dict[str, Any], path: Path) -> None:
    """Load the weights and give hooks, data module and callbacks their part, before the module goes to its device.

    Callbacks have their state back from here on: one that changes optimizers does so before their state is loaded.
    """
    module, datamodule = trainer.module, trainer.datamodule
    fitting = trainer.state.fn == TrainerFn.FITTING
    if fitting and "optimizer_states" not in checkpoint:
        raise IncompleteCheckpointError(
            f"{path} has only weights (optimizer_states missing): a run can't be resumed from it. "
            f"Start a new run from its weights: {type(module).__name__}.load_from_checkpoint({str(path)!r})."
        )
    own = module.state_dict()
    checkpoint.update({key: layout.as_held(value, own) for key, value in checkpoint.items() if key not in NOT_HELD})
    module.on_load_checkpoint(checkpoint)
    if fitting:  # given back when the rest of the checkpoint does not fit
        trainer.weights_before = copied(module.state_dict())
    load_weights(module, checkpoint, path, module.strict_loading, same_dtypes=fitting and module.strict_loading)
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    if fitting:
        for callback in trainer.callbacks:
            callback.on_load_checkpoint(trainer, module, checkpoint)
        ByKey(trainer.callbacks).load_state_dict(checkpoint.get("callbacks", {}))


def restore_run(trainer: Trainer, checkpoint: dict[str, Any], path: Path) -> None:
    """Load everything else that a resumed run needs, when optimizers and loaders are there.

    Raises:
        CheckpointError: it does not fit this run; the module has the weights back that it had before.
    """
    try:
        _restore_run(trainer, checkpoint, path)
    except (CheckpointError, MisconfigurationException):
        trainer.module.load_state_dict(trainer.weights_before or {}, strict=False)
        raise
    finally:
        trainer.weights_before = None


def _restore_run(trainer: Trainer, checkpoint: dict[str, Any], path: Path) -> None:
    parts = resume_state(trainer)
    if lightning.is_foreign(checkpoint) and "optimizer_states" in checkpoint:
        checkpoint = lightning.parts_of(checkpoint, path)
        parts = {key: part for key, part in parts.items() if key in checkpoint}
    checkpoint = for_rank(trainer, checkpoint)
    if trainer.global_rank > 0:
        parts = {key: part for key, part in parts.items() if key in checkpoint or key not in OF_A_RANK}
    missing = [key for key in parts if key not in checkpoint]
    if missing:
        raise IncompleteCheckpointError(f"{path} lacks {', '.join(missing)}: a run can't be resumed from it.")
    _check_optimizers(trainer.optimizers, checkpoint["optimizer_states"], path)
    changes.check_groups(trainer, checkpoint, path)
    changes.check(trainer, checkpoint, path, trainer.ckpt_strict)
    checkpoint["optimizer_states"] = layout.as_stepped(checkpoint["optimizer_states"], trainer.optimizers)
    for key, part in parts.items():
        try:
            part.load_state_dict(checkpoint[key])
        except CheckpointError as error:
            raise CheckpointError(f"{path} does not fit this run: {error}") from None
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path} does not fit this run: its {key}: {error}.") from error
    if "random" not in parts:  # there was no such process
        seed_for_rank(trainer.global_rank)
    for optimizer in trainer.optimizers:
        if optimizer.state:  # or schedules would warn that they moved before it, which happened in another process
            optimizer._opt_called = True  # type: ignore[attr-defined]
        _state_beside_parameters(optimizer)
    if trainer.strategy.unsaved is not None:
        warn(f"the run goes on from its checkpoint, but not to the last bit: {trainer.strategy.unsaved} is not in it.")
    if trainer.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        warn(
            "the run goes on from its checkpoint, but not to the last bit: some of cuda's kernels add up in any order. "
            "Trainer(deterministic=True) uses those that do not."
        )
    done, limit = trainer.progress.epoch, trainer.max_epochs
    if limit is not None and 0 <= limit < done:
        raise MisconfigurationException(
            f"{path} was written after {done} epochs, more than Trainer(max_epochs={limit}) allows: epochs are "
            f"counted from the beginning of the run. To go on training, set max_epochs above {done}."
        )


def _state_beside_parameters(optimizer: Optimizer) -> None:
    """Bring an optimizer's state to the device of its parameters; step counters stay where they are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and name != "step" and value.device != parameter.device:
                state[name] = value.to(parameter.device)


def _check_optimizers(optimizers: list[Optimizer], saved: list[dict[str, Any]], path: Path) -> None:
    """Refuse optimizers that differ in number, kind or groups, before the first of them is changed.

    Of another kind torch would take the settings over, and fail in the first step.
    """
    if len(optimizers) != len(saved):
        raise CheckpointError(
            f"{path} does not fit this run: the checkpoint has {len(saved)} optimizers, configure_optimizers returned "
            f"{len(optimizers)}."
        )
    for optimizer, state in zip(optimizers, saved, strict=True):
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        there_sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != there_sizes:
            raise CheckpointError(
                f"{path} does not fit this run: the parameter groups of {type(optimizer).__name__} have {sizes} "
                f"parameters, those of the checkpoint {there_sizes}."
            )
        own = {key for group in optimizer.param_groups for key in group}
        there = {key for group in state["param_groups"] for key in group}
        missing = sorted(own - there - {"initial_lr"})
        if missing:
            raise CheckpointError(
                f"{path} does not fit this run: configure_optimizers returned {type(optimizer).__name__}, whose "
                f"{', '.join(missing)} the checkpoint's optimizer does not have. Use the optimizer it was trained with."
            )


def load_weights(
    module: nn.Module, checkpoint: Mapping[str, Any], path: object, strict: bool, same_dtypes: bool = False
) -> None:
    """Load a checkpoint's weights, comparing names, shapes and dtypes before anything is changed.

    Args:
        module: where to.
        checkpoint: has them under "state_dict".
        path: its name in messages.
        strict: refuse names that only one of the two has.
        same_dtypes: refuse other dtypes; else values are converted, as torch does.

    Raises:
        CheckpointError: they do not fit; the message names the keys.
    """
    if "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} has no 'state_dict'; it has: {', '.join(map(str, checkpoint)) or 'nothing'}.")
    saved: Mapping[str, Any] = checkpoint["state_dict"]
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{path} has no weights: its 'state_dict' is a {type(saved).__name__}.")
    own = module.state_dict()
    problems = _listed(
        "the module has a tensor, the checkpoint something else",
        [
            f"{key} ({type(saved[key]).__name__})"
            for key in own
            if key in saved and isinstance(own[key], Tensor) and not isinstance(saved[key], Tensor)
        ],
    )
    if strict:
        problems += _listed("the module has, the checkpoint has not", [key for key in own if key not in saved])
        problems += _listed("the checkpoint has, the module has not", [key for key in saved if key not in own])
    problems += _listed(
        "the shapes differ",
        [
            f"{key} (module {tuple(own[key].shape)}, checkpoint {tuple(saved[key].shape)})"
            for key in own
            if key in saved
            and isinstance(own[key], Tensor)
            and isinstance(saved[key], Tensor)
            and not is_lazy(own[key])
            and own[key].shape != saved[key].shape
        ],
    )
    if same_dtypes:
        problems += _listed(
            "the dtypes differ",
            [
                f"{key} (module {own[key].dtype}, checkpoint {saved[key].dtype})"
                for key in own
                if isinstance(own[key], Tensor) and isinstance(saved.get(key), Tensor)
                if not is_lazy(own[key]) and own[key].dtype != saved[key].dtype
            ],
        )
    if problems:
        raise CheckpointError(f"{path} does not fit {type(module).__name__}:\n" + "\n".join(problems))
    module.load_state_dict(saved, strict=strict)


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a module's state; parameters that have no shape yet are left out."""
    return {
        key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
        if not is_lazy(value)
    }


def _listed(what: str, keys: list[str], most: int = 10) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return [f"  {what}: {', '.join(keys[:most])}{more}"]


def load(trainer: Trainer, path: str | PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint holds, its tensors on the host.

    Of a directory that is read where weights are spread, each process reads of these what it has, when that is known.
    Here all its files are compared with what was written, each by one of the processes.
    """
    if not trainer.strategy.sharded or not is_own(trainer.checkpoint_io) or not manifest.is_ours(path):
        return trainer.checkpoint_io.load_checkpoint(path)
    from trainkit.checkpoint import jointly

    return jointly.load(trainer, path)


def resolve(trainer: Trainer, ckpt_path: str | PathLike[str] | None, stage: str) -> str | PathLike[str] | None:
    """Return the file that a `ckpt_path` means: itself, "last" or "best"; None to start from zero.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if ckpt_path is None:
        if stage != "fit" or not _rescued(trainer):
            return None
        ckpt_path = "last"  # an earlier fit was cut short, and a callback has what there was
    if str(ckpt_path) == "last":
        path = find_last(trainer)
        if path is None and stage != "fit":
            raise NoCheckpointError("ckpt_path='last': there is no checkpoint yet. Train first, or name a file.")
        if path is None:
            warn("ckpt_path='last': there is no checkpoint yet, the run starts from zero.")
        return path
    if str(ckpt_path) == "best":
        callbacks = trainer.checkpoint_callbacks
        if len(callbacks) > 1:
            warn(f"ckpt_path='best' means the best one of the first of {len(callbacks)} checkpoint callbacks.")
        best = getattr(trainer.checkpoint_callback, "best_model_path", "") or _best_of_newest_run(trainer)
        if not best:
            raise NoCheckpointError(
                "ckpt_path='best': this Trainer has not saved a best checkpoint, and neither has the newest run. "
                "Name a file, or use 'last'."
            )
        return store.local(best)
    return store.local(ckpt_path)


def _best_of_newest_run(trainer: Trainer) -> str:
    """Return the best checkpoint as the newest run's last one knows it, "" when there is none."""
    last, callback = find_last(trainer), trainer.checkpoint_callback
    if last is None or callback is None:
        return ""
    state = store.head(last).state.get("callbacks", {}).get(callback.state_key, {})
    best = str(state.get("best_model_path") or "")
    if best and not store.exists(best):  # the run directory was moved as a whole
        best = os.path.join(os.path.dirname(last), os.path.basename(best))
    return best if best and store.exists(best) else ""


def continue_loggers(trainer: Trainer, checkpoint: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Let loggers go on in the run directory that a checkpoint is of, if it is that run's newest one.

    That is the directory it lies in, wherever that was moved; else the one it was written from. From an older
    checkpoint a branch begins, which gets a directory of its own: what came after it stays untouched.
    """
    step = int(checkpoint.get("global_step", 0))
    row = (checkpoint.get("progress") or {}).get("window", step)
    written_from = checkpoint.get("run_dirs", ())
    beside = None
    if not store.is_remote(path) and Path(path).parent.name == "checkpoints":
        beside = Path(path).resolve().parent.parent
    if not store.is_newest(path, step):
        return
    for index, logger in enumerate(trainer.loggers):
        root = Path(logger.root_dir).resolve() if logger.root_dir else None
        run = beside
        if beside is None or beside.parent != root:
            run = Path(written_from[index]) if index < len(written_from) and written_from[index] else None
        if run is not None and run.parent == root and run.is_dir():
            logger.continue_run(run, row)


def find_last(trainer: Trainer) -> str | PathLike[str] | None:
    """Return the newest checkpoint that `ckpt_path="last"` means, None when there is none yet.

    It is looked for in the checkpoint callbacks' own folders, in all of them; without one, in the folders of the runs
    that the first logger has made, the newest first.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    own = [getattr(c, "dirpath", None) for c in trainer.checkpoint_callbacks if not hasattr(c, "ckpt_path")]
    folders = [store.local(folder) for folder in own if folder]
    rescued = _rescued(trainer)
    if rescued:
        ours = [store.newest(folder) for folder in folders if store.checkpoints_in(folder)]
        return max([*rescued, *(path for path in ours if path)], key=store.step_of)
    if folders:
        return store.newest(*dict.fromkeys(folders))
    if trainer.logger is not None:
        root = Path(runs_directory(trainer.logger, trainer.default_root_dir))
        runs = [run for run in root.iterdir() if run.is_dir()] if root.is_dir() else []
        folders = [run / "checkpoints" for run in (*sorted(runs, key=_run_number, reverse=True), root)]
    else:
        folders = [Path(trainer.default_root_dir) / "checkpoints"]
    for folder in folders:
        if not store.checkpoints_in(folder):
            continue
        return store.newest(folder)
    return None


def _rescued(trainer: Trainer) -> list[Path]:
    """Return what exists of callbacks with one file of a known name, such as OnExceptionCheckpoint."""
    named = [getattr(callback, "ckpt_path", None) for callback in trainer.checkpoint_callbacks]
    return [Path(path) for path in named if path and os.path.exists(path)]


def _run_number(run: Path) -> tuple[int, str]:
    digits = run.name.removeprefix("version_")
    return (int(digits), "") if digits.isdigit() else (-1, run.name)
