"""What a ModelCheckpoint knows about its files: the attributes that describe them, and finding them again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.checkpoint import policy, store
from trainkit.checkpoint.policy import Saved


def described(saved: Sequence[Saved], scores: Mapping[str, Tensor], k: int, mode: str) -> dict[str, Any]:
    """Return the attributes of a ModelCheckpoint with a monitor that follow from the files it keeps.

    Args:
        saved: the files, in the order in which they were saved.
        scores: each file's metric; NaN becomes the infinity that is worst.
        k: how many there can be.
        mode: "min" or "max".
    """
    worst = math.inf if mode == "min" else -math.inf
    kept = {one.path: torch.nan_to_num(scores[one.path], worst, math.inf, -math.inf) for one in saved}
    ranked = sorted(saved, key=lambda one: policy.rank(one.score, mode))
    attributes: dict[str, Any] = {"best_k_models": kept}
    if ranked:
        attributes["best_model_path"] = ranked[0].path
        attributes["best_model_score"] = kept[ranked[0].path]
    if len(ranked) == k:
        attributes["kth_best_model_path"] = ranked[-1].path
        attributes["kth_value"] = kept[ranked[-1].path]
    return attributes


def free_path(
    name: Callable[[int | None], str], taken: Collection[str], replaceable: Collection[str], overwrite: bool, first: int
) -> str:
    """Return the first path for a new file that no file has, or that a file has which may be replaced.

    Args:
        name: gives the path with a version, or without one for None.
        taken: paths of others, which are never given away.
        replaceable: paths of files that the new one replaces.
        overwrite: whether any file that is there may be replaced.
        first: the first version.
    """
    path, version = name(None), first
    while path in taken or not (overwrite or path in replaceable or not os.path.lexists(path)):
        path, version = name(version), version + 1
    return path


class Finder:
    """Find the files that a checkpoint speaks of again, after its directory may have been moved.

    Args:
        directory: where the files of this run go, None when that is not known.
        before: where they went when the checkpoint was written.
        resumed_from: the checkpoint's own path now, "" when it was not read from a file.
        pending: files of the same moment as the checkpoint's own, which were to be written after it. Where the process
            did not live to do so, they are made from it now.
    """

    def __init__(self, directory: str | None, before: str | None, resumed_from: str, pending: Collection[str]) -> None:
        self.directory = directory
        self.resumed_from = os.path.realpath(resumed_from) if resumed_from else ""
        self.beside = bool(resumed_from) and os.path.dirname(self.resumed_from) == directory
        self.same = self.beside or None in (directory, before) or os.path.realpath(before or "") == directory
        self.pending = {os.path.basename(path) for path in pending}

    def __call__(self, path: str) -> str:
        """Return where a file is now, "" when it is not there."""
        if self.beside and path:
            path = os.path.join(self.directory or "", os.path.basename(path))
            if os.path.basename(path) in self.pending and not os.path.lexists(path):
                store.link_or_copy(self.resumed_from, path)
        return path if os.path.lexists(path) else ""
