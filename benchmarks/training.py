"""Let a peer train a job in this process, and say what it cost."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.job import Job, checksum, now


def warm_up_torch() -> None:
    """Make an optimizer: the first one of a process imports torch._dynamo, a second that each way to train pays once.

    Some pay it inside their fit, where `configure_optimizers` is called, and some before; so it is taken out of all
    of them. startup.py measures it.
    """
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def train(peer: str, job: Job, **options: Any) -> dict[str, Any]:
    """Train, and return seconds of a step, of everything from entering fit to its return, and what proves the work."""
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    warm_up_torch()
    module.train(job, **options)
    cpu, wall = now()
    assert job.clock.entered is not None, f"peers/{peer}.py never said that it enters fit"
    whole = {"whole_cpu": cpu - job.clock.entered[0], "whole_wall": wall - job.clock.entered[1]}
    work = {"steps": job.clock.count, "checksum": job.clock.checksum, "final_checksum": checksum(job.net)}
    return job.clock.per_step() | whole | work
