"""(f) Seconds before anything is learned: the import, and from process start and from fit to the first step.

A step that has begun is not one that is done. torch imports its compiler, a second of CPU time, when a process first
makes an optimizer, or where a framework puts that off, as trainkit does, in the first update. So each time is taken
twice: to the first line of the first step, and to that of the second, when the first update is done. Only the latter
holds the same work for all, and only it has a ratio.

Nothing but the standard library is imported at the top, so that each import is seen where it is paid.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.case import ALL, WITH_DEFAULTS, Case, Metric

TITLE = "(f) Start"
ROUNDS = (3, 1)
IMPORTS = {  # what the first lines of a program import
    "hand": "import torch",
    "trainkit": "from trainkit import Callback, DataModule, Module, Trainer",
    "lightning": "import lightning",
    "accelerate": "from accelerate import Accelerator",
    "ignite": "from ignite.engine import Events, create_supervised_trainer",
    "transformers": "from transformers import Trainer, TrainingArguments",
    "keras": "import os; os.environ['KERAS_BACKEND'] = 'torch'; import keras",
    "skorch": "from skorch import NeuralNet",
    "fastai": "from fastai.learner import Learner",
}
IMPORT = Metric("import_cpu", "import, over torch: CPU time", "s", ratio=False)
FIRST = (
    Metric("done_start_cpu", "process start to first update done: CPU time", "s"),
    Metric("done_start_wall", "process start to first update done: wall time", "s"),
    Metric("fit_cpu", "fit entered to first step begun: CPU time", "s", ratio=False),
    Metric("fit_wall", "fit entered to first step begun: wall time", "s", ratio=False),
    Metric("done_fit_cpu", "fit entered to first update done: CPU time", "s", ratio=False),
    Metric("done_fit_wall", "fit entered to first update done: wall time", "s", ratio=False),
)
FEW = ("hand", "trainkit", "lightning")
CASES = [
    Case("off", "everything off", ALL, (IMPORT, *FIRST), same_work=False),
    Case("defaults", "defaults on", WITH_DEFAULTS, FIRST, same_work=False),
    Case("warm", "everything off, the process has made an optimizer before", FEW, FIRST[2:], same_work=False),
    Case("warm-defaults", "defaults on, an optimizer made before", FEW, FIRST[2:], same_work=False),
]


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    before = time.process_time(), time.perf_counter()
    exec(IMPORTS[peer], {})
    imported = {"import_cpu": time.process_time() - before[0], "import_wall": time.perf_counter() - before[1]}
    return imported | first_step(peer, folder, warm="warm" in case, defaults="defaults" in case)


def first_step(peer: str, folder: Path, warm: bool, defaults: bool) -> dict[str, float]:
    import importlib

    from torch import Tensor, nn

    from benchmarks.training import warm_up_torch
    from benchmarks.workloads.mlp import make_job

    seen: list[tuple[float, float, float]] = []

    class First(nn.Module):
        """Notes when it is called for the first and the second time: the first lines of these steps."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Tensor) -> Tensor:
            if len(seen) < 2:
                seen.append((time.process_time(), time.perf_counter(), time.time()))
            return self.net(inputs)

    job = make_job(folder, 60, defaults=defaults)
    job.net = First(job.net)
    if warm:
        warm_up_torch()
    importlib.import_module(f"benchmarks.peers.{peer}").train(job)
    assert job.clock.entered is not None
    times = {}
    for prefix, (cpu, wall, date) in zip(("", "done_"), seen, strict=True):
        times[f"{prefix}start_cpu"] = cpu
        times[f"{prefix}start_wall"] = date - float(os.environ["BENCH_STARTED"])
        times[f"{prefix}fit_cpu"] = cpu - job.clock.entered[0]
        times[f"{prefix}fit_wall"] = wall - job.clock.entered[1]
    return times
