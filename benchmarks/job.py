"""What every peer is given to train, and the clock that it is timed by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Clocks = tuple[float, float]  # of the process (CPU), and of the wall


def now() -> Clocks:
    return time.process_time(), time.perf_counter()


class Clock:
    """Told by the user's loss at each step, which all peers call once a step: none needs a hook for it.

    Args:
        first: the step (from 1) at whose loss the measured part begins; the ones before are to warm up.
        last: the step at whose loss it ends.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.count = 0
        self.entered: Clocks | None = None
        self.began: Clocks | None = None
        self.ended: Clocks | None = None
        self.checksum: float | None = None
        """Of the weights that the first measured step begins with."""
        self.net: nn.Module | None = None

    def enter(self) -> None:
        """The line before the peer's `fit`."""
        self.entered = now()

    def tick(self) -> None:
        self.count += 1
        if self.count == self.first:
            self.checksum = None if self.net is None else checksum(self.net)
            self.began = now()
        elif self.count == self.last:
            self.ended = now()

    def per_step(self) -> dict[str, float]:
        """Seconds of a step in the measured part."""
        if self.began is None or self.ended is None:
            raise RuntimeError(f"the peer trained {self.count} steps; {self.last} were expected")
        (cpu, wall), (cpu_end, wall_end) = self.began, self.ended
        steps = self.last - self.first
        return {"cpu": (cpu_end - cpu) / steps, "wall": (wall_end - wall) / steps}


class InMemory:
    """Batches that are ready. A bare list would be several loaders to some peers."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


@dataclass
class Job:
    """The user's code.

    Args:
        net: from inputs to outputs; its weights are drawn from a fixed seed.
        loss: `loss(outputs, targets)`.
        optimizer: makes torch's optimizer from parameters. Peers with optimizers of their own read its class and its
            arguments.
        batches: pairs (inputs, targets): InMemory, or a DataLoader.
        clock: see there.
        folder: where a peer may write.
        defaults: logger, progress bar, checkpoints and summary as the peer has them when nothing is said about them.
            False: all of that is off.
        log: how many scalars the step logs, all of them the loss.
        best: the hand-written loop uses the fused optimizer, as trainkit does by itself.
    """

    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: partial[Any]
    batches: Any
    clock: Clock
    folder: Path
    defaults: bool = False
    log: int = 0
    best: bool = False
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = [f"train/loss_{index}" for index in range(self.log)]
        self.clock.net = self.net
        plain, tick = self.loss, self.clock.tick

        def timed(outputs: Tensor, targets: Tensor) -> Tensor:
            tick()
            return plain(outputs, targets)

        self.loss = timed


def checksum(net: nn.Module) -> float:
    """A number that differs when the weights do: their sum, each weighed by where it is."""
    total = 0.0
    for parameter in net.parameters():
        flat = parameter.detach().double().flatten()
        total += float(flat @ torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64))
    return total
