"""What every test may use: a quiet torch, a folder of its own, a copy of the checkout, a tiny model and its data."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import DataModule, Module

CHECKOUT = Path(__file__).resolve().parents[1]

# The same few examples each time; `pytest --hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("trainkit", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("trainkit")

# One thread for each process: with more processes than cores, threads that wait for each other cost ten times as much.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Take back what a test writes to the environment: seeds and rendezvous addresses stay there otherwise."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each test in an empty folder of its own, so that whatever it writes stays out of the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder the tests were started from, for reading only."""
    return CHECKOUT


@pytest.fixture(scope="session")
def copy_checkout() -> Callable[[Path], Path]:
    """Copy what a clone would hold, links as links, to a folder that does not exist yet, and return the folder."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        patterns = (".git", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "lightning_logs")
        waste = shutil.ignore_patterns(*patterns)(folder, names)
        if Path(folder) == CHECKOUT:
            waste |= {"build", "dist", "runs"} & set(names)
        return waste | {name for name in names if os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))}

    def copy(destination: Path) -> Path:
        return Path(shutil.copytree(CHECKOUT, destination, symlinks=True, ignore=ignored))

    return copy


class TinyModule(Module):
    """A linear regression of three numbers on one, from the same weights each time."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.line = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class TinyData(DataModule):
    """Eight batches of four for every stage: three numbers, and one that depends on them and on some noise.

    The batches to predict have no targets.
    """

    def __init__(self, batch_size: int = 4, num_batches: int = 8, shuffle: bool = False) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.shuffle = shuffle
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch_size * num_batches, 3, generator=random)
        noise = 0.1 * torch.randn(batch_size * num_batches, 1, generator=random)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]) + noise

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x, self.y), self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x, self.y), self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x, self.y), self.batch_size)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.x, self.batch_size)  # type: ignore[arg-type]


@pytest.fixture(scope="session", name="TinyModule")
def tiny_module() -> type[Module]:
    """The class of a tiny module: `TinyModule(lr=0.05)`; logs train_loss, val_loss and test_loss; to be subclassed."""
    return TinyModule


@pytest.fixture(scope="session", name="TinyData")
def tiny_data() -> type[DataModule]:
    """The class of its data: `TinyData(batch_size=4, num_batches=8, shuffle=False)`."""
    return TinyData


def _helper(name: str) -> Any:
    """Return a module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"trainkit_test_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def telling() -> Callable[..., list[dict[str, Any]]]:
    """Run a script as several processes and return what each told: `telling(2, source, *args, timeout=90)`."""
    told: Callable[..., list[dict[str, Any]]] = _helper("processes").told
    return told


@pytest.fixture(scope="session")
def processes() -> Callable[..., list[Any]]:
    """Run a script as several processes: `processes(2, source, *args, timeout=60)`; see tests/processes.py."""
    run: Callable[..., list[Any]] = _helper("processes").run
    return run


@pytest.fixture
def environment() -> Callable[..., dict[str, str]]:
    """Make the environment of a process in which this checkout is imported; see tests/processes.py."""
    made: Callable[..., dict[str, str]] = _helper("processes").environment
    return made


@pytest.fixture
def nodes() -> Any:
    """Two machines on this one; see tests/nodes.py. A test is skipped where there can be none."""
    module = _helper("nodes")
    if why := module.reason():
        pytest.skip(why)
    return module.Nodes
