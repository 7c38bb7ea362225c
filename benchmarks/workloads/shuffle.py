"""(j) Shuffling up to a thousand million samples: how long until the first batch is there, and the memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from benchmarks.case import Case, Metric
from benchmarks.resident import forget_peak, peak_mb, resident_mb

TITLE = "(j) Shuffling; by hand is DataLoader(shuffle=True)"
ROUNDS = (2, 1)
METRICS = (
    Metric("first", "seconds to the first batch", "s"),
    Metric("peak", "memory for that", "MB"),
)
BOTH = ("hand", "trainkit")
CASES = [
    Case("6", "10^6 samples", BOTH, METRICS, same_work=False),
    Case("7", "10^7 samples", BOTH, METRICS, same_work=False),
    Case("8", "10^8 samples", BOTH, METRICS, same_work=False),
    Case("9", "10^9 samples (by hand it would take 47 GB and minutes)", BOTH[1:], METRICS, same_work=False),
]


class Numbers(Dataset[int]):
    """Each sample is its index."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    if peer == "hand" and case == "8" and (quick or available_mb() < 8_000):
        return {"left_out": "in a quick run" if quick else "it takes 4.7 GB, and there are not 8 GB free"}
    loader = DataLoader(Numbers(10 ** int(case)), batch_size=128, shuffle=True)
    first_batch(peer, DataLoader(Numbers(1_000), batch_size=128, shuffle=True))  # what is imported once
    baseline = resident_mb()
    forget_peak()
    start = time.perf_counter()
    batch = first_batch(peer, loader)
    took = time.perf_counter() - start
    assert len(set(batch.tolist())) == 128
    return {"first": took, "peak": peak_mb() - baseline}


def first_batch(peer: str, loader: DataLoader[Any]) -> Any:
    if peer == "hand":
        return next(iter(loader))
    from trainkit.data.loader import Loader

    return next(Loader(loader, name="train_dataloader", argument="limit_train_batches").epoch(0))[1]


def available_mb() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1000
    return 0.0
