"""Lightning's names, so that a program changes nothing but its import lines.

    import lightning as L                            ->  import trainkit.lightning as L
    from lightning.pytorch.callbacks import Timer    ->  from trainkit.lightning.pytorch.callbacks import Timer
    import pytorch_lightning as pl                   ->  import trainkit.lightning.pytorch as pl

Lightning's own files load through `L.load_checkpoint` and `L.LightningCheckpointIO` only, or `trainkit convert`.

The names mean trainkit's own classes and functions: `L.LightningModule is trainkit.Module`. Which module has which
names is the table in `trainkit.lightning.names`; everything loads when it is first used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from trainkit.lightning import names

if TYPE_CHECKING:
    from trainkit.callback import Callback as Callback
    from trainkit.datamodule import DataModule as LightningDataModule
    from trainkit.lightning.checkpoints import LightningCheckpointIO as LightningCheckpointIO
    from trainkit.lightning.checkpoints import load_checkpoint as load_checkpoint
    from trainkit.module import Module as LightningModule
    from trainkit.random import seed_everything as seed_everything
    from trainkit.trainer import Trainer as Trainer

__version__ = "2.6.6"  # the version of Lightning whose names these are
__all__ = [
    "Callback",
    "LightningCheckpointIO",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "__version__",
    "load_checkpoint",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    value = globals()[name] = names.find("", name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *names.known("")})


if not any(isinstance(finder, names.Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, names.Finder())
