"""Loggers: where the numbers of a run go. None of them loads the library it writes with before it is used."""

from trainkit.loggers.base import DummyLogger as DummyLogger
from trainkit.loggers.base import FileLogger as FileLogger
from trainkit.loggers.base import Logger as Logger
from trainkit.loggers.base import rank_zero_experiment as rank_zero_experiment
from trainkit.loggers.csv import CSVLogger as CSVLogger
from trainkit.loggers.jsonl import JSONLinesLogger as JSONLinesLogger
from trainkit.loggers.mlflow import MLFlowLogger as MLFlowLogger
from trainkit.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
from trainkit.loggers.wandb import WandbLogger as WandbLogger

__all__ = [
    "CSVLogger",
    "DummyLogger",
    "FileLogger",
    "JSONLinesLogger",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "rank_zero_experiment",
]


def __getattr__(name: str) -> object:
    if name == "CometLogger":
        raise ModuleNotFoundError(
            "CometLogger needs comet_ml, and trainkit has no adapter for it yet. `pip install comet_ml` and derive a "
            "Logger whose log_metrics and log_hyperparams call a comet_ml.Experiment.",
            name="comet_ml",
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
