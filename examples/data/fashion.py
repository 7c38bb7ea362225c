"""Fashion-MNIST: where it is found, and how a run gets it. `find_or_fetch` looks, in this order, in

root                                   the folder given
$TRAINKIT_DATA                         the folder named by the environment
/usr/share/datasets/fashion-mnist      Debian's package, unpacked into the cache: $XDG_CACHE_HOME/trainkit
the mirror that torchvision knows      downloaded into root or, without one, into the cache
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

from trainkit import DataModule
from trainkit.errors import MisconfigurationException

FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PLAIN = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.286], [0.353])])
AUGMENTED = v2.Compose([v2.RandomCrop(28, padding=1), v2.RandomHorizontalFlip(), PLAIN])


class Fashion(DataModule):
    """60,000 grey images of 28x28 pixels, the last 5,000 of them for validation, and 10,000 more to test on.

    Args:
        root: the folder that has, or gets, torchvision's FashionMNIST/raw; see above for what happens without one.
        batch_size: images in a batch.
        num_workers: processes that load and augment images; 0 does it in the training process.
    """

    def __init__(self, root: str | None = None, batch_size: int = 128, num_workers: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        find_or_fetch(self.hparams.root)

    def setup(self, stage: str) -> None:
        self.root = find_or_fetch(self.hparams.root)

    def train_dataloader(self) -> DataLoader[list[torch.Tensor]]:
        images = FashionMNIST(self.root, train=True, transform=AUGMENTED)
        return self.loader(Subset(images, range(len(images) * 11 // 12)), shuffle=True)

    def val_dataloader(self) -> DataLoader[list[torch.Tensor]]:
        images = FashionMNIST(self.root, train=True, transform=PLAIN)  # the same images, as they are
        return self.loader(Subset(images, range(len(images) * 11 // 12, len(images))))

    def test_dataloader(self) -> DataLoader[list[torch.Tensor]]:
        return self.loader(FashionMNIST(self.root, train=False, transform=PLAIN))

    predict_dataloader = test_dataloader

    def loader(self, images: Dataset, shuffle: bool = False) -> DataLoader[list[torch.Tensor]]:
        workers = self.hparams.num_workers
        return DataLoader(images, self.hparams.batch_size, shuffle, num_workers=workers, persistent_workers=workers > 0)


def find_or_fetch(root: str | None = None) -> Path:
    """Return the folder that holds FashionMNIST/raw, after getting it from wherever it is to be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "trainkit")
    tried = []
    for name, given in (("root", root), ("$TRAINKIT_DATA", os.environ.get("TRAINKIT_DATA")), ("the cache", cache)):
        if given and is_whole(Path(given).expanduser()):
            return Path(given).expanduser()
        tried.append(f"{name}: {given} has no FashionMNIST/raw with four whole files" if given else f"{name}: not set")
    target = Path(root or cache).expanduser()
    download = partial(FashionMNIST, download=True)
    for name, folder, get in ((DEBIAN, cache, unpack), (FashionMNIST.mirrors[0], target, download)):
        try:
            publish(get, folder)
            return folder
        except Exception as error:  # no package, no network, no space: the next one may still do
            tried.append(f"{name}: " + " ".join(str(error).split()))
    places = "\n  ".join(tried)
    raise MisconfigurationException(
        f"Fashion-MNIST is not here and can't be downloaded. Tried, in this order:\n  {places}\n"
        "On Debian and Ubuntu `sudo apt-get install dataset-fashion-mnist` brings it. Elsewhere, put these, unpacked, "
        f"into {target / 'FashionMNIST' / 'raw'}: {', '.join(FILES)}."
    )


def is_whole(folder: Path) -> bool:
    """Whether torchvision can read all four files; what a killed unpacking left would be there, but too short."""
    try:
        return all(len(FashionMNIST(folder, train)) > 0 for train in (True, False))
    except Exception:
        return False


def unpack(folder: Path) -> None:
    (folder / "FashionMNIST" / "raw").mkdir(parents=True)
    for name in FILES:
        with gzip.open(DEBIAN / f"{name}.gz") as packed, open(folder / "FashionMNIST" / "raw" / name, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)


def publish(get: Callable[[Path], object], folder: Path) -> None:
    """Let `get` fill a folder aside, then move the whole files in: a killed run leaves nothing that looks finished."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="unfinished-") as aside:
        get(Path(aside))
        if not is_whole(Path(aside)):
            raise ValueError("the files are damaged")
        (folder / "FashionMNIST" / "raw").mkdir(parents=True, exist_ok=True)
        for path in Path(aside).glob("FashionMNIST/raw/*-ubyte"):
            path.replace(folder / path.relative_to(aside))
