"""(g) Peak memory of a training run: how far resident memory rises above what net, data and imports already take."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from benchmarks.case import ALL, Case, Metric
from benchmarks.resident import forget_peak, give_back_free_memory, map_each_tensor, peak_mb, resident_mb
from benchmarks.training import train, warm_up_torch
from benchmarks.workloads import cnn, transformer

TITLE = "(g) Peak resident memory over what is there before fit"
ROUNDS = (3, 1)
PEAK = Metric("peak", "peak over the baseline", "MB")
CASES = [
    Case("cnn", "the CNN of (c)", ALL, (PEAK,), same_work=False),
    Case("transformer", "the Transformer of (d)", ALL, (PEAK,), same_work=False),
]


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    import importlib

    importlib.import_module(f"benchmarks.peers.{peer}")  # what is imported is not its step's memory
    map_each_tensor()
    warm_up_torch()
    job = cnn.make_job(folder, 8)[0] if case == "cnn" else transformer.make_job(folder, 12)
    job.best = False  # by hand with the plain optimizer, as the peers; the kernel is no matter of memory
    gc.collect()  # what is garbage now would make room during training
    give_back_free_memory()
    baseline = resident_mb()
    forget_peak()
    measured = train(peer, job)
    return measured | {"peak": peak_mb() - baseline, "baseline": baseline}
