"""Processes: which processes a run has and what they tell each other. The base class is one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from trainkit.world import World


class Processes:
    """A run's processes, as one of them sees them. Here there is but one, and it is all of them.

    Args:
        device: where this process's module and batches live.
    """

    parallel = False
    """Whether there are several, or it acts as if: then `Strategy.sync` and its like are called."""
    world = World()
    """The processes of the run, and which of them this is."""
    patience = 0
    """How often a wait for the others was made long again (`be_patient`)."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @property
    def world_size(self) -> int:
        """How many processes there are, on all nodes."""
        return self.world.size

    @property
    def global_rank(self) -> int:
        """Which of them this is."""
        return self.world.rank

    @property
    def local_rank(self) -> int:
        """Which of the processes on this node this is."""
        return self.world.local_rank

    @property
    def node_rank(self) -> int:
        """Which node this is."""
        return self.world.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return self.global_rank == 0

    @property
    def root_device(self) -> torch.device:
        """Where this process's module and batches live, as Lightning calls it."""
        return self.device

    @property
    def shard(self) -> tuple[int, int]:
        """Which part of the data this process has, and of how many: all that share one part compute one thing."""
        return self.global_rank, self.world_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int] | None:
        """What a sampler needs to know to give each process its part; None when every process has data of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank} if self.world_size > 1 else None

    # ---- what they tell each other
    def setup_environment(self) -> None:
        """Join the other processes; called before anything of a run."""

    def be_patient(self) -> None:
        """Wait long for the others from here on: one of them may have something to do that is no training step."""

    def be_quick(self, timeout: timedelta, patience: int) -> None:
        """Wait only so long for the others, while nothing but steps is done."""

    def barrier(self, name: str | None = None, timeout: float | timedelta | None = None) -> None:
        """Wait for all processes."""

    def on_rank_zero(self, what: str, function: Callable[[], Any]) -> Any:
        """Run a function on rank 0 while the others wait, and return what it returned on all."""
        return function()

    def on_each_node(self, what: str, function: Callable[[], Any]) -> None:
        """Run a function on the first process of each node while the others wait."""
        function()

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return the value that one process has."""
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        return [value]

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Put the sum, the minimum or the maximum of every process's tensor in its place."""
        return tensor

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return every process's tensors, stacked in a new first dimension; of one process, its own."""
        return data

    def reduce(self, tensor: Any, group: Any = None, reduce_op: str | None = "mean") -> Any:
        """Return the mean (or sum) of every process's tensor."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all processes, or any of them, say so."""
        return decision

    def same_everywhere(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values that rank 0 has."""
