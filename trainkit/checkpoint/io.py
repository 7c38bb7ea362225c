"""CheckpointIO: where checkpoints are written and read. The base class is trainkit's own files."""

from __future__ import annotations

import os
from typing import Any

from trainkit.checkpoint import store


class CheckpointIO:
    """Write and read checkpoints; derive from it to keep them elsewhere: `Trainer(plugins=[MyCheckpointIO()])`.

    This one writes files of this machine, and of the stores that fsspec knows ("s3://bucket/x.ckpt"), whole or not at
    all, and executes nothing when it reads them.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint's contents under a path. A file of that name is replaced, at once when all is written.

        Raises:
            TypeError: there are storage options, which these files do not have.
            CheckpointError: it could not be written; an earlier file of that name is intact.
        """
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r} means nothing to {type(self).__name__}: give None, or a "
                "CheckpointIO of your own that understands it, Trainer(plugins=[...])."
            )
        store.save(path, checkpoint)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what lies under a path, its tensors on the host.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        return store.load(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove what lies under a path, if there is anything. A failure is a warning."""
        store.remove(path)

    def teardown(self) -> None:
        """Finish what is under way, when a run ends."""


def is_own(checkpoint_io: CheckpointIO) -> bool:
    """Whether the files are trainkit's own: what lies under a path of another class, only that class knows."""
    kind = type(checkpoint_io)
    written = (kind.save_checkpoint, kind.remove_checkpoint)
    return written == (CheckpointIO.save_checkpoint, CheckpointIO.remove_checkpoint)
