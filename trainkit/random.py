"""Seeds and random state: python, numpy, torch on the host and on every accelerator."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainkit.rank_zero import current_rank

MAX_SEED = 2**32 - 1


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed python, numpy and torch, and return the seed.

    Args:
        seed: 0 to 2**32 - 1. None takes `PL_GLOBAL_SEED` from the environment, else 0.
        workers: kept for Lightning's signature and written to `PL_SEED_WORKERS`; what a data set draws never
            depends on it here, see docs/architecture.md.
        verbose: print the seed, on rank 0.

    Raises:
        ValueError: the seed is not a whole number in that range.
    """
    if seed is None:
        given = os.environ.get("PL_GLOBAL_SEED", "0")
        try:
            seed = int(given)
        except ValueError:
            raise ValueError(
                f"the environment variable PL_GLOBAL_SEED must be a whole number. Received: {given!r}."
            ) from None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be a whole number from 0 to {MAX_SEED}. Received: {seed!r}.")
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    random.seed(seed)
    torch.manual_seed(seed)
    numpy_random().seed(seed)
    if verbose and current_rank() == 0:
        print(f"seed {seed}")
    return seed


def seed_for_rank(rank: int) -> None:
    """Seed the sources of a process for what it draws by itself, dropout for example: each rank has numbers of its own.

    Rank 0 keeps its state, and draws what a single process would. Processes of one run have the same state before.
    """
    seed = derived_seed(seed_of_state(), "rank", rank)
    random.seed(seed)
    torch.manual_seed(seed)
    numpy_random().seed(seed % 2**32)


def random_state(include_cuda: bool = True) -> dict[str, Any]:
    """Return the state of every random source, as tensors and plain values.

    Args:
        include_cuda: False leaves CUDA alone, for a forked process that can't use it.
    """
    kind, keys, position, has_gauss, gauss = numpy_random().get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if include_cuda and torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Take back what `random_state` returned; sources of devices that are not here are left alone."""
    import numpy as np

    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        for device, device_state in list(enumerate(state["cuda"]))[: torch.cuda.device_count()]:
            torch.cuda.set_rng_state(device_state.cpu(), device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


@contextmanager
def isolated_random(include_cuda: bool = True) -> Iterator[None]:
    """Give every random source its state back on exit, after errors too; Lightning's `isolate_rng`.

    Args:
        include_cuda: False leaves CUDA alone, for a forked process that can't use it.
    """
    state = random_state(include_cuda)
    try:
        yield
    finally:
        set_random_state(state)


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Draw a 63-bit seed from a generator, torch's default one when none is given."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def seed_of_state() -> int:
    """Return a 63-bit seed that is a function of torch's random state, which stays as it is."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def derived_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of the parts."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numpy_random() -> Any:
    """Return `numpy.random`."""
    import numpy as np  # torch has imported it already when it is installed

    return np.random
