"""The callbacks that come with trainkit, each written as a user would write it."""

from __future__ import annotations

from trainkit.callback import Callback as Callback
from trainkit.callbacks.batch_size_finder import BatchSizeFinder as BatchSizeFinder
from trainkit.callbacks.checkpoint import Checkpoint as Checkpoint
from trainkit.callbacks.checkpoint import ModelCheckpoint as ModelCheckpoint
from trainkit.callbacks.console import RichProgressBarTheme as RichProgressBarTheme
from trainkit.callbacks.early_stopping import EarlyStopping as EarlyStopping
from trainkit.callbacks.lr_finder import LearningRateFinder as LearningRateFinder
from trainkit.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
from trainkit.callbacks.progress import ProgressBar as ProgressBar
from trainkit.callbacks.progress import RichProgressBar as RichProgressBar
from trainkit.callbacks.summary import ModelSummary as ModelSummary
from trainkit.callbacks.timer import Timer as Timer

__all__ = [
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "ProgressBar",
    "RichProgressBar",
    "RichProgressBarTheme",
    "Timer",
]
