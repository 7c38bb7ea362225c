"""The parts a Trainer makes from its settings: strategy, loggers, callbacks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from trainkit.callback import Callback
from trainkit.errors import MisconfigurationException
from trainkit.loggers import Logger
from trainkit.strategies import Strategy


def strategy_of(given: str | Strategy, device: torch.device) -> Strategy:
    """Return the strategy with that name, or the object itself."""
    if isinstance(given, Strategy):
        return given
    if given in ("auto", "single_device"):
        return Strategy(device)
    raise ValueError(f"strategy must be 'auto', 'single_device' or a Strategy object. Received: {given!r}.")


def set_torch_switches(deterministic: bool | str | None, benchmark: bool | None) -> None:
    """Set torch's process-wide switches; None leaves them alone."""
    if benchmark is not None or deterministic is not None:
        torch.backends.cudnn.benchmark = bool(benchmark) and not deterministic
    if deterministic is not None:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")


def loggers_of(given: Any, root: str) -> list[Logger]:
    """Return the run's loggers: None and True make the default one, False none."""
    if given is False:
        return []
    if given is None or given is True:
        from trainkit.loggers import TensorBoardLogger

        return [TensorBoardLogger(root)]
    loggers = list(given) if isinstance(given, (list, tuple)) else [given]
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise TypeError(f"logger must be True, False, or Logger objects. Received: {logger!r}.")
    return loggers


def claim_directories(loggers: list[Logger]) -> None:
    """Make the run directories, or fail with the reason; loggers of one root share the first one's directory."""
    for logger in loggers:
        first = loggers[0]
        if logger.root_dir is not None and logger.root_dir == first.root_dir and logger.log_dir != first.log_dir:
            logger.continue_run(Path(str(first.log_dir)), 0)
        logger.check_writable()


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
        if there and enabled is False:
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
    return savers_last(callbacks)


def savers_last(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks in order, those that write checkpoints behind all others."""
    return sorted(callbacks, key=lambda callback: callback.saves)
