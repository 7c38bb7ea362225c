"""Board: where each process of a run writes what it is doing, and all can read it, whatever their main threads do.

It is the store of the process group, through a connection of its own: the group's may be held by a thread that waits.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d

torch_store: Any = torch.distributed  # which does not say that it has the stores

ANSWER = timedelta(seconds=2)
"""So long the store may take for an answer."""
MOST = 4  # questions that may wait for one that is not answered


class Board:
    """What the processes of a run say of themselves.

    Args:
        rank: which of them this is.
        size: how many there are.
        word: what those of an earlier start, which may have used the same store, do not have.

    Raises:
        RuntimeError: the store can't be reached.
    """

    def __init__(self, rank: int, size: int, word: str = "") -> None:
        self.rank, self.size = rank, size
        self.store: Any = torch_store.PrefixStore(f"trainkit/watchdog/{word}", _connection())
        self._questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
        name = "trainkit-watchdog-store"
        threading.Thread(target=_answer, args=(self._questions,), name=name, daemon=True).start()
        mine = range(size) if rank == 0 else [rank]
        for key in (*map(str, mine), "alarm", "missing"):  # who reads one that is not there would have to wait
            self._ask(self.store.compare_set, key, "", "{}")

    def write(self, state: dict[str, Any]) -> None:
        """Say what this process is doing."""
        self._ask(self.store.set, str(self.rank), json.dumps(state))

    def read(self) -> list[dict[str, Any]]:
        """Return what all processes said last, by rank; {} of those that never said anything."""
        return [json.loads(text) for text in self._ask(self.store.multi_get, list(map(str, range(self.size))))]

    def post(self, key: str, what: dict[str, Any]) -> None:
        """Tell all: "alarm", or "missing"."""
        self._ask(self.store.set, key, json.dumps(what))

    def posted(self, key: str) -> dict[str, Any]:
        """Return what was told last, or what the rank of that number says; {} when nothing was."""
        told: dict[str, Any] = json.loads(self._ask(self.store.get, key))
        return told

    def close(self) -> None:
        """Let the connection go."""
        self._questions.put(None)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the store answers. Its own timeouts don't hold when the process that keeps it stands still."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if self._questions.qsize() < MOST:
            self._questions.put((function, arguments, answer))
        try:
            value = answer.get(timeout=ANSWER.total_seconds())
        except queue.Empty:
            raise RuntimeError("the store of the process group does not answer.") from None
        if isinstance(value, Exception):
            raise value
        return value


def _answer(questions: queue.SimpleQueue[Any]) -> None:
    while (question := questions.get()) is not None:
        function, arguments, answer = question
        try:
            answer.put(function(*arguments))
        except Exception as error:
            answer.put(error)


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
