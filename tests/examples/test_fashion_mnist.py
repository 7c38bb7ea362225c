"""examples/fashion_mnist.py and its data: found where it should be, never half, and told clearly when it is nowhere."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import importlib
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchvision.datasets import FashionMNIST

from trainkit import Trainer, seed_everything
from trainkit.errors import MisconfigurationException

UNREACHABLE = "http://127.0.0.1:9/"  # the port "discard": nobody answers there


@pytest.fixture
def examples(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(checkout))


@pytest.fixture
def model(examples: None) -> ModuleType:
    return importlib.import_module("examples.fashion_mnist")


@pytest.fixture
def fashion(examples: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, on a machine without the data: no package, no cache, no network."""
    module = importlib.import_module("examples.data.fashion")
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(FashionMNIST, "mirrors", [UNREACHABLE])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRAINKIT_DATA", raising=False)
    return module


def idx(*shape: int, classes: int = 256) -> bytes:
    """Return an idx file of bytes, as the data set has them."""
    values = bytes(index * 7 % classes for index in range(math.prod(shape)))
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values


def files(num_train: int = 24) -> dict[str, bytes]:
    return {
        "train-images-idx3-ubyte": idx(num_train, 28, 28),
        "train-labels-idx1-ubyte": idx(num_train, classes=10),
        "t10k-images-idx3-ubyte": idx(6, 28, 28),
        "t10k-labels-idx1-ubyte": idx(6, classes=10),
    }


def put_package(folder: Path, num_train: int = 24) -> None:
    """Put the four gzipped files into a folder, as Debian's package does."""
    folder.mkdir(parents=True)
    for name, content in files(num_train).items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def put_data(root: Path, num_train: int = 24) -> Path:
    """Put the four files into a root, in torchvision's layout."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files(num_train).items():
        (raw / name).write_bytes(content)
    return root


def make_trainer() -> Trainer:
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


# ---------------------------------------------------------------- where the data is looked for
def test_the_given_root_comes_first(fashion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINKIT_DATA", str(put_data(tmp_path / "named")))
    put_package(tmp_path / "debian")
    root = put_data(tmp_path / "root")
    assert fashion.find_or_fetch(str(root)) == root
    assert not (tmp_path / "cache").exists()


def test_then_the_folder_named_by_the_environment(
    fashion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = put_data(tmp_path / "named")
    monkeypatch.setenv("TRAINKIT_DATA", str(named))
    put_package(tmp_path / "debian")
    assert fashion.find_or_fetch(str(tmp_path / "empty")) == named
    assert fashion.find_or_fetch() == named
    assert not (tmp_path / "empty").exists()


def test_then_the_package_of_debian_unpacked_once_into_the_cache(fashion: ModuleType, tmp_path: Path) -> None:
    put_package(tmp_path / "debian")
    cache = tmp_path / "cache" / "trainkit"
    assert fashion.find_or_fetch(str(tmp_path / "empty")) == cache
    raw = cache / "FashionMNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == files()
    assert os.listdir(cache) == ["FashionMNIST"]
    before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    assert fashion.find_or_fetch() == cache
    assert {path: path.stat().st_mtime_ns for path in raw.iterdir()} == before


def test_the_cache_is_in_the_home_folder_unless_the_environment_says_otherwise(
    fashion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    put_package(tmp_path / "debian")
    assert fashion.find_or_fetch() == tmp_path / "home" / ".cache" / "trainkit"


@pytest.fixture
def mirror(fashion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mirror of the data on this machine."""
    put_package(tmp_path / "mirror")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path / "mirror"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        sums = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in (tmp_path / "mirror").iterdir()]
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(FashionMNIST, "resources", sums)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("mirror")
def test_then_it_is_downloaded_into_the_root_or_the_cache(fashion: ModuleType, tmp_path: Path) -> None:
    assert fashion.find_or_fetch(str(tmp_path / "root")) == tmp_path / "root"
    assert {p.name: p.read_bytes() for p in (tmp_path / "root/FashionMNIST/raw").iterdir()} == files()
    assert fashion.find_or_fetch() == tmp_path / "cache" / "trainkit"


# ---------------------------------------------------------------- what is half, or nowhere
@pytest.mark.parametrize("kept", [0, 3, 16, 1000])
def test_a_file_that_is_too_short_is_not_believed_but_replaced(fashion: ModuleType, tmp_path: Path, kept: int) -> None:
    put_package(tmp_path / "debian")
    half = put_data(tmp_path / "cache" / "trainkit") / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    half.write_bytes(half.read_bytes()[:kept])
    fashion.find_or_fetch()
    assert half.read_bytes() == files()["train-images-idx3-ubyte"]


def test_unpacking_that_is_killed_leaves_nothing_that_looks_finished(
    fashion: ModuleType, tmp_path: Path, checkout: Path
) -> None:
    put_package(tmp_path / "debian")
    last = tmp_path / "debian" / f"{fashion.FILES[-1]}.gz"
    content = last.read_bytes()
    last.unlink()
    os.mkfifo(last)  # whoever unpacks waits here, with three files done
    code = (
        "import sys, pathlib; from examples.data import fashion; fashion.DEBIAN = pathlib.Path(sys.argv[1]); "
        "fashion.find_or_fetch()"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    unpacking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "debian")], env=environment)
    with last.open("wb"):  # returns when the other side has opened it
        unpacking.kill()
        assert unpacking.wait() == -signal.SIGKILL
    cache = tmp_path / "cache" / "trainkit"
    assert list(cache.rglob("train-images-idx3-ubyte"))
    assert not (cache / "FashionMNIST").exists()
    last.unlink()
    last.write_bytes(content)
    assert fashion.find_or_fetch() == cache
    assert {p.name: p.read_bytes() for p in (cache / "FashionMNIST/raw").iterdir()} == files()


def test_without_the_data_one_message_says_what_was_tried_and_what_helps(
    fashion: ModuleType, model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINKIT_DATA", str(tmp_path / "named"))
    trainer = make_trainer()
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(model.FashionCNN(width=2), datamodule=fashion.Fashion(root=str(tmp_path / "root"), num_workers=0))
    message = str(caught.value)
    places = [tmp_path / "root", tmp_path / "named", tmp_path / "cache", tmp_path / "debian", UNREACHABLE]
    where = [message.index(str(place)) for place in places]
    assert where == sorted(where)
    assert "refused" in message
    assert "sudo apt-get install dataset-fashion-mnist" in message
    assert str(tmp_path / "root" / "FashionMNIST" / "raw") in message
    assert all(name in message for name in files())
    assert len(message.splitlines()) == 7
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None  # no wall of tracebacks from urllib above it


def test_a_damaged_package_is_told_like_a_missing_one(fashion: ModuleType, tmp_path: Path) -> None:
    put_package(tmp_path / "debian")
    packed = tmp_path / "debian" / "t10k-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(MisconfigurationException, match=r"debian: Compressed file ended"):
        fashion.find_or_fetch()
    packed.write_bytes(gzip.compress(idx(6, 28, 28)[:-1]))
    with pytest.raises(MisconfigurationException, match=r"debian: the files are damaged"):
        fashion.find_or_fetch()
    assert not list((tmp_path / "cache").rglob("*-ubyte"))


# ---------------------------------------------------------------- what a run gets
def test_training_images_are_augmented_and_the_others_are_as_they_are(fashion: ModuleType, tmp_path: Path) -> None:
    data = fashion.Fashion(root=str(put_data(tmp_path / "root")), batch_size=4, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    assert [len(loader.dataset) for loader in loaders] == [22, 2, 6]
    images, labels = next(iter(loaders[0]))
    assert images.shape == (4, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    torch.manual_seed(0)
    first, second = (torch.stack([image for image, _ in loaders[0].dataset]) for _ in range(2))
    assert not torch.equal(first, second)
    for loader in loaders[1:]:
        (first, _), (second, _) = next(iter(loader)), next(iter(loader))
        assert torch.equal(first, second)
    assert not set(loaders[0].dataset.indices) & set(loaders[1].dataset.indices)


def test_a_small_run_goes_through_every_step(fashion: ModuleType, model: ModuleType, tmp_path: Path) -> None:
    data = fashion.Fashion(root=str(put_data(tmp_path / "root")), batch_size=11, num_workers=0)
    module, trainer = model.FashionCNN(width=2), make_trainer()
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)
    assert {"train/loss", "val/loss", "val/acc"} <= trainer.callback_metrics.keys()
    assert trainer.test(module, datamodule=data, verbose=False)[0].keys() == {"test/loss", "test/acc"}
    assert torch.cat(trainer.predict(module, datamodule=data)).shape == (6,)


def test_the_config_runs(checkout: Path, tmp_path: Path) -> None:
    root = put_data(tmp_path / "root", num_train=300)
    command = [sys.executable, "-m", "trainkit", "fit", "--config", str(checkout / "configs" / "fashion_mnist.yaml")]
    options = ["--data.root", str(root), "--data.num_workers", "0", "--model.width", "2", "--trainer.max_epochs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + options, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_reaches_0_92_on_the_test_set_within_five_epochs(examples: None, model: ModuleType) -> None:
    data = importlib.import_module("examples.data.fashion").Fashion()
    try:
        data.prepare_data()
    except MisconfigurationException as missing:
        pytest.skip(str(missing))
    seed_everything(42)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        module = model.FashionCNN()
        trainer = Trainer(max_epochs=5, logger=False, enable_checkpointing=False)
        trainer.fit(module, datamodule=data)
        assert trainer.test(module, datamodule=data)[0]["test/acc"] >= 0.92
    finally:
        torch.set_num_threads(threads)
