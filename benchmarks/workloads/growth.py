"""(i) Whether a step costs after a million steps what it costs after a thousand, and whether memory grows meanwhile.

A million steps take minutes, in which the machine's speed changes by more than the bar. So windows of steps take turns
with as many steps by hand, and what is compared is the ratio near step 1,000 with the ratio near step 1,000,000.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Metric
from benchmarks.job import Job
from benchmarks.resident import resident_mb
from benchmarks.training import train
from benchmarks.workloads.mlp import make_batch, make_job

TITLE = "(i) Growth over a million steps, defaults on, one scalar logged a step"
ROUNDS = (1, 1)
GROWTH = Metric("growth", "a step near the end over one near the beginning", "x", ratio=False)
MEMORY = Metric("memory", "resident memory, end less beginning", "MB", ratio=False)
CASES = [Case("million", "trainkit, with a loop by hand beside it", ("trainkit",), (GROWTH, MEMORY), same_work=False)]


class Endless:
    """The same few batches, many times."""

    def __init__(self, steps: int) -> None:
        self.steps, self.batches = steps, [make_batch() for _ in range(64)]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.batches
        for step in range(self.steps):
            yield batches[step % 64]


class Windows:
    """Ratios to the loop by hand in windows that begin at some steps. Called with each step's loss.

    Args:
        starts: the steps at which a series of windows begins.
        windows: how many are in a series.
        steps: how many steps are in one.
    """

    def __init__(self, starts: list[int], windows: int, steps: int) -> None:
        self.steps, self.step, self.series, self.windows = steps, 0, -1, windows
        self.starts = starts
        self.ratios: list[list[float]] = [[] for _ in starts]
        self.resident: list[float] = []
        self.reference: float | None = None  # CPU seconds of the steps by hand before the open window
        self.opened = 0.0
        self.by_hand = hand_steps()
        self.next = starts[0]

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.step += 1
        if self.step == self.next:
            self.turn()
        return nn.functional.cross_entropy(outputs, targets)

    def turn(self) -> None:
        """End a window, and begin the next one after some steps by hand."""
        ended = time.process_time()
        if self.reference is None:
            self.series += 1
            self.resident.append(resident_mb())
        else:
            self.ratios[self.series].append((ended - self.opened) / self.reference)
        if len(self.ratios[self.series]) == self.windows:
            self.reference = None
            self.next = next((start for start in self.starts if start > self.step), 0)
            return
        start = time.process_time()
        self.by_hand(self.steps)
        self.opened = time.process_time()
        self.reference = self.opened - start
        self.next = self.step + self.steps


def hand_steps() -> Any:
    """Return a function that trains a net of its own for some steps."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, foreach=False)
    batches = [make_batch() for _ in range(64)]

    def run(steps: int) -> None:
        for step in range(steps):
            inputs, targets = batches[step % 64]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), targets)
            loss.backward()
            optimizer.step()

    return run


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    steps, windows, length = (6_000, 8, 100) if quick else (1_000_000, 40, 200)
    span = windows * length
    job: Job = make_job(folder, 60, defaults=True, log=1)
    series = Windows([1_000, steps - span - 1], windows, length)
    tick = job.clock.tick
    job.loss = lambda outputs, targets: (tick(), series(outputs, targets))[1]
    job.batches = Endless(steps)
    measured = train(peer, job)
    early, late = (statistics.median(ratios) for ratios in series.ratios)
    memory = series.resident[1] - series.resident[0]
    return measured | {"growth": late / early, "early": early, "late": late, "memory": memory}
