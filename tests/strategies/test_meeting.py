"""Processes of one start find each other on a store that is full of the words of earlier starts."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from trainkit.strategies.meeting import ROOT, meet, store_of
from trainkit.world import World

SOON = timedelta(seconds=20)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def start(server: dist.TCPStore, size: int, order: list[int]) -> dict[int, str]:
    """Let the ranks come in an order, each when the one before it waits, and return the word that each got."""
    words: dict[int, str] = {}

    def one(rank: int) -> None:
        words[rank] = meet(client(server), rank, size, SOON)

    threads = []
    for rank in order:
        threads.append(threading.Thread(target=one, args=(rank,)))
        threads[-1].start()
        threads[-1].join(0.02)
    for thread in threads:
        thread.join(30)
    return words


def test_every_start_has_a_word_of_its_own_whoever_comes_first(server: dist.TCPStore) -> None:
    seen = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]):
        words = start(server, 3, order)
        assert words.keys() == {0, 1, 2}
        assert len(set(words.values())) == 1
        seen.add(words[0])
    assert len(seen) == 4
    assert len(set(start(server, 2, [1, 0]).values()) - seen) == 1  # fewer than before
    assert start(server, 1, [0])


def test_who_died_while_it_waited_is_not_waited_for(server: dist.TCPStore) -> None:
    with pytest.raises(TimeoutError, match=r"rank 1 has waited 0\.05 s for the other 1 processes"):
        meet(client(server), 1, 2, timedelta(seconds=0.05))
    assert len(set(start(server, 2, [0, 1]).values())) == 1


def test_a_shared_store_is_used_below_the_word_and_a_new_one_as_it_is(server: dist.TCPStore) -> None:
    environ = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    store = store_of(World(launcher="torchrun"), SOON, environ)
    assert store is not None
    store.set("x", "1")
    word = client(server).get(f"{ROOT}/here/1/0").decode()
    assert client(server).get(f"{ROOT}/{word}/x") == b"1"
    assert store_of(World(launcher="torchrun"), SOON, {**environ, "TORCHELASTIC_USE_AGENT_STORE": "False"}) is None
