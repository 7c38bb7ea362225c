"""Every feature that has state, stopped at every save point of a run: what goes on is the same run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from trainkit import Callback, DataModule, Module, Trainer, seed_everything
from trainkit.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelPruning,
    StochasticWeightAveraging,
)
from trainkit.data import CombinedLoader
from trainkit.loggers import Logger
from trainkit.precision import MixedPrecision


class Samples(Dataset[Any]):
    """Samples that python's, numpy's and torch's random sources augment."""

    def __init__(self, length: int = 14) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((3,), index / self.length) + torch.rand(3) + random.random() - np.random.rand()


class Net(Module):
    """Dropout, batch norm, random draws of all sources and metrics of all kinds."""

    scheduler: Callable[[Any], Any] | None = None
    interval = "epoch"
    kind: Any = torch.optim.AdamW
    options: Any = {"lr": 0.05}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.4))
        self.head = nn.Linear(6, 1)
        self.mean = torchmetrics.MeanMetric()

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.backbone(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        loss = torch.stack([self(part).square().mean() for part in parts]).sum()
        loss = loss * (1 + random.random()) * (1 + np.random.rand()) * (1 + torch.rand(()))
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(parts[0]))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), **self.options)
        if self.scheduler is None:
            return optimizer
        scheduler = type(self).scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "monitor": "loss_step"},
        }


def scheduled(scheduler: Callable[[Any], Any], interval: str, **options: Any) -> type[Net]:
    fields = {"scheduler": staticmethod(scheduler), "interval": interval}
    return type("Scheduled", (Net,), {**fields, "options": options or Net.options})


class Manual(Net):
    """Two optimizers that step by themselves, every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        first, second = self.optimizers()
        (first if batch_idx % 2 else second).step()
        first.zero_grad()
        second.zero_grad()
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.SGD(self.backbone.parameters(), lr=0.05, momentum=0.9),
            torch.optim.Adam(self.head.parameters(), lr=0.05),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in optimizers]


class Several(Net):
    def configure_optimizers(self) -> Any:
        return [torch.optim.Adagrad(self.backbone.parameters(), lr=0.1), torch.optim.RMSprop(self.head.parameters())]


class Closure(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)


class Finetuned(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Frozen(Net):
    """A part of it is frozen, and another in evaluation mode, from hooks of its own."""

    def on_train_start(self) -> None:
        self.head.bias.requires_grad = False

    def on_train_epoch_start(self) -> None:
        self.head.bias.requires_grad = self.current_epoch == 2
        self.backbone[0].requires_grad_(self.current_epoch != 1)
        self.backbone[1].train(self.current_epoch != 1)


class Drawing(Callback):
    """A callback that draws, and changes what is trained."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        pl_module.head.bias.data += 0.01 * (torch.randn(()) + random.gauss(0, 1) + np.random.normal())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        pl_module.head.bias.data += 0.01 * (torch.randn(()) + random.gauss(0, 1) + np.random.normal())


class Remembering(DataModule):
    """A data module with state that changes what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def train_dataloader(self) -> Any:
        self.asked += 1
        return DataLoader(Samples(10 + 2 * self.asked), batch_size=2, shuffle=True)

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.asked = state_dict["asked"] - 1  # the loader of the running epoch is asked for again


class Growing(DataModule):
    """A data module whose samples depend on the epoch in which it is asked for them."""

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(8 + 2 * self.trainer.current_epoch), batch_size=2, shuffle=True)


class Rows(Logger):
    """Keep the rows."""

    name, version = "rows", 0

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.setdefault(int(step or 0), {}).update(metrics)

    def log_hyperparams(self, params: Any) -> None:
        pass


class SaveEverywhere(Callback):
    """Save at every save point."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.batches = folder, {}

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        flat = batch if isinstance(batch, Tensor) else torch.cat(list(batch.values()))
        self.batches[trainer.progress.total_batch] = flat.flatten().tolist()

    def on_save_point(self, trainer: Trainer, pl_module: Module) -> None:
        progress = trainer.progress
        name = f"{progress.total_batch:03}-{progress.epoch}-{progress.batch}.ckpt"
        if not (self.folder / name).exists():
            trainer.save_checkpoint(self.folder / name)


def plain(workers: int = 0, **options: Any) -> Any:
    options = {"batch_size": 3, "shuffle": True, "num_workers": workers, **options}
    if workers:
        options["multiprocessing_context"] = "fork"
    return DataLoader(Samples(), **options)


def combined(mode: str) -> Any:
    return CombinedLoader({"a": plain(), "b": DataLoader(Samples(8), batch_size=3, shuffle=True)}, mode)


def weighted() -> Any:
    return plain(shuffle=False, sampler=WeightedRandomSampler([1.0] * 7 + [3.0] * 7, 14))


def overflowing() -> MixedPrecision:
    return MixedPrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3))


Schedules = torch.optim.lr_scheduler
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batches left over": {"data": lambda: plain(drop_last=True)},
    "accumulation": {"accumulate_grad_batches": 2},
    "accumulation over a short last window": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "float16 that overflows": {"plugins": overflowing},
    "bfloat16": {"precision": "bf16-mixed"},
    "float64": {"precision": "64-true"},
    "a schedule by step": {"model": scheduled(lambda o: Schedules.OneCycleLR(o, 0.1, total_steps=20), "step", lr=0.01)},
    "a cyclic schedule": {
        "model": scheduled(lambda o: Schedules.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False), "step", lr=0.01)
    },
    "a schedule by epoch": {"model": scheduled(lambda o: Schedules.CosineAnnealingWarmRestarts(o, 2), "epoch")},
    "chained schedules": {
        "model": scheduled(
            lambda o: Schedules.SequentialLR(
                o, [Schedules.LinearLR(o, total_iters=4), Schedules.ExponentialLR(o, 0.9)], [4]
            ),
            "step",
        )
    },
    "a plateau by step": {"model": scheduled(lambda o: Schedules.ReduceLROnPlateau(o, patience=0), "step")},
    "several optimizers": {"model": Several},
    "manual optimization": {"model": Manual},
    "an optimizer with a closure": {"model": Closure},
    "early stopping": {"callbacks": lambda: [EarlyStopping("val_loss", patience=1)], "max_epochs": 6},
    "averaged weights": {"callbacks": lambda: [EMAWeightAveraging(decay=0.8)]},
    "stochastic weight averaging": {"callbacks": lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1)]},
    "pruning": {
        "callbacks": lambda: [ModelPruning("l1_unstructured", amount=0.2, parameters_to_prune=None, verbose=0)]
    },
    "finetuning": {
        "model": Finetuned,
        "callbacks": lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)],
    },
    "parts that are frozen on the way": {"model": Frozen},
    "an accumulation schedule": {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 2})]},
    "a callback that draws": {"callbacks": lambda: [Drawing(), LearningRateMonitor()]},
    "validation inside the epoch": {"val_check_interval": 2},
    "validation across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "validation with accumulation": {"val_check_interval": 0.5, "accumulate_grad_batches": 2},
    "several loaders that cycle": {"data": lambda: combined("max_size_cycle")},
    "several loaders to the shortest": {"data": lambda: combined("min_size")},
    "loaders asked for again": {"reload_dataloaders_every_n_epochs": 1},
    "a sampler of torch's that draws": {"data": weighted},
    "a data module with state": {"data": Remembering, "reload_dataloaders_every_n_epochs": 1},
    "data that grow with the epoch": {"data": Growing, "reload_dataloaders_every_n_epochs": 1},
    "data that grow every second epoch": {"data": Growing, "reload_dataloaders_every_n_epochs": 2},
    "limited batches": {"limit_train_batches": 3, "limit_val_batches": 1},
    "overfitting": {"overfit_batches": 2},
}


def run(scenario: dict[str, Any], folder: Path, ckpt_path: Path | None = None, data: Any = None) -> dict[str, Any]:
    """Train, and return everything that the run saw, told and became."""
    settings = {"max_epochs": 3, **scenario}
    model, make = settings.pop("model", Net), settings.pop("data", plain)
    callbacks = settings.pop("callbacks", list)()
    if "plugins" in settings:
        settings["plugins"] = settings["plugins"]()
    save, logger = SaveEverywhere(folder), Rows()
    seed_everything(7, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[*callbacks, save],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    module, train = model(), make() if data is None else data
    validation = DataLoader(Samples(6), batch_size=4)
    if isinstance(train, DataModule):
        train.val_dataloader = lambda: validation  # type: ignore[method-assign]
        trainer.fit(module, datamodule=train, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    return {
        "batches": save.batches,
        "rows": logger.rows,
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "callbacks": {callback.state_key: callback.state_dict() for callback in callbacks},
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "progress": trainer.progress.state_dict(),
        "draws": [torch.rand(1).item(), random.random(), np.random.rand()],
    }


def differences(expected: Any, actual: Any, path: str = "") -> list[str]:
    """Return where two values differ, to the last bit."""
    if isinstance(expected, Tensor):
        same = expected.dtype == actual.dtype and torch.equal(expected.nan_to_num(77), actual.nan_to_num(77))
        return [] if same else [f"{path}: {expected} != {actual}"]
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            return [f"{path}: {sorted(map(str, expected))} != {sorted(map(str, actual))}"]
        return [found for key in expected for found in differences(expected[key], actual[key], f"{path}/{key}")]
    if isinstance(expected, (list, tuple)):
        if len(expected) != len(actual):
            return [f"{path}: {len(expected)} != {len(actual)}"]
        pairs = enumerate(zip(expected, actual, strict=True))
        return [found for n, (one, other) in pairs for found in differences(one, other, f"{path}[{n}]")]
    if isinstance(expected, float) and math.isnan(expected) and math.isnan(actual):
        return []
    return [] if callable(expected) or expected == actual else [f"{path}: {expected} != {actual}"]


def check(reference: dict[str, Any], resumed: dict[str, Any], at: int) -> None:
    """Compare a run that went on with the whole one; of what lies before it, it has seen nothing."""
    assert min(resumed["batches"], default=at + 1) == at + 1
    expected = dict(reference)
    expected["batches"] = {batch: seen for batch, seen in reference["batches"].items() if batch > at}
    expected["rows"] = {step: reference["rows"][step] for step in resumed["rows"]}
    for step, row in resumed["rows"].items():  # the first may have been begun before
        expected["rows"][step] = {name: value for name, value in expected["rows"][step].items() if name in row}
    assert not differences(expected, resumed)


@pytest.mark.filterwarnings("ignore:.*shuffles its samples", "ignore:.*shuffling of train_dataloader is turned off")
@pytest.mark.filterwarnings("ignore:EarlyStopping had ended this run already")
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_goes_on_exactly_from_each_of_its_save_points(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    reference = run(scenario, tmp_path)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 5
    for path in paths:
        check(reference, run(scenario, tmp_path, path), int(path.name[:3]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 4)])
def test_the_number_of_workers_may_change_on_the_way(before: int, after: int, tmp_path: Path) -> None:
    reference = run({"data": lambda: plain(before), "accumulate_grad_batches": 2}, tmp_path)
    paths = sorted(tmp_path.glob("*.ckpt"))
    for path in paths[1::3]:
        check(
            reference,
            run({"data": lambda: plain(after), "accumulate_grad_batches": 2}, tmp_path, path),
            int(path.name[:3]),
        )
