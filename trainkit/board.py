"""Board: where each process of a run writes what it is doing, and all can read it, whatever their main threads do.

It is the store of the process group, through a connection of its own: the group's may be held by a thread that waits.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d

torch_store: Any = torch.distributed  # which does not say that it has the stores

ANSWER = timedelta(seconds=2)
"""So long the store may take for an answer."""


class Board:
    """What the processes of a run say of themselves.

    Args:
        rank: which of them this is.
        size: how many there are.

    Raises:
        RuntimeError: the store can't be reached.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # which may share one store
        self.store: Any = torch_store.PrefixStore(f"trainkit/watchdog/{restarts}", _connection())
        mine = range(size) if rank == 0 else [rank]
        for key in (*map(str, mine), "alarm", "missing"):  # who reads one that is not there would have to wait
            self.store.compare_set(key, "", "{}")

    def write(self, state: dict[str, Any]) -> None:
        """Say what this process is doing."""
        self.store.set(str(self.rank), json.dumps(state))

    def read(self) -> list[dict[str, Any]]:
        """Return what all processes said last, by rank; {} of those that never said anything."""
        return [json.loads(text) for text in self.store.multi_get([str(rank) for rank in range(self.size)])]

    def post(self, key: str, what: dict[str, Any]) -> None:
        """Tell all: "alarm", or "missing"."""
        self.store.set(key, json.dumps(what))

    def posted(self, key: str) -> dict[str, Any]:
        """Return what was told last, {} when nothing was."""
        told: dict[str, Any] = json.loads(self.store.get(key))
        return told


def _connection() -> Any:
    """Return a connection of its own to the store of the process group, or that store."""
    store: Any = distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if isinstance(store, torch_store.TCPStore):
        return torch_store.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=ANSWER)
    with contextlib.suppress(RuntimeError, AttributeError):
        return store.clone()
    return store
