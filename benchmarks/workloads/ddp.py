"""(k) DDP on two processes: what is added to the loop by hand around torch's DistributedDataParallel.

Each process has a core of its own, with the threads that move its gradients: left to themselves the processes of one
run share a core for a while and those of the next do not, and that is more than what is measured. CPU time is that
of the first process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.case import STEP, Case, Metric
from benchmarks.job import Clock, InMemory, Job
from benchmarks.training import train
from benchmarks.workloads.mlp import make_job

TITLE = "(k) DDP with two processes on gloo, batches in memory"
ROUNDS = (11, 3)
PEERS = ("hand", "trainkit", "lightning")
WALL = Metric("wall", "wall time of a step", "us")
CASES = [
    Case("tiny", "tiny MLP, everything off", PEERS, (STEP, WALL)),
    Case("wide", "four layers of 512, batch 64", PEERS, (STEP, WALL)),
]
PROCESSES = 2


def job_of(case: str, folder: Path, quick: bool) -> Job:
    if case == "tiny":
        return make_job(folder, 200 if quick else 3000)
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(512, 10))
    steps = 60 if quick else 300
    batches = InMemory([(torch.randn(64, 512), torch.randint(10, (64,)))] * steps)
    sgd = partial(torch.optim.SGD, lr=0.01, foreach=False)
    return Job(net, nn.functional.cross_entropy, sgd, batches, Clock(30, steps), folder)


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    asked = json.dumps({"case": case, "peer": peer, "quick": quick, "folder": str(folder)})
    subprocess.run([*launcher, "-m", "benchmarks.workloads.ddp", asked], check=True)
    return json.loads((folder / "answer.json").read_text())


def main() -> None:
    """Train in one of the processes; the first one writes down what it measured."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    folder = Path(asked["folder"])
    answer = train(asked["peer"], job_of(asked["case"], folder, asked["quick"]), processes=PROCESSES)
    if os.environ["RANK"] == "0":
        (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
