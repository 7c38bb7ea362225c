"""What a ModelCheckpoint knows about its files: what is to be written, what stays, what goes, and finding it again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trainkit.checkpoint import policy, store
from trainkit.checkpoint.policy import Saved
from trainkit.errors import CheckpointError

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
    """Whether it takes part in the best k."""
    listed: bool = False
    """Whether it may be kept for another reason, as one of the newest; neither: only `last` is written."""
    last: bool = False
    resumable: bool = False
    """Whether it must hold the whole state, whatever `save_weights_only` says."""
    outcome: Outcome | None = None


@dataclass
class Outcome:
    """What a decision leads to: files, and what is known afterwards."""

    step: int
    finite: bool = True
    """Whether the weights are numbers."""
    path: str | None = None
    last: str | None = None
    replaces: set[str] = field(default_factory=set)
    """Of these two, those that take the place of a file."""
    held: bool = False
    """Whether `last` was not to be replaced by weights that are not finite."""
    kept: tuple[Saved, ...] | None = None
    """The files there are afterwards; None: no change."""
    remove: list[str] = field(default_factory=list)
    """What goes when `path` is written."""
    remove_last: list[str] = field(default_factory=list)
    """What goes when `last` is written."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """The callback's, when `path` is written."""


class Written(NamedTuple):
    """What was written last."""

    where: tuple[int, int, int]
    """The epochs, batches and updates done: a second file from the same place needs no second write."""
    path: str
    ranked: bool
    resumable: bool


@dataclass
class Files:
    """The files of one callback."""

    kept: list[Saved] = field(default_factory=list)
    """In the order in which they were saved."""
    last: str = ""
    last_finite: bool = True
    doomed: list[str] = field(default_factory=list)
    """What goes, and is still there: it failed, or the process did not live to do it."""

    def after(self, outcome: Outcome | None) -> Files:
        """Return what there will be, when everything is written that an outcome says."""
        files = Files(list(self.kept), self.last, self.last_finite, list(self.doomed))
        if outcome is not None:
            files.wrote_path(outcome)
            files.wrote_last(outcome)
        return files

    def wrote_path(self, outcome: Outcome) -> None:
        """Take note that an outcome's `path` is written."""
        if outcome.kept is not None:
            self.kept = list(outcome.kept)
        self._doom(outcome.remove)

    def wrote_last(self, outcome: Outcome) -> None:
        """Take note that an outcome's `last` is written."""
        if outcome.last is not None:
            self.last, self.last_finite = outcome.last, outcome.finite
        self._doom(outcome.remove_last)

    def _doom(self, paths: Iterable[str]) -> None:
        staying = {one.path for one in self.kept} | {self.last}
        self.doomed = [path for path in dict.fromkeys((*self.doomed, *paths)) if path not in staying]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this."""
        kept = [[one.path, one.score, one.step, one.finite, one.best] for one in self.kept]
        return {"kept": kept, "last_finite": self.last_finite, "doomed": self.doomed}

    def load(self, state: Mapping[str, Any], find: Finder) -> None:
        """Take back what a checkpoint holds, of the files that are there."""
        saved = [Saved(*values) for values in state["kept"]]
        self.kept = [one._replace(path=path) for one in saved if (path := find(one.path))]
        self.last_finite = state["last_finite"]
        self.doomed = [path for doomed in state["doomed"] if (path := find(doomed))]


def described(saved: Sequence[Saved], scores: Mapping[str, Tensor], k: int, mode: str) -> dict[str, Any]:
    """Return the attributes of a ModelCheckpoint with a monitor that follow from the best files it keeps.

    Args:
        saved: the files, in the order in which they were saved.
        scores: each file's metric; NaN becomes the infinity that is worst, and so does any metric of weights that are
            not finite.
        k: how many there can be, -1 for any number.
        mode: "min" or "max".
    """
    worst = math.inf if mode == "min" else -math.inf
    ranks = {one.path: policy.order(one, mode) for one in saved}
    kept = {
        one.path: torch.nan_to_num(scores[one.path], worst, math.inf, -math.inf)
        if one.finite
        else torch.full_like(scores[one.path], worst, dtype=torch.float32)
        for one in saved
    }
    attributes: dict[str, Any] = {"best_k_models": kept}
    if kept:
        best = min(ranks, key=ranks.__getitem__)  # of equal ones the earliest, here and below
        attributes |= {"best_model_path": best, "best_model_score": kept[best]}
    if kept and (len(kept) == k or k == -1):
        kth = max(ranks, key=ranks.__getitem__)
        attributes |= {"kth_best_model_path": kth, "kth_value": kept[kth]}
    return attributes


def newest_of(saved: Sequence[Saved]) -> str:
    """Return the newest file, of those with finite weights if there are any; "" if there is none."""
    paths = [one.path for one in saved if one.finite] or [one.path for one in saved]
    return paths[-1] if paths else ""


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
        self.resumed_from = store.real(resumed_from) if resumed_from else ""
        self.beside = bool(resumed_from) and os.path.dirname(self.resumed_from) == directory
        self.same = self.beside or None in (directory, before) or store.real(before or "") == directory
        self.pending = {os.path.basename(path) for path in pending}

    def __call__(self, path: str) -> str:
        """Return where a file is now, "" when it is not there."""
        if self.beside and path:
            inside = os.path.relpath(path, self.before) if self.before else os.path.basename(path)
            path = os.path.join(self.directory or "", inside)
            if os.path.basename(path) in self.pending and self._is_behind(path):
                store.link_or_copy(self.resumed_from, path)
        return path if path and store.exists(path) else ""

    def _is_behind(self, path: str) -> bool:
        """Whether a file of the same moment is not there, or still the one before."""
        if not store.exists(path):
            return True
        if os.path.realpath(path) == self.resumed_from:
            return False
        try:
            return store.step_of(path) < store.step_of(self.resumed_from)
        except CheckpointError:  # damaged: it is left for whoever wants to look at it
            return False
