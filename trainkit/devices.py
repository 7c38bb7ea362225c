"""Which devices a run uses: `accelerator`, `devices` and `gpus` name them, or the error says what is here."""

from __future__ import annotations

import os

import torch

from trainkit.errors import MisconfigurationException, WrongTypeException

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
MOST_PROCESSES = 16
"""So many processes for each core are surely a slip."""


def available() -> str:
    """Say what this machine has, for error messages."""
    found = ["the cpu"]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found.append(f"{count} cuda device{'s' if count > 1 else ''}")
    if torch.backends.mps.is_available():
        found.append("1 mps device")
    return " and ".join(found)


def resolve(
    accelerator: str = "auto", devices: int | str | list[int] = "auto", gpus: int | None = None
) -> list[torch.device]:
    """Return the devices that the three arguments mean together: one for each process on this machine.

    Args:
        accelerator: "auto" (cuda, else mps, else cpu), "cpu", "gpu" (cuda or mps), "cuda" or "mps".
        devices: how many ("auto": all, of the cpu one; 1, "1"), all of them (-1), or which (a list of cuda indices,
            "0,"). On the cpu it is a number of processes.
        gpus: short for accelerator="gpu", devices=gpus.

    Raises:
        MisconfigurationException: an unknown word, or a device that is not there.
    """
    if gpus is not None:
        if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
            raise MisconfigurationException(f"gpus must be a whole number of at least 1. Received: {gpus!r}.")
        if accelerator not in ("auto", "gpu", "cuda", "mps") or devices != "auto":
            raise MisconfigurationException(
                f"gpus={gpus} is short for accelerator='gpu', devices={gpus}. Received beside it: "
                f"accelerator={accelerator!r}, devices={devices!r}; give one or the other."
            )
        accelerator, devices = ("gpu" if accelerator == "auto" else accelerator), gpus
    if accelerator not in ACCELERATORS:
        raise MisconfigurationException(
            f"accelerator must be one of {', '.join(map(repr, ACCELERATORS))}. Received: {accelerator!r}."
        )
    kind = _kind(accelerator)
    return [torch.device(kind, index) if kind == "cuda" else torch.device(kind) for index in _indices(kind, devices)]


def _kind(accelerator: str) -> str:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if accelerator == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    if accelerator == "gpu" and (cuda or mps):
        return "cuda" if cuda else "mps"
    if accelerator == "cpu" or (accelerator == "cuda" and cuda) or (accelerator == "mps" and mps):
        return accelerator
    raise MisconfigurationException(
        f"accelerator={accelerator!r} is not there: this machine has {available()}. "
        "Use accelerator='auto' or accelerator='cpu'."
    )


def _indices(kind: str, devices: int | str | list[int]) -> list[int]:
    """Return which devices of that kind are meant."""
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if devices == "auto":
        return list(range(max(count, 1)))
    if isinstance(devices, str):
        try:
            parts = [int(part) for part in devices.split(",") if part.strip()]
        except ValueError:
            parts = []
        if not parts:
            raise MisconfigurationException(
                f"devices must be 'auto', a number or a list of indices. Received: {devices!r}."
            )
        return _existing(kind, parts, devices, count) if "," in devices else _counted(kind, parts[0], devices, count)
    if isinstance(devices, (list, tuple)):
        if not devices:
            raise MisconfigurationException(f"devices={devices!r} names no device; give devices='auto' or devices=1.")
        if kind == "cpu":
            raise MisconfigurationException(
                f"devices={devices!r}: a list names accelerators, the cpu has no indices. Give devices=1."
            )
        return _existing(kind, list(devices), devices, count)
    if isinstance(devices, int) and not isinstance(devices, bool):
        return _counted(kind, devices, devices, count)
    raise WrongTypeException(f"devices must be 'auto', a number or a list of indices. Received: {devices!r}.")


def _existing(kind: str, indices: list[int], given: object, count: int) -> list[int]:
    """Return the indices if there are such devices."""
    wrong = [index for index in indices if isinstance(index, bool) or not isinstance(index, int)]
    if wrong:
        raise WrongTypeException(f"devices must be a list of whole numbers. Received: {given!r}.")
    if kind == "cpu" and len(indices) > 1:
        raise MisconfigurationException(
            f"devices={given!r}: a list names accelerators, the cpu has no indices. Give devices={len(indices)} for "
            "as many processes."
        )
    if len(set(indices)) < len(indices):
        raise MisconfigurationException(f"devices={given!r} names a device twice; each process needs one of its own.")
    if kind != "cpu" and not all(0 <= index < count for index in indices):
        raise MisconfigurationException(f"devices={given!r} is not there: this machine has {available()}.")
    return indices


def _counted(kind: str, number: int, given: object, count: int) -> list[int]:
    """Return the first so many indices if there are so many devices."""
    if number < 1 and number != -1:
        raise MisconfigurationException(f"devices must be at least 1, or -1 for all. Received: {given!r}.")
    if number > count and kind != "cpu":
        raise MisconfigurationException(f"devices={given!r} is more than there are: this machine has {available()}.")
    most = MOST_PROCESSES * (os.cpu_count() or 1)
    if number > most and kind == "cpu":
        raise MisconfigurationException(
            f"devices={given!r} asks for {number} processes, more than {most}, which is {MOST_PROCESSES} for each core "
            "of this machine. Give fewer."
        )
    return list(range(count if number == -1 else number))
