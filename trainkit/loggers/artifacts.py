"""Which checkpoints a logger that uploads them has not uploaded yet, and what to say of them."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

SETTINGS = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only", "every_n_train_steps", "every_n_epochs")


class Artifact(NamedTuple):
    """A checkpoint to upload."""

    time: float
    """When it was written, in seconds since the epoch."""
    path: str
    metadata: dict[str, Any]
    aliases: list[str]


class Uploads:
    """Know what is to be uploaded, and when.

    Args:
        log_model: True: what is there at the end of a run, and all along it when every checkpoint is kept
            (`save_top_k=-1`); "all": each checkpoint when it is saved; False: nothing.

    Raises:
        ValueError: `log_model` is none of these.
    """

    def __init__(self, log_model: bool | str) -> None:
        if log_model not in (True, False, "all"):
            raise ValueError(f"log_model must be True, False or 'all', not {log_model!r}.")
        self.log_model = log_model
        self.uploaded: dict[str, float] = {}
        """The files uploaded so far, with the time at which each was written: a file may be written again."""
        self._later: dict[int, Any] = {}

    def after_save(self, callback: Any) -> list[Artifact]:
        """Return what is to be uploaded now that `callback` has saved."""
        if self.log_model == "all" or (self.log_model and getattr(callback, "save_top_k", None) == -1):
            return self._new(callback)
        if self.log_model:
            self._later[id(callback)] = callback
        return []

    def at_end(self) -> list[Artifact]:
        """Return what is to be uploaded at the end of a run."""
        return [artifact for callback in self._later.values() for artifact in self._new(callback)]

    def _new(self, callback: Any) -> list[Artifact]:
        """Return the callback's files that were not uploaded yet, the oldest first."""
        scores: dict[str, Any] = {getattr(callback, "last_model_path", ""): getattr(callback, "current_score", None)}
        best = getattr(callback, "best_model_path", "")
        scores[best] = getattr(callback, "best_model_score", None)
        scores.update(getattr(callback, "best_k_models", {}))
        settings = {name: getattr(callback, name) for name in SETTINGS if hasattr(callback, name)}
        artifacts = []
        for path, score in scores.items():
            time = os.stat(path).st_mtime if os.path.isfile(path) else 0.0
            if time and self.uploaded.get(path, -1.0) < time:
                metadata = {
                    "score": score.item() if hasattr(score, "item") else score,
                    "original_filename": os.path.basename(path),
                    type(callback).__name__: settings,
                }
                artifacts.append(Artifact(time, path, metadata, ["latest", "best"] if path == best else ["latest"]))
        return sorted(artifacts, key=lambda artifact: artifact.time)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_later": {}}  # a copy may go to a process where the callbacks are others
