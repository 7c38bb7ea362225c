"""trainer.replay: the same batch again, with the same draws, wherever it is asked for."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit import DataModule, Module, Trainer
from trainkit.errors import MisconfigurationException, NonFiniteError


class Augmented(Dataset[Any]):
    """Samples with noise from every random source."""

    def __init__(self, count: int = 22, bad: int | None = None) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.tensor([random.random(), np.random.rand()])
        value = torch.cat([torch.tensor([float(index)]), noise.float() + torch.rand(2)])
        return value * float("nan") if index == self.bad else value


class Sees(Module):
    """Keep each batch that it is trained on, by epoch and index."""

    def __init__(self, **data: Any) -> None:
        super().__init__()
        self.line = torch.nn.Linear(3, 1)
        self.seen: dict[tuple[int, int], Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen[self.trainer.current_epoch, batch_idx] = batch
        parts = batch.values() if isinstance(batch, dict) else [batch]
        return sum(self.line(part).square().mean() for part in parts)  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-5)


def trainer_of(root: Path, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 3, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": root, **settings,
        }
    )  # fmt: skip


def shuffled(workers: int = 0, count: int = 22, bad: int | None = None) -> DataLoader[Any]:
    return DataLoader(Augmented(count, bad), 4, shuffle=True, num_workers=workers)


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return all(equal(ours[key], theirs[key]) for key in theirs)
    return torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_the_last_fit_is_fetched_again_by_epoch_and_index(tmp_path: Path, workers: int) -> None:
    trainer, module = trainer_of(tmp_path), Sees()
    trainer.fit(module, shuffled(workers))
    for where in ((0, 0), (1, 3), (2, 5)) if workers == 0 else ((1, 3),):
        assert equal(trainer.replay(where), module.seen[where])


@pytest.mark.parametrize(("workers", "workers_then"), [(0, 0), (0, 2), (2, 0)])
def test_what_raise_wrote_down_is_enough_for_another_process(tmp_path: Path, workers: int, workers_then: int) -> None:
    torch.manual_seed(11)
    trainer, module = trainer_of(tmp_path, nan_policy="raise"), Sees()
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit(module, shuffled(workers, bad=13))
    (path,) = tmp_path.glob("nonfinite-step=*.json")
    written = json.loads(path.read_text())
    where = (raised.value.epoch, raised.value.batch_idx)
    assert (written["epoch"], written["batch"]) == where
    (loader,) = written["loaders"]
    assert loader["name"] == "train_dataloader"
    assert 13 in loader["samples"]
    assert loader["positions"] == list(range(4 * where[1], 4 * where[1] + len(loader["samples"])))
    torch.manual_seed(99)  # another process has another state
    again = trainer_of(tmp_path).replay(path, train_dataloaders=shuffled(workers_then, bad=13))
    assert equal(again, module.seen[where])
    assert equal(trainer.replay(written), module.seen[where])
    indices = [index for index in loader["samples"] if index != 13]
    assert sorted(again[:, 0].nan_to_num(13).tolist()) == sorted([*indices, 13.0])


def test_the_batch_of_several_loaders_is_fetched_with_the_laps_of_the_shorter_ones(tmp_path: Path) -> None:
    def loaders() -> dict[str, Any]:
        return {"long": shuffled(), "short": shuffled(count=8)}

    trainer, module = trainer_of(tmp_path, nan_policy="raise"), Sees()
    data = loaders()
    data["long"] = shuffled(bad=21)
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit(module, data)
    where = (raised.value.epoch, raised.value.batch_idx)
    (path,) = tmp_path.glob("nonfinite-step=*.json")
    data = loaders()
    data["long"] = shuffled(bad=21)
    assert equal(trainer_of(tmp_path).replay(path, train_dataloaders=data), module.seen[where])
    for batch_idx in range(where[1] + 1):
        assert equal(trainer.replay((0, batch_idx)), module.seen[0, batch_idx])


def test_a_data_module_and_a_model_bring_the_data(tmp_path: Path) -> None:
    class Data(DataModule):
        def setup(self, stage: str) -> None:
            self.data = Augmented()

        def train_dataloader(self) -> Any:
            return DataLoader(self.data, 4, shuffle=True)

    class Own(Sees):
        def train_dataloader(self) -> Any:
            return shuffled()

    trainer, module = trainer_of(tmp_path), Sees()
    torch.manual_seed(1)
    trainer.fit(module, datamodule=Data())
    seed = trainer.sources.train.parts[0].seed
    position = {"epoch": 1, "batch": 2, "loaders": [{"seed": seed}]}
    for given in ({"datamodule": Data()}, {"train_dataloaders": Data()}, {"model": Own()}):
        assert equal(trainer_of(tmp_path).replay(position, **given), module.seen[1, 2])


def test_the_random_state_of_the_process_stays(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.fit(Sees(), shuffled())
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trainer.replay((1, 1))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("position", [3, "3", {"epoch": 1}, (1, 2, 3)])
def test_what_is_no_position_is_refused(tmp_path: Path, position: Any) -> None:
    trainer = trainer_of(tmp_path)
    trainer.fit(Sees(), shuffled())
    with pytest.raises((MisconfigurationException, FileNotFoundError)):
        trainer.replay(position)


def test_a_batch_that_is_not_there_and_other_loaders_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    with pytest.raises(MisconfigurationException, match="this Trainer has not trained yet"):
        trainer.replay((0, 0))
    trainer.fit(Sees(), shuffled())
    with pytest.raises(MisconfigurationException, match="has no batch 6 in an epoch: it has 6"):
        trainer.replay((0, 6))
    with pytest.raises(MisconfigurationException, match="the position is one of 2 loaders, and train_dataloader has 1"):
        trainer.replay({"epoch": 0, "batch": 0, "loaders": [{}, {}]})
    assert not os.listdir(tmp_path)
