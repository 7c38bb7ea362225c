"""Loggers: where the numbers of a run go. None of them loads tensorboard before it writes."""

from trainkit.loggers.base import FileLogger as FileLogger
from trainkit.loggers.base import Logger as Logger
from trainkit.loggers.csv import CSVLogger as CSVLogger
from trainkit.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger

__all__ = ["CSVLogger", "FileLogger", "Logger", "TensorBoardLogger"]
