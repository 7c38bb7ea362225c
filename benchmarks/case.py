"""What a workload says about itself: its cases, and what is measured in each."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.peers import PEERS

ALL = tuple(PEERS)
WITH_DEFAULTS = ("hand", *(name for name, peer in PEERS.items() if peer.has_defaults))


@dataclass(frozen=True)
class Metric:
    """One number of a case.

    Args:
        name: its key in what `measure` returns.
        title: what it is, in words.
        unit: "s", "us", "MB", "samples/s" or "KB".
        ratio: whether a ratio to the hand-written loop says something.
    """

    name: str
    title: str
    unit: str
    ratio: bool = True


@dataclass(frozen=True)
class Case:
    """A setting of a workload.

    Args:
        name: its key.
        title: what it is, in words.
        peers: who takes part.
        metrics: what is measured.
        same_work: whether all must end with the same weights.
    """

    name: str
    title: str
    peers: tuple[str, ...]
    metrics: tuple[Metric, ...]
    same_work: bool = True


STEP = Metric("cpu", "CPU time of a step", "us")
