"""Stand-in until the launcher is merged."""

from __future__ import annotations

import os

from trainkit.world import World


def world_of(devices: int | None, num_nodes: int, local: int) -> World:
    e = os.environ
    if "RANK" in e and "WORLD_SIZE" in e:
        size, rank = int(e["WORLD_SIZE"]), int(e["RANK"])
        return World(
            size, rank, int(e.get("LOCAL_WORLD_SIZE", size)), int(e.get("LOCAL_RANK", rank)), launcher="torchrun"
        )
    return World(size=local * num_nodes, local_size=local, num_nodes=num_nodes)
