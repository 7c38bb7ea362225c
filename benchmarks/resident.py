"""Resident memory of this process, from Linux."""

from __future__ import annotations

import ctypes
from pathlib import Path

MB = 1e6
M_MMAP_THRESHOLD = -3  # of <malloc.h>; once it is set, glibc no longer moves it


def resident_mb() -> float:
    """Resident memory now, in MB."""
    return field("VmRSS")


def peak_mb() -> float:
    """The most resident memory since `forget_peak`, in MB."""
    return field("VmHWM")


def forget_peak() -> None:
    """Let the peak begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def map_each_tensor() -> None:
    """From here on give each block of 64 KB or more pages of its own, which the system has back when it is free.

    Else glibc keeps some of them, and whether a tensor lies in what is left of earlier ones is luck.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def give_back_free_memory() -> None:
    """Hand memory that is free back to the system: what comes next would be made in it, unseen."""
    ctypes.CDLL(None).malloc_trim(0)


def field(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError(f"/proc/self/status has no {name}")
