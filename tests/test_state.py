"""A run that is stopped and resumed ends where the uninterrupted one ends, bit for bit."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import Callback, Module, Trainer, seed_everything
from trainkit.errors import CheckpointError, MisconfigurationException


class Net(Module):
    """Everything that has state: dropout, momentum, a schedule by steps and one on a plateau, its own random draws."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x + 0.1 * torch.rand_like(x)) + random.random(), y)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.net[0].parameters(), lr=0.05)
        second = torch.optim.SGD([*self.net[1].parameters(), *self.net[3].parameters()], lr=0.05, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(second, patience=0, threshold=1.0)
        return (
            {
                "optimizer": first,
                "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(first, 3), "interval": "step"},
            },
            {"optimizer": second, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}},
        )


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(26, 3, generator=generator), torch.randn(26, 1, generator=generator))
    return DataLoader(data, 4, shuffle=True), DataLoader(data, 8)


class Record(Callback):
    """Keep what every step logged; save once; stop where it is told to, as a killed process would."""

    def __init__(self, save_at: int = -1, path: Path | None = None) -> None:
        self.save_at, self.path = save_at, path
        self.rows: dict[int, list[float]] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows[trainer.progress.total_batch] = [outputs["loss"].item(), *batch[0].flatten().tolist()]

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.progress.total_batch == self.save_at and self.path is not None:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def fit(callback: Record, ckpt_path: Path | None = None, **settings: Any) -> tuple[Trainer, Net]:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callback,
        max_epochs=3,
        **settings,
    )
    seed_everything(1 if ckpt_path is None else 99, verbose=False)
    module = Net()
    with contextlib.suppress(InterruptedError):
        trainer.fit(module, *loaders(), ckpt_path=ckpt_path)
    return trainer, module


def everything(trainer: Trainer, module: Net) -> dict[str, Any]:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    learning_rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "progress": trainer.progress,
        "metrics": metrics,
        "learning_rates": learning_rates,
        "momentum": [s["momentum_buffer"].tolist() for s in trainer.optimizers[1].state.values()],
        "random": [torch.rand(1).item(), random.random()],
    }


@pytest.mark.filterwarnings("ignore:[\\s\\S]*set up differently")  # the checkpoint's has to win
@given(save_at=st.integers(1, 21), accumulate=st.sampled_from([1, 2]), interval=st.sampled_from([1.0, 3]))
def test_a_run_stopped_at_any_save_point_resumes_exactly(
    tmp_path_factory: pytest.TempPathFactory, save_at: int, accumulate: int, interval: float
) -> None:
    settings = {"accumulate_grad_batches": accumulate, "val_check_interval": interval}
    path = tmp_path_factory.mktemp("run") / "x.ckpt"
    uninterrupted = Record()
    expected = everything(*fit(uninterrupted, **settings))
    before = Record(save_at, path)
    fit(before, **settings)
    if not path.exists():  # in the middle of an accumulation window nothing is saved
        assert accumulate == 2
        return
    after = Record()
    actual = everything(*fit(after, ckpt_path=path, **settings))
    assert before.rows | after.rows == uninterrupted.rows
    assert min(after.rows, default=22) == save_at + 1
    assert actual == expected


@pytest.mark.filterwarnings("ignore:[\\s\\S]*set up differently")
def test_a_run_stopped_by_a_limit_goes_on_inside_the_epoch(tmp_path: Path) -> None:
    uninterrupted = Record()
    expected = everything(*fit(uninterrupted))
    first = Record()
    trainer, _ = fit(first, max_steps=10)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second = Record()
    actual = everything(*fit(second, ckpt_path=tmp_path / "x.ckpt"))
    assert first.rows | second.rows == uninterrupted.rows
    assert actual["weights"] == expected["weights"]


def test_a_checkpoint_that_does_not_fit_the_module_changes_nothing(tmp_path: Path) -> None:
    trainer, _ = fit(Record(), limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    wide = Net(width=9)
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit Net.*net.0.weight \(module \(9, 3\), checkpoint \(8, 3\)\)"
    ):
        trainer.fit(wide, *loaders(), ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())

    class Longer(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.net[3]
            self.head = nn.Linear(8, 1)

    with pytest.raises(
        CheckpointError, match=r"(?s)the checkpoint has not: head.weight, head.bias.*the module has not: net.3.weight"
    ):
        trainer.fit(Longer(), *loaders(), ckpt_path=tmp_path / "x.ckpt")


def test_a_checkpoint_with_weights_only_says_how_to_use_it(tmp_path: Path) -> None:
    trainer, module = fit(Record(), limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(KeyError, match=r"^\S+ has only weights.*Net.load_from_checkpoint"):
        trainer.fit(Net(), *loaders(), ckpt_path=tmp_path / "x.ckpt")
    with pytest.raises(KeyError, match=r"^[^'].* has only weights"):  # as in Lightning; without the quotes of a key
        trainer.fit(Net(), *loaders(), ckpt_path=tmp_path / "x.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "x.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))


def test_a_checkpoint_with_more_epochs_than_the_trainer_allows_is_refused(tmp_path: Path) -> None:
    trainer, _ = fit(Record(), limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer.max_epochs = 2
    with pytest.raises(MisconfigurationException, match=r"written after 3 epochs.*max_epochs=2.*above 3"):
        trainer.fit(Net(), *loaders(), ckpt_path=tmp_path / "x.ckpt")
    trainer.max_epochs = 3
    trainer.fit(Net(), *loaders(), ckpt_path=tmp_path / "x.ckpt")
    assert trainer.current_epoch == 3


def test_other_optimizers_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    class One(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer, _ = fit(Record(), limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="the checkpoint has 2 optimizers, configure_optimizers returned 1"):
        trainer.fit(One(), *loaders(), ckpt_path=tmp_path / "x.ckpt")


def test_an_optimizer_of_another_kind_is_refused_before_a_step(tmp_path: Path) -> None:
    class Other(Net):
        def configure_optimizers(self) -> Any:
            first, second = super().configure_optimizers()
            return [torch.optim.SGD(first["optimizer"].param_groups[0]["params"], lr=0.1), second["optimizer"]]

    trainer, _ = fit(Record(), limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="returned SGD, whose dampening, momentum, nesterov the checkpoint"):
        trainer.fit(Other(), *loaders(), ckpt_path=tmp_path / "x.ckpt")


def test_the_file_has_lightnings_keys_and_torch_reads_it(tmp_path: Path) -> None:
    trainer, module = fit(Record())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    read = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert (read["epoch"], read["global_step"]) == (3, 21)  # how many there were, as in Lightning
    assert read["hyper_parameters"] == {"width": 8}
    assert {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "hyper_parameters"} <= set(read)
    assert torch.equal(read["state_dict"]["net.0.weight"], module.net[0].weight)
