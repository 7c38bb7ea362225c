"""How many processes may load data."""

from __future__ import annotations

import os


def suggested_max_num_workers(local_world_size: int) -> int:
    """Return how many workers each training process's loader can have, so that one core is left to the process itself.

    Args:
        local_world_size: how many training processes this machine runs.

    Raises:
        ValueError: it is less than 1.
    """
    if local_world_size < 1:
        raise ValueError(f"local_world_size must be at least 1. Received: {local_world_size}.")
    affinity = getattr(os, "sched_getaffinity", None)  # the cores that this process may use; Linux only
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)
