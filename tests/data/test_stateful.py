"""What keeps a position or a generator of its own: saved and restored, or told of."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from trainkit.data.loader import Loader
from trainkit.data.stateful import own_generator


class Stream(IterableDataset[Any]):
    """Numbers with noise; knows how far it is."""

    def __init__(self, size: int = 22) -> None:
        self.size, self.position, self.given = size, 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < self.size:
            self.position += 1
            self.given += 1
            yield self.position - 1, random.random(), np.random.rand(), float(torch.rand(1))
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Walks(Dataset[Any]):
    """Draws from a generator that it keeps."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(4)

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Any:
        return index, float(torch.rand((), generator=self.rng))


class WalksOn(Walks):
    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.set_state(state["rng"])


def wrapped(data: Any, workers: int = 0, **more: Any) -> Loader:
    return Loader(DataLoader(data, 4, num_workers=workers, **more), name="data", argument="limit", seed=3)


def texts(loader: Loader, epoch: int, start: int = 0) -> list[str]:
    taken = [str(batch) for _, batch, _ in loader.epoch(epoch, start)]
    loader.close()
    return taken


def stopped(loader: Loader, epoch: int, at: int) -> Any:
    """Go through some batches of an epoch and return the state that a checkpoint would have then."""
    opened = loader.epoch(epoch)
    for _ in range(at):
        next(opened)
    return copy.deepcopy(loader.state_dict())


class Turns(Sampler[int]):
    """Begins one further each time."""

    def __init__(self) -> None:
        self.turn = 0

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        self.turn += 1
        return iter([(index + self.turn) % 22 for index in range(22)])

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn = state["turn"]


def test_a_data_set_and_its_sampler_may_both_have_a_state() -> None:
    def loader() -> Loader:
        return wrapped(WalksOn(), sampler=Turns())

    whole = loader()
    epochs = [texts(whole, epoch) for epoch in range(3)]
    resumed = loader()
    assert texts(resumed, 0) == epochs[0]
    state = stopped(resumed, 1, 2)
    resumed = loader()
    resumed.load_state_dict(state)
    assert texts(resumed, 1, 2) == epochs[1][2:]
    assert texts(resumed, 2) == epochs[2]


@pytest.mark.parametrize("kind", [Stream, WalksOn])
def test_a_data_set_with_a_state_goes_on_where_it_was(kind: Any) -> None:
    whole = wrapped(kind())
    epochs = [texts(whole, epoch) for epoch in range(3)]
    assert len(set(epochs[0])) == 6
    for at in range(1, 7):
        going = wrapped(kind())
        assert texts(going, 0) == epochs[0]
        resumed = wrapped(kind())
        resumed.load_state_dict(stopped(going, 1, at))
        start = at if at < 6 else 0
        assert texts(resumed, 1 if start else 2, start) == (epochs[1][at:] if start else epochs[2])
        assert texts(resumed, 2 if start else 3) == texts(wrapped_at(kind, 2 if start else 3), 2 if start else 3)


def wrapped_at(kind: Any, epochs: int) -> Loader:
    """Return a loader whose data set has been gone through so often."""
    loader = wrapped(kind())
    for epoch in range(epochs):
        texts(loader, epoch)
    return loader


def test_a_stream_with_a_state_does_not_give_again_what_was_seen() -> None:
    data = Stream()
    resumed = wrapped(data)
    resumed.load_state_dict(stopped(wrapped(Stream()), 0, 3))
    texts(resumed, 0, 3)
    assert data.given == 22 - 12


@pytest.mark.parametrize(("data", "workers"), [(Walks(), 0), (WalksOn(), 1)], ids=["no state", "state in workers"])
def test_what_can_not_be_saved_is_told_once_on_a_resume(data: Any, workers: int) -> None:
    kind: Any = type(f"{type(data).__name__}{workers}", (type(data),), {})  # told once for each class
    loader = wrapped(kind(), workers)
    state = stopped(loader, 0, 2)
    said = "generator of its own .dataset.rng." if not workers else "state lies in worker processes"
    resumed = wrapped(kind(), workers)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match=f"what data gives after this resume may not .*{said}.*To make it so, "):
        texts(resumed, 0, 2)
    again = wrapped(kind(), workers)
    again.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts(again, 0, 2)


class Holds:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


@pytest.mark.parametrize(
    ("thing", "path"),
    [
        (Holds(rng=np.random.default_rng(1)), "dataset.rng"),
        (Holds(transform=Holds(rng=random.Random(1))), "dataset.transform.rng"),
        (Holds(transforms=[Holds(), Holds(rng=np.random.RandomState(1))]), "dataset.transforms[1].rng"),
        (Holds(of={"a": torch.Generator()}), "dataset.of['a']"),
        (Holds(dataset=Holds(dataset=Walks())), "dataset.dataset.dataset.rng"),
        (Holds(data=torch.rand(3), names=["a"], size=3, module=np.random), None),
        (list(range(10)), None),
        (
            Subset(Holds(transform=Holds(transforms=[Holds(rng=np.random.default_rng())])), [0]),
            "dataset.dataset.transform.transforms[0].rng",
        ),
    ],
)
def test_a_generator_is_found_where_it_is_kept(thing: Any, path: str | None) -> None:
    assert own_generator(thing) == path


# ---------------------------------------------------------------- torchdata
class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Any:
        if index == 100:
            raise ValueError("bad")
        return index, random.random(), np.random.rand(), float(torch.rand(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_goes_on_where_it_was_and_loses_no_epoch(workers: int) -> None:
    kind: Any = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def loader() -> Loader:
        torch.manual_seed(1)
        return Loader(kind(Noisy(), 4, shuffle=True, num_workers=workers), name="data", argument="limit", seed=3)

    before = dict(vars(loader().source))
    whole = loader()
    epochs = [texts(whole, epoch) for epoch in range(3)]
    assert len({*epochs[0], *epochs[1]}) == 12
    for at in (1, 4, 6):
        going = loader()
        assert texts(going, 0) == epochs[0]
        resumed = loader()
        resumed.load_state_dict(stopped(going, 1, at))
        if at < 6:
            assert texts(resumed, 1, at) == epochs[1][at:]
        assert texts(resumed, 2) == epochs[2]
    after = vars(whole.source)
    assert all(after[name] is value for name, value in before.items() if name in ("worker_init_fn",))
    assert type(after["dataset"]) is Noisy
