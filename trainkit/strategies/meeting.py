"""Where the processes of one start of a run meet, when torchrun has started them on a store that outlives them.

torchrun's workers talk through the store in which its agents meet, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is 1. What
the processes of an earlier start have left there (addresses of the dead, counters that are not zero) would be taken for
the words of those that live: a restart then hangs, more often than not. So each start has keys of its own, below a word
that rank 0 makes up, and that it tells to those only who are there with it now:

    rank r   here/<size>/<r> = its own word, made up anew   then waits for told/<its own word>
    rank 0   tells each word that it finds, and looks again until as many as there are have come
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from trainkit.world import World

ROOT = "trainkit/meeting"
SHORTEST, LONGEST = 0.001, 0.1  # seconds between two looks

word = ""
"""What the processes of this start have in common, for whoever talks to that store beside them; "" before they meet."""


def looks(seconds: float = math.inf) -> Iterator[None]:
    """Look into a store again and again, and ever more seldom, until whoever looks has seen enough or time is over."""
    until, wait = time.monotonic() + seconds, SHORTEST
    yield
    while time.monotonic() < until:
        time.sleep(wait)
        wait = min(2 * wait, LONGEST)
        yield


def store_of(world: World, timeout: timedelta, environ: Mapping[str, str] = os.environ) -> Store | None:
    """Return the store of this start's processes; None where torch finds one that is new.

    Args:
        world: the processes.
        timeout: how long to wait for the others.
        environ: the environment variables.
    """
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    global word
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    word = meet(store, world.rank, world.size, timeout)
    return PrefixStore(f"{ROOT}/{word}", store)


def meet(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Return a word that all processes of this start have, and none of an earlier one.

    Args:
        store: what all of them write to, and what others have written to before.
        rank: which of them this is.
        size: how many there are.
        timeout: how long to wait for the others.

    Raises:
        TimeoutError: they did not come.
    """
    own = uuid.uuid4().hex
    store.set(f"{ROOT}/here/{size}/{rank}", own)
    told: dict[int, bytes] = {}
    for _ in looks(timeout.total_seconds()):
        if rank > 0 and store.check([f"{ROOT}/told/{own}"]):
            word: str = store.get(f"{ROOT}/told/{own}").decode()
            store.add(f"{ROOT}/{word}/came", 1)
            return word
        if rank == 0:
            _tell(store, own, size, told)
            if store.add(f"{ROOT}/{own}/came", 0) == size - 1:
                return own
    raise TimeoutError(
        f"rank {rank} has waited {timeout.total_seconds():g} s for the other {size - 1} processes of this run, which "
        "did not come. Their own errors say why; a longer time is DDPStrategy(timeout=...)."
    )


def _tell(store: Store, word: str, size: int, told: dict[int, bytes]) -> None:
    """Tell the word to all who are there, and to those who have come in the place of somebody it was told to."""
    for rank in range(1, size):
        here = f"{ROOT}/here/{size}/{rank}"
        if store.check([here]) and (other := store.get(here)) != told.get(rank):
            store.set(f"{ROOT}/told/{other.decode()}", word)
            told[rank] = other
