"""Workers that start early and stay: they see what workers that are started for each epoch would see."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainkit import Callback, Module, Trainer
from trainkit.data.loader import Loader

PLAIN = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Scaled(Dataset[Any]):
    """Gives its scale, and the process that loaded it."""

    def __init__(self, size: int = 12, **more: Any) -> None:
        self.size, self.scale = size, 1
        vars(self).update(more)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(float(self.scale)), os.getpid(), index


class Notes(Module):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
        self.scales: list[list[float]] = []
        self.workers: list[set[int]] = []
        self.order: list[int] = []
        self.validated_by: list[set[int]] = []

    def on_train_epoch_start(self) -> None:
        self.scales.append([])
        self.workers.append(set())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.scales[-1] += batch[0].tolist()
        self.workers[-1] |= set(batch[1].tolist())
        self.order += batch[2].tolist()
        return self.line(batch[0][:, None]).sum()

    def on_validation_epoch_start(self) -> None:
        self.validated_by.append(set())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated_by[-1] |= set(batch[1].tolist())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(loader: Any, val: Any = None, callbacks: Any = (), **settings: Any) -> Notes:
    torch.manual_seed(1)
    module = Notes()
    Trainer(**{**PLAIN, "max_epochs": 4, **settings}, callbacks=[*callbacks]).fit(module, loader, val)
    assert multiprocessing.active_children() == []
    return module


def loader_of(data: Any, **settings: Any) -> Any:
    return DataLoader(data, 4, **{"num_workers": 2, "shuffle": True, **settings})


def test_workers_stay_from_epoch_to_epoch_and_end_with_the_run() -> None:
    val = loader_of(Scaled(), shuffle=False, num_workers=1)
    module = fitted(loader_of(Scaled()), val)
    assert len(set().union(*module.workers)) == 2
    assert len(set().union(*module.validated_by)) == 1
    assert len(module.validated_by) == 5  # the sanity check among it
    assert module.order == fitted(loader_of(Scaled(), num_workers=0)).order
    assert module.order == fitted(loader_of(Scaled(), persistent_workers=True)).order


@pytest.mark.parametrize("when", ["on_train_epoch_start", "on_train_epoch_end", "on_validation_end"])
def test_what_a_hook_changes_is_seen_by_the_workers_of_the_next_epoch(when: str) -> None:
    class Scales(Callback):
        pass

    def change(self: Any, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            data.scale = trainer.current_epoch // 2 + 1

    setattr(Scales, when, change)
    data = Scaled()
    module = fitted(loader_of(data), loader_of(Scaled(), shuffle=False), [Scales()])
    data = Scaled()
    here = fitted(loader_of(data, num_workers=0), loader_of(Scaled(), num_workers=0, shuffle=False), [Scales()])
    assert module.scales == here.scales
    assert {1.0, 2.0} <= {scale for scales in module.scales for scale in scales}
    assert len(set().union(*module.workers)) == 4  # new ones for the change, and only then


@pytest.mark.parametrize("when", ["setup", "configure_optimizers", "on_fit_start", "on_train_start"])
def test_what_is_changed_before_the_first_epoch_is_seen_though_workers_start_early(when: str) -> None:
    data = Scaled()

    class Scales(Notes):
        pass

    def change(self: Any, *_: Any) -> Any:
        data.scale = 5
        return Notes.configure_optimizers(self) if when == "configure_optimizers" else None

    setattr(Scales, when, change)
    module = Scales()
    Trainer(**PLAIN, max_epochs=2).fit(module, loader_of(data))
    assert module.scales == [[5.0] * 12] * 2
    assert multiprocessing.active_children() == []


def test_data_that_are_not_there_before_training_begins_are_asked_for_again(tmp_path: Path) -> None:
    class Read(Scaled):
        def __getitem__(self, index: int) -> Any:
            (tmp_path / "there").read_text()
            return super().__getitem__(index)

    class Writes(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            (tmp_path / "there").write_text("x")

    assert len(fitted(loader_of(Read()), callbacks=[Writes()]).order) == 48
    (tmp_path / "there").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        fitted(loader_of(Read()))
    assert "loading the sample with index" in str([*caught.value.__notes__, caught.value])
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: loader_of(Scaled(generator=random.Random(1))),
        lambda: loader_of(Scaled(), worker_init_fn=begun),
        lambda: loader_of(Stateful()),
    ],
    ids=["a generator of its own", "worker_init_fn", "state_dict"],
)
def test_workers_do_not_stay_where_it_could_be_told(make: Any) -> None:
    assert len(set().union(*fitted(make()).workers)) == 8


def begun(worker: int) -> None: ...


class Stateful(Scaled):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_worker_that_is_killed_between_two_epochs_is_replaced() -> None:
    class Kills(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGKILL)
                    child.join()

    module = fitted(loader_of(Scaled()), callbacks=[Kills()])
    assert len(set().union(*module.workers)) == 4
    assert module.order == fitted(loader_of(Scaled(), num_workers=0)).order


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"limit_train_batches": 2}, {"val_check_interval": 2}], ids=str)
def test_an_epoch_that_is_left_early_does_not_disturb_the_next(settings: dict[str, Any]) -> None:
    val = loader_of(Scaled(), shuffle=False)
    module = fitted(loader_of(Scaled()), val, **settings)
    here = fitted(loader_of(Scaled(), num_workers=0), loader_of(Scaled(), num_workers=0, shuffle=False), **settings)
    assert module.order == here.order
    assert len(set().union(*module.workers)) == 2


def test_evaluations_and_loaders_outside_of_fit_let_go_of_their_workers() -> None:
    loader = Loader(loader_of(Scaled()), name="data", argument="limit", seed=1)
    for epoch in range(2):
        assert len(list(loader.epoch(epoch))) == 3
        assert multiprocessing.active_children() == []
    trainer = Trainer(**PLAIN)
    trainer.validate(Notes(), loader_of(Scaled(), shuffle=False), verbose=False)
    assert multiprocessing.active_children() == []


class Fails(Callback):
    def __init__(self, when: str) -> None:
        setattr(self, when, self.fail)

    def fail(self, *_: Any) -> None:
        raise ArithmeticError


@pytest.mark.parametrize("when", ["on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_end"])
def test_an_error_leaves_no_worker_behind(when: str) -> None:
    class Failing(Fails):
        pass

    def fail(self: Any, *_: Any) -> None:
        raise ArithmeticError

    setattr(Failing, when, fail)
    with pytest.raises(ArithmeticError):
        fitted(loader_of(Scaled()), loader_of(Scaled(), shuffle=False), [Failing("unused")])
    assert multiprocessing.active_children() == []


def test_the_workers_of_a_loader_that_changes_meanwhile_are_not_its_workers() -> None:
    class Exchanges(Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            vars(loader)["collate_fn"] = doubled

    loader = loader_of(Scaled())
    assert fitted(loader, callbacks=[Exchanges()]).scales == [[2.0] * 12] * 4


def doubled(samples: list[Any]) -> Any:
    scales, workers, indices = zip(*samples, strict=True)
    return torch.stack(scales) * 2, torch.tensor(workers), torch.tensor(indices)


def test_workers_are_there_while_the_model_is_set_up_and_the_sanity_check_runs() -> None:
    there: list[int] = []

    class Looks(Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            there.append(len(multiprocessing.active_children()))

    fitted(loader_of(Scaled()), loader_of(Scaled(), shuffle=False, num_workers=1), [Looks()])
    fitted(loader_of(Scaled()), loader_of(Scaled(), shuffle=False, num_workers=1), [Looks()], num_sanity_val_steps=0)
    assert there == [3, 2]
