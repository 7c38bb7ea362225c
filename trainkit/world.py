"""World: which processes a run has, and which of them this one is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The processes of a run, as whoever launched them says.

    Args:
        size: how many processes there are, on all nodes.
        rank: which of them this is, from 0.
        local_size: how many of them are on this node.
        local_rank: which of these this is.
        node_rank: which node this is.
        num_nodes: how many nodes there are.
        launcher: who launched them: "torchrun", "SLURM", "MPI"; "" when nobody did.
    """

    size: int = 1
    rank: int = 0
    local_size: int = 1
    local_rank: int = 0
    node_rank: int = 0
    num_nodes: int = 1
    launcher: str = ""
