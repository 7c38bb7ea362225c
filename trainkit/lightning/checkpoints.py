"""Lightning's own checkpoint files, for a program that asks for them by name.

A file of Lightning's is a pickle, and trainkit's loading never unpickles. `trainkit convert OLD.ckpt NEW.ckpt` makes
one of trainkit's out of it, once and for all. Where that is not possible, these read it with
`torch.load(path, weights_only=True)`.
"""

from __future__ import annotations

import os
from typing import Any

from trainkit.checkpoint import foreign, store
from trainkit.checkpoint.io import CheckpointIO


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint holds, Lightning's or trainkit's, its tensors on the host.

        module = MyModule.load_from_checkpoint(load_checkpoint("lightning.ckpt"))

    Args:
        path: a file of this machine.

    Raises:
        CheckpointError: there is none, or it is damaged, or it holds objects; nothing in it has been run.
    """
    if "://" not in os.fspath(path) and (not os.path.isfile(path) or foreign.is_ours(path)):
        return store.load(path)
    return foreign.load(path)


class LightningCheckpointIO(CheckpointIO):
    """Resume and evaluate from Lightning's files: `Trainer(plugins=[LightningCheckpointIO()])`.

    What a run saves are trainkit's files.
    """

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what lies under a path, Lightning's or trainkit's, its tensors on the host; see `load_checkpoint`.

        Under an address only trainkit's own are read.
        """
        return super().load_checkpoint(path) if "://" in os.fspath(path) else load_checkpoint(path)
