"""What processes tell each other about data that each has for itself: whether there is another batch.

A process that trains on while another one's data are over would wait for it for ever, so the first one's end is the end
of all. That takes one small message a batch, of data of which nobody knows before how many batches they have: streams
without a length, and those that a DataLoader reads. What has a length of its own has to keep it. Data with indices are
dealt out by arithmetic (`slices`), and nobody asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from trainkit.errors import MisconfigurationException, warn
from trainkit.strategies import Strategy

if TYPE_CHECKING:
    from trainkit.data.loader import Batches, Loader


class Question:
    """Whether all processes have another batch; the answer is on its way.

    Args:
        said: this process's word, which becomes that of all.
        work: what brings it; None when it is there.
        size: how many processes there are.
    """

    def __init__(self, said: torch.Tensor, work: Any, size: int) -> None:
        self._said, self._work, self._size = said, work, size
        self._answer: list[int] | None = None

    def first_to_end(self) -> int | None:
        """Return the first process that has no other batch, None when all have one."""
        rank = self._heard()[0]
        return rank if rank < self._size else None

    def everywhere(self) -> bool:
        """Whether none of them has one."""
        return self._heard()[1] == 0

    def _heard(self) -> list[int]:
        if self._answer is None:
            if self._work is not None:
                self._work.wait()
            self._answer = self._said.tolist()
        return self._answer


class Together:
    """Ask the other processes, all of which ask at the same places.

    Args:
        strategy: knows who they are.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.rank, self.size = strategy.global_rank, strategy.world_size
        on_host = "gloo" in getattr(strategy, "backend", "gloo")  # there nobody waits for an accelerator
        self.device = torch.device("cpu") if on_host else strategy.device

    def ask(self, over: bool) -> Question:
        """Say whether this process's data are over, and ask the others, which goes on while this one computes."""
        said = torch.tensor([self.rank if over else self.size, -int(not over)], device=self.device)
        return Question(said, dist.all_reduce(said, dist.ReduceOp.MIN, async_op=True), self.size)


def agree(strategy: Strategy, seed: int, loaders: list[Loader], made: Sequence[Batches], training: bool) -> int:
    """Let the loaders of all processes draw from the same seeds, and end together; return the run's seed.

    Args:
        strategy: knows the processes, all of which call this.
        seed: the run's, in this process.
        loaders: of one kind.
        made: what is gone through: the loaders, or one combination of them.
        training: every process has to take as many steps.

    Raises:
        MisconfigurationException: they do not have the same loaders, or not the same data to deal out.
    """
    own = [(one.name, one.seed, one.sliced, one.samples if one.sliced else one.claimed) for one in loaders]
    said = strategy.gather_objects((seed, own))
    for rank, (_, theirs) in enumerate(said):
        if _listed(theirs) != _listed(said[0][1]):
            raise MisconfigurationException(
                f"rank 0 has {_listed(said[0][1])}, rank {rank} has {_listed(theirs)}. All processes need loaders of "
                "the same kinds."
            )
    for index, loader in enumerate(loaders):
        lengths = [theirs[index][3] for _, theirs in said]
        loader.reseed(said[0][1][index][1])
        if loader.sliced:
            _check_same_data(loader.name, lengths)
        elif training:
            _end_together(strategy, loader, made[min(index, len(made) - 1)], lengths)
        else:
            loader.elsewhere = any(lengths)
        if training and loader.indexed is not None and not loader.indexed.standard:
            _ask_for_more(strategy, made[min(index, len(made) - 1)])
    for one in made:
        one.count()
    return int(said[0][0])


def _listed(words: list[Any]) -> str:
    if len(words) > 1:
        kinds = [sliced for _, _, sliced, _ in words]
        return f"{len(words)} loaders" + (f" ({kinds.count(False)} with data of their own)" if not all(kinds) else "")
    return ", ".join(f"{name}{'' if sliced else ' (with data of its own)'}" for name, _, sliced, _ in words)


def _check_same_data(name: str, lengths: list[float]) -> None:
    other = next((rank for rank, length in enumerate(lengths) if length != lengths[0]), None)
    if other is not None:
        raise MisconfigurationException(
            f"{name} has {lengths[0]} samples on rank 0 and {lengths[other]} on rank {other}, but the processes deal "
            "out the same data. Give all of them the same; or set use_distributed_sampler=False if each has its own."
        )


def _end_together(strategy: Strategy, loader: Loader, made: Batches, lengths: list[float]) -> None:
    """Let the epochs of data that each process has for itself end with the shortest."""
    least, most = min(lengths), max(lengths)
    if not _is_sure(loader):
        _ask_for_more(strategy, made)
    elif loader.indexed is None:
        made.must_keep_length = True
    if most == math.inf:
        least = most
    elif least < most:
        warn(
            f"{loader.name} has {least} batches on rank {lengths.index(least)} and {most} on rank "
            f"{lengths.index(most)}: an epoch has {least} on all of them. Let every process have as many."
        )
    if loader.claimed != least:
        loader.claimed, loader.num_batches = least, loader.limit_to(least)


def _is_sure(loader: Loader) -> bool:
    """Whether its length holds: a DataLoader's is a guess where workers share a stream, all others' their own word."""
    if loader.indexed is not None:
        return loader.indexed.sure
    return loader.claimed != math.inf and not isinstance(loader.source, DataLoader)


def _ask_for_more(strategy: Strategy, made: Batches) -> None:
    if made.together is None and dist.is_initialized():
        made.together = Together(strategy)
