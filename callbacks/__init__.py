"""The callbacks that come with trainkit, each written as a user would write it."""

from __future__ import annotations

from trainkit.callback import Callback as Callback
from trainkit.callbacks.batch_size_finder import BatchSizeFinder as BatchSizeFinder
from trainkit.callbacks.checkpoint import Checkpoint as Checkpoint
from trainkit.callbacks.checkpoint import ModelCheckpoint as ModelCheckpoint
from trainkit.callbacks.console import RichProgressBarTheme as RichProgressBarTheme
from trainkit.callbacks.device_stats_monitor import DeviceStatsMonitor as DeviceStatsMonitor
from trainkit.callbacks.early_stopping import EarlyStopping as EarlyStopping
from trainkit.callbacks.finetuning import BackboneFinetuning as BackboneFinetuning
from trainkit.callbacks.finetuning import BaseFinetuning as BaseFinetuning
from trainkit.callbacks.gradient_accumulation_scheduler import (
    GradientAccumulationScheduler as GradientAccumulationScheduler,
)
from trainkit.callbacks.lambda_function import LambdaCallback as LambdaCallback
from trainkit.callbacks.lr_finder import LearningRateFinder as LearningRateFinder
from trainkit.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
from trainkit.callbacks.on_exception_checkpoint import OnExceptionCheckpoint as OnExceptionCheckpoint
from trainkit.callbacks.prediction_writer import BasePredictionWriter as BasePredictionWriter
from trainkit.callbacks.progress import RichProgressBar as RichProgressBar
from trainkit.callbacks.progress_bar import ProgressBar as ProgressBar
from trainkit.callbacks.pruning import ModelPruning as ModelPruning
from trainkit.callbacks.spike import SpikeDetection as SpikeDetection
from trainkit.callbacks.stochastic_weight_avg import StochasticWeightAveraging as StochasticWeightAveraging
from trainkit.callbacks.summary import ModelSummary as ModelSummary
from trainkit.callbacks.summary import RichModelSummary as RichModelSummary
from trainkit.callbacks.throughput_monitor import ThroughputMonitor as ThroughputMonitor
from trainkit.callbacks.timer import Timer as Timer
from trainkit.callbacks.tqdm_progress import TQDMProgressBar as TQDMProgressBar
from trainkit.callbacks.weight_averaging import EMAWeightAveraging as EMAWeightAveraging
from trainkit.callbacks.weight_averaging import WeightAveraging as WeightAveraging

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "RichProgressBarTheme",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]
