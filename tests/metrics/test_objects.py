"""Metric objects: torchmetrics, and anything with update, compute and reset."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.errors import MisconfigurationException

torchmetrics = pytest.importorskip("torchmetrics")


def trainer_of(**settings: Any) -> Trainer:
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 2,
    }
    return Trainer(**{**bare, **settings})


def loader() -> DataLoader[Any]:
    return DataLoader(torch.arange(10.0), batch_size=4)  # type: ignore[arg-type]


class Net(Module):
    """Update metrics of several kinds in training."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.mean = torchmetrics.MeanMetric()
        self.other = torchmetrics.MeanMetric()
        self.inside = nn.ModuleDict({"auroc": torchmetrics.AUROC(task="binary")})  # keeps lists of tensors
        parts = [torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score()]
        self.errors = torchmetrics.MetricCollection(parts, prefix="errors/")  # these share their states

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.mean(batch / 3)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.inside["auroc"].update(torch.sigmoid(batch - 5), (batch % 2).long())
        self.log("auroc", self.inside["auroc"], on_step=False, on_epoch=True)
        self.errors(batch, batch * 1.1 + 0.3)
        self.log_dict(self.errors, on_step=True, on_epoch=True)
        return self.line(batch[:, None]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SavesAt(Callback):
    """Write a file after so many updates."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_save_point(self, trainer: Trainer, module: Module) -> None:
        if trainer.global_step == self.step and not self.file.exists():
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_half_an_epoch_survives_a_restart_bit_for_bit(step: int, tmp_path: Path) -> None:
    file = tmp_path / "inside.ckpt"
    whole = trainer_of(callbacks=SavesAt(step, file))
    whole.fit(Net(), loader())
    resumed = trainer_of()
    resumed.fit(Net(), loader(), ckpt_path=file)
    assert resumed.callback_metrics == whole.callback_metrics
    assert "auroc" in resumed.callback_metrics


def test_a_state_can_be_saved_after_a_run_that_ended_inside_an_epoch(tmp_path: Path) -> None:
    whole, half, resumed = trainer_of(), trainer_of(max_steps=4), trainer_of()
    whole.fit(Net(), loader())
    module = Net()
    half.fit(module, loader())
    assert not module.mean.update_called  # it was reset, for whoever uses it next
    half.save_checkpoint(tmp_path / "after.ckpt")
    resumed.fit(Net(), loader(), ckpt_path=tmp_path / "after.ckpt")
    assert resumed.callback_metrics == whole.callback_metrics


def test_objects_are_reset_when_the_epoch_is_over_and_after_a_sanity_check() -> None:
    class Counts(Net):
        def on_train_epoch_start(self) -> None:
            seen.append(self.mean.update_count)

        def on_train_epoch_end(self) -> None:
            seen.append(self.mean.update_count)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.other.update(batch)
            self.log("other", self.other)

        def on_validation_epoch_start(self) -> None:
            validations.append(self.other.update_count)

    seen: list[int] = []
    validations: list[int] = []
    module = Counts()
    trainer_of(num_sanity_val_steps=2).fit(module, loader(), loader())
    assert seen == [0, 3, 0, 3]
    assert validations == [0, 0, 0]
    assert module.mean.update_count == 0


def logging(log: Any) -> Module:
    def training_step(self: Any, batch: Tensor, batch_idx: int) -> Tensor:
        log(self, batch_idx)
        return self.line(batch[:, None]).mean()  # type: ignore[no-any-return]

    return type("Logs", (Net,), {"training_step": training_step})()


@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        (
            lambda self, _: self.log("x", torchmetrics.MeanMetric()),
            MisconfigurationException,
            "not an attribute of the module.*metric_attribute: mean, other, inside.auroc",
        ),
        (
            lambda self, index: self.log("x", self.other if index else self.mean),
            MisconfigurationException,
            "two metric objects in training_step",
        ),
        (
            lambda self, index: self.log("x", 1.0 if index else self.mean),
            MisconfigurationException,
            "with a metric object before, and now with a float",
        ),
        (
            lambda self, index: self.log("x", self.mean if index else 1.0),
            MisconfigurationException,
            "with a number before, and now with a MeanMetric",
        ),
        (lambda self, _: self.log("x", self.errors), ValueError, "Received: MetricCollection. Use self.log_dict"),
    ],
)
def test_an_object_that_can_not_be_logged_is_refused(log: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer_of().fit(logging(log), loader())


@pytest.mark.parametrize(("computed", "received"), [({"a": torch.ones(())}, "dict"), (torch.ones(2), r"shape \(2,\)")])
def test_an_object_that_computes_several_values_is_refused_with_what_to_do(computed: Any, received: str) -> None:
    class Several(torchmetrics.Metric):  # type: ignore[misc]
        def update(self) -> None: ...

        def compute(self) -> Any:
            return computed

    class Logs(Net):
        def __init__(self) -> None:
            super().__init__()
            self.several = Several()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.several.update()
            self.log("x", self.several)

    with pytest.raises(ValueError, match=rf"compute\(\) of a logged metric.*Received: {received}.*self.log_dict"):
        trainer_of().validate(Logs(), loader(), verbose=False)


def test_an_object_of_ones_own_needs_three_methods_only() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("value", torch.tensor(-1.0))

        def update(self, batch: Tensor) -> None:
            self.value = torch.maximum(self.value, batch.max())

        def compute(self) -> Tensor:
            return self.value.clone()

        def reset(self) -> None:
            self.value = torch.tensor(-1.0)

    class Logs(Net):
        def __init__(self) -> None:
            super().__init__()
            self.largest = Largest()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.largest.update(batch)
            self.log("largest", self.largest)

    assert trainer_of().validate(Logs(), loader(), verbose=False) == [{"largest": 9.0}]


def test_enable_graph_keeps_the_graph_of_what_an_object_computes(tmp_path: Path) -> None:
    class Graph(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.line(batch[:, None]).mean()
            self.mean(loss)
            self.log("kept", self.mean, enable_graph=True)
            self.other(loss)
            self.log("cut", self.other)
            kept.append([self.trainer.callback_metrics[name].requires_grad for name in ("kept", "cut")])
            return loss

    kept: list[list[bool]] = []
    file = tmp_path / "x.ckpt"
    trainer_of(max_steps=2, callbacks=SavesAt(1, file)).fit(Graph(), loader())
    trainer_of(max_steps=2).fit(Graph(), loader(), ckpt_path=file)  # what is saved has no graph
    assert kept == [[True, False]] * 3


def test_torchmetrics_is_never_imported() -> None:
    code = "import sys; from trainkit import Module, Trainer, metrics; print('torchmetrics' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_object_is_reset_once_an_epoch() -> None:
    resets: list[int] = []

    class Watched(torchmetrics.MeanMetric):  # type: ignore[misc, name-defined]
        def reset(self) -> None:
            resets.append(1)
            super().reset()

    class Logs(Net):
        def __init__(self) -> None:
            super().__init__()
            self.watched = Watched()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.watched.update(batch)
            self.log("watched", self.watched)
            return self.line(batch[:, None]).mean()  # type: ignore[no-any-return]

    module = Logs()
    resets.clear()
    trainer_of().fit(module, loader())
    assert len(resets) == 2
