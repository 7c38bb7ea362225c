"""Resident memory of this process, from Linux."""

from __future__ import annotations

from pathlib import Path

MB = 1e6


def resident_mb() -> float:
    """Resident memory now, in MB."""
    return field("VmRSS")


def peak_mb() -> float:
    """The most resident memory since `forget_peak`, in MB."""
    return field("VmHWM")


def forget_peak() -> None:
    """Let the peak begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def field(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError(f"/proc/self/status has no {name}")
