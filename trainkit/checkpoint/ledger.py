"""What a ModelCheckpoint knows about its files: what is to be written, what describes it, and finding it again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trainkit.checkpoint import policy, store
from trainkit.checkpoint.policy import Saved

if TYPE_CHECKING:
    from trainkit.trainer import Trainer


@dataclass
class Decision:
    """That something is to be saved at the next save point, and what was known when that was decided."""

    trainer: Trainer
    epoch: int
    metrics: dict[str, float] = field(default_factory=dict)
    score: Tensor | None = None
    ranked: bool = False
    """Whether it takes part in the best k; else only `last` is written."""
    last: bool = False
    resumable: bool = False
    """Whether it must hold the whole state, whatever `save_weights_only` says."""
    outcome: Outcome | None = None


@dataclass
class Outcome:
    """What a decision leads to: files, and the callback's attributes afterwards."""

    step: int
    path: str | None = None
    last: str | None = None
    remove: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


class Written(NamedTuple):
    """What was written last."""

    where: tuple[int, int, int]
    """The epochs, batches and updates done: a second file from the same place needs no second write."""
    path: str
    ranked: bool
    resumable: bool


def described(saved: Sequence[Saved], scores: Mapping[str, Tensor], k: int, mode: str) -> dict[str, Any]:
    """Return the attributes of a ModelCheckpoint with a monitor that follow from the files it keeps.

    Args:
        saved: the files, in the order in which they were saved.
        scores: each file's metric; NaN becomes the infinity that is worst.
        k: how many there can be, -1 for any number.
        mode: "min" or "max".
    """
    worst = math.inf if mode == "min" else -math.inf
    ranks = {one.path: policy.rank(one.score, mode) for one in saved}
    kept = {path: torch.nan_to_num(scores[path], worst, math.inf, -math.inf) for path in ranks}
    attributes: dict[str, Any] = {"best_k_models": kept}
    if kept:
        best = min(ranks, key=ranks.__getitem__)  # of equal ones the earliest, here and below
        attributes |= {"best_model_path": best, "best_model_score": kept[best]}
    if kept and (len(kept) == k or k == -1):
        kth = max(ranks, key=ranks.__getitem__)
        attributes |= {"kth_best_model_path": kth, "kth_value": kept[kth]}
    return attributes


def free_path(
    name: Callable[[int | None], str],
    exists: Callable[[str], bool],
    taken: Collection[str],
    replaceable: Collection[str],
    overwrite: bool,
    first: int,
) -> str:
    """Return the first path for a new file that no file has, or that a file has which may be replaced.

    Args:
        name: gives the path with a version, or without one for None.
        exists: whether there is a file.
        taken: paths of others, which are never given away.
        replaceable: paths of files that the new one replaces.
        overwrite: whether any file that is there may be replaced.
        first: the first version.
    """
    path, version = name(None), first
    while path in taken or not (overwrite or path in replaceable or not exists(path)):
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
        self.directory, self.before = directory, before
        self.resumed_from = os.path.realpath(resumed_from) if resumed_from else ""
        self.beside = bool(resumed_from) and os.path.dirname(self.resumed_from) == directory
        self.same = self.beside or None in (directory, before) or os.path.realpath(before or "") == directory
        self.pending = {os.path.basename(path) for path in pending}

    def __call__(self, path: str) -> str:
        """Return where a file is now, "" when it is not there."""
        if self.beside and path:
            inside = os.path.relpath(path, self.before) if self.before else os.path.basename(path)
            path = os.path.join(self.directory or "", inside)
            if os.path.basename(path) in self.pending and not os.path.lexists(path):
                store.link_or_copy(self.resumed_from, path)
        return path if os.path.lexists(path) else ""
