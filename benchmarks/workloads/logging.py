"""(b) The same MLP, with the default logger, bar and checkpoints on, and a step that logs one scalar or five."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.case import ALL, STEP, WITH_DEFAULTS, Case
from benchmarks.training import train
from benchmarks.workloads.mlp import make_job

TITLE = "(b) Tiny MLP, logging; the hand-written loop logs nothing"
ROUNDS = (5, 1)
SCALARS = {"none": 0, "one": 1, "five": 5}
CASES = [
    Case("none", "defaults on, nothing logged", WITH_DEFAULTS, (STEP,)),
    Case("one", "defaults on, one scalar logged a step", ALL, (STEP,)),
    Case("five", "defaults on, five scalars logged a step", ALL, (STEP,)),
]


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    scalars = 0 if peer == "hand" else SCALARS[case]
    return train(peer, make_job(folder, 300 if quick else 3000, defaults=True, log=scalars))
