"""RecordConfig: what a run was made of, in its directory and with its loggers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from trainkit import Callback, Module, Trainer
from trainkit.config.parser import dump
from trainkit.errors import MisconfigurationException, warn
from trainkit.loggers.base import private
from trainkit.redaction import redacted


class RecordConfig(Callback):
    """Write the resolved config into the run directory when fit starts, and tell it to the loggers.

    The first fit of a directory writes `config.yaml`, a resumed one `config.resume-1.yaml` and so on: nothing that is
    there is ever written over. Loggers get the config as nested hyperparameters, unless the module or the data saved
    their own. What looks like a secret is "***" in both.

    Args:
        config: the resolved config.
        header: a comment for the file's first line.
    """

    def __init__(self, config: dict[str, Any], header: str) -> None:
        self.secrets: list[str] = []
        self.config, self.header = redacted(config, self.secrets), header
        self.path: Path | None = None
        self.first_step: int | None = None
        """The run's global_step before its first batch; None before training."""

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if self.secrets:
            names = ", ".join(map(repr, self.secrets))
            warn(f"the config's {names} looks like a secret: it is '***' in the run directory and with loggers.")
        self.path = self._write(Path(trainer.log_dir or trainer.default_root_dir))
        if not module.hparams and not (trainer.datamodule is not None and trainer.datamodule.hparams):
            for logger in trainer.loggers:
                logger.log_hyperparams(self.config)

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        self.first_step = trainer.global_step

    def _write(self, folder: Path) -> Path:
        text = f"# {self.header}\n{dump(self.config)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number in itertools.count():
                path = folder / (f"config.resume-{number}.yaml" if number else "config.yaml")
                try:
                    with open(path, "x", encoding="utf-8", opener=private) as file:
                        file.write(text)
                except FileExistsError:
                    continue
                return path
        except OSError as error:
            raise MisconfigurationException(
                f"the run directory {str(folder)!r} can't be written: {error.strerror}."
            ) from None
        raise AssertionError("itertools.count ends")
