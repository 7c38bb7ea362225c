"""(a) A tiny MLP, its batches ready in memory: next to nothing to compute, so what is measured is the framework."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import ALL, STEP, WITH_DEFAULTS, Case
from benchmarks.job import Clock, InMemory, Job
from benchmarks.training import train

TITLE = "(a) Tiny MLP, batches in memory: the framework's tax"
ROUNDS = (7, 2)  # of hand and trainkit, of the others
CASES = [
    Case("off", "everything off", ALL, (STEP,)),
    Case("defaults", "logger, bar and checkpoints as they come, nothing logged", WITH_DEFAULTS, (STEP,)),
]
WARM_UP = 50


def make_job(folder: Path, steps: int, **options: Any) -> Job:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    batches = InMemory([make_batch() for _ in range(steps)])
    # foreach=False is what torch takes on a CPU when nothing is said. Said, no peer replaces it by something faster:
    # here all of them run the very same kernels.
    sgd = partial(torch.optim.SGD, lr=0.01, foreach=False)
    return Job(net, nn.functional.cross_entropy, sgd, batches, Clock(WARM_UP, steps), folder, **options)


def make_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 64), torch.randint(10, (32,))


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    job = make_job(folder, 300 if quick else 3000, defaults=case == "defaults")
    return train(peer, job)
