"""(h) A checkpoint of a model with Adam, 105 MB together: its size, seconds to save and load, and the lost time.

A save's stall is the time between the two steps around it, less an ordinary step's. The time lost in all also counts
that the steps after it are slower while another thread writes. Both by the wall clock.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.case import Case, Metric
from benchmarks.job import Clock, InMemory, Job
from benchmarks.training import warm_up_torch

TITLE = "(h) Checkpoint of 105 MB"
ROUNDS = (2, 2)
METRICS = (
    Metric("size", "file", "MB"),
    Metric("stall", "training stands still for one save", "s"),
    Metric("lost", "time lost to one save in all", "s"),
    Metric("load", "load: fit with it, less fit without, to first step", "s"),
)
PEERS = ("hand", "trainkit", "lightning")
CASES = [
    Case("here", "saved by the training thread", PEERS, METRICS, same_work=False),
    Case("background", "saved in the background (by hand: as above)", PEERS, METRICS[:3], same_work=False),
]
EVERY, STEPS = 20, 70


def make_job(folder: Path, steps: int, width: int, loss: Any) -> Job:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    batches = InMemory([(torch.randn(8, width), torch.randn(8, width))] * steps)
    return Job(net, loss, partial(torch.optim.Adam, lr=1e-4), batches, Clock(2, steps), folder)


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    width = 128 if quick else 1476
    marks: list[float] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        marks.append(time.perf_counter())
        return nn.functional.mse_loss(outputs, targets)

    run = {"hand": by_hand, "trainkit": with_trainkit, "lightning": with_lightning}[peer]
    warm_up_torch()
    file = run(make_job(folder, STEPS, width, loss), case, None)
    gaps = [after - before for before, after in itertools.pairwise(marks)]
    ordinary = statistics.median(gaps[2 : EVERY - 1])
    saves = [EVERY * count - 1 for count in (1, 2, 3)]  # the gap that follows step 20 is number 19
    stalls = [gaps[save] - ordinary for save in saves]
    lost = [sum(gaps[save : save + EVERY - 10]) - (EVERY - 10) * ordinary for save in saves]
    result = {
        "size": file.stat().st_size / 1e6,
        "stall": statistics.median(stalls),
        "lost": statistics.median(lost),
        "step": ordinary,
    }
    if case == "here":
        result["load"] = seconds_to_load(run, width, folder, file)
    return result


def seconds_to_load(run: Any, width: int, folder: Path, file: Path) -> float:
    """Enter fit twice, with the checkpoint and without, and compare when the first steps come."""
    took = []
    for checkpoint in (None, file):
        marks: list[float] = []

        def loss(outputs: torch.Tensor, targets: torch.Tensor, marks: list[float] = marks) -> torch.Tensor:
            marks.append(time.perf_counter())
            return nn.functional.mse_loss(outputs, targets)

        job = make_job(folder / "again", STEPS, width, loss)
        run(job, "none", checkpoint)
        assert job.clock.entered is not None
        took.append(marks[0] - job.clock.entered[1])
    return took[1] - took[0]


def by_hand(job: Job, case: str, checkpoint: Path | None) -> Path:
    optimizer = job.optimizer(job.net.parameters())
    file = job.folder / "by_hand.pt"
    job.clock.enter()
    if checkpoint is not None:
        state = torch.load(checkpoint, weights_only=True)
        job.net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    for step, (inputs, targets) in enumerate(job.batches, 1):
        optimizer.zero_grad()
        job.loss(job.net(inputs), targets).backward()
        optimizer.step()
        if case != "none" and step % EVERY == 0:
            torch.save({"net": job.net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        if case == "none":
            break
    return file


def with_trainkit(job: Job, case: str, checkpoint: Path | None) -> Path:
    from trainkit.callbacks import ModelCheckpoint

    saver = partial(ModelCheckpoint, asynchronous=case == "background")
    return with_framework("trainkit", saver, job, case, checkpoint)


def with_lightning(job: Job, case: str, checkpoint: Path | None) -> Path:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    options = {"plugins": [AsyncCheckpointIO()]} if case == "background" else {}
    return with_framework("lightning", ModelCheckpoint, job, case, checkpoint, **options)


def with_framework(peer: str, saver: Any, job: Job, case: str, checkpoint: Path | None, **options: Any) -> Path:
    """Train with a checkpoint every 20 steps; or, in the case "none", one step from a checkpoint."""
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    if case == "none":
        job.defaults = False
        steps = 1 if checkpoint is None else 61
        module.train(job, max_steps=steps, ckpt_path=checkpoint)
        return job.folder
    saved = saver(dirpath=job.folder / "saved", every_n_train_steps=EVERY, save_top_k=1)
    module.train(job, callbacks=[saved], enable_checkpointing=True, **options)
    return next((job.folder / "saved").glob("*.ckpt"))
