"""The same programs here and in Lightning: rows, results, and what may be watched in each hook.

What Lightning 2.6.6 did is in as_lightning.json: the outcome of `record` with its classes in place of ours, and with
torchmetrics 1.9.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import trainkit
from trainkit.loggers import Logger

torchmetrics = pytest.importorskip("torchmetrics")

EXPECTED = json.loads(Path(__file__).with_name("as_lightning.json").read_text())
KIT = SimpleNamespace(Module=trainkit.Module, Trainer=trainkit.Trainer, Callback=trainkit.Callback, Logger=Logger)
EVENTS = ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")
HOOKS = [  # without on_before_zero_grad: gradients are cleared after the step in Lightning, and before it here
    "on_sanity_check_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
    "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end",
    "on_train_end", "on_fit_end", *(f"on_{stage}_{event}" for stage in ("validation", "test") for event in EVENTS),
]  # fmt: skip
SILENT = {
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_end",
    "on_fit_end",
    "on_validation_end",
    "on_test_end",
}


# ---------------------------------------------------------------- what is logged
def nothing(module: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None: ...


def train(module: Any, batch: Tensor, batch_idx: int) -> None:
    module.log("x", batch.mean(), on_step=True, on_epoch=True, prog_bar=True)
    module.log("y", batch.sum())
    module.log("z", batch.max(), on_epoch=True, on_step=False, prog_bar=True, logger=False)
    module.log("number", 0.5)


def validate(module: Any, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
    module.log("forked", batch.mean(), on_step=True, prog_bar=True)
    module.log("by step", batch.sum(), on_step=True, on_epoch=False)
    module.log("by epoch", batch.max(), prog_bar=True)
    module.log("unlogged", batch.max(), logger=False)
    module.log("x", batch.mean())


def sometimes(module: Any, batch: Tensor, batch_idx: int) -> None:
    module.log("even" if batch_idx % 2 == 0 else "odd", float(batch_idx))
    if module.current_epoch == 0:
        module.log("first", batch.mean(), on_step=True, on_epoch=True)


def own_step(module: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
    module.log("x", batch.mean(), on_step=True, on_epoch=True)
    module.log("step", float(module.current_epoch * 100 + batch_idx))


def own_epoch(module: Any, batch: Tensor, batch_idx: int) -> None:
    module.log("x", batch.mean(), on_epoch=True)
    module.log("epoch", 42.0)


def twice(module: Any, batch: Tensor, batch_idx: int) -> None:
    module.log("x", batch.mean(), on_step=True, on_epoch=True)
    module.log("x", batch.mean() + 1, on_epoch=True)


def reductions(module: Any, batch: Tensor, batch_idx: int) -> None:
    for name, reduce_fx in {
        "mean": "mean", "avg": "avg", "SUM": "SUM", "min": "min", "max": "max",
        "torch.mean": torch.mean, "torch.sum": torch.sum, "torch.min": torch.min, "torch.max": torch.max,
    }.items():  # fmt: skip
        module.log(name, batch.mean(), on_step=True, on_epoch=True, reduce_fx=reduce_fx)
    module.log("weighed", batch.mean(), on_epoch=True, batch_size=batch_idx + 1)
    module.log("integer", torch.tensor(batch_idx), on_epoch=True)
    module.log("bool", True, on_epoch=True)
    module.log("half", batch.mean().half(), on_epoch=True)
    module.log("double", batch.mean().double() / 3, on_epoch=True)
    module.log("matrix", batch.mean().reshape(1, 1), on_epoch=True)
    module.log("nan", math.nan if batch_idx == 0 else 1.0, on_epoch=True, reduce_fx="max")


def objects(module: Any, batch: Tensor, batch_idx: int) -> None:
    module.mean(batch)
    module.log("mean", module.mean, on_step=True, on_epoch=True, prog_bar=True)
    module.errors(batch, batch + batch_idx)
    module.log_dict(module.errors, on_step=True)


def evaluated_objects(module: Any, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
    module.validation_mean.update(batch)
    module.log("mean", module.validation_mean)
    module.log_dict({"a": batch.mean(), "b": 1.0}, on_step=True, batch_size=1)


def everywhere(callback: Any, module: Any, hook: str) -> None:
    if hook not in SILENT:
        module.log(f"module/{hook}", float(module.global_step) + 1)
        callback.log(f"callback/{hook}", torch.tensor(float(module.global_step) + 2), prog_bar=True)
        callback.log("same", 1.0 + len(hook))


def adds_a_watched_value(callback: Any, module: Any, hook: str) -> None:
    if hook == "on_validation_epoch_end":
        module.trainer.callback_metrics["added"] = torch.tensor(3.0)


def stops(callback: Any, module: Any, hook: str) -> None:
    if hook == "on_train_batch_end" and module.global_step == 2:
        module.trainer.should_stop = True


# ---------------------------------------------------------------- the programs
def loader(count: int) -> DataLoader[Any]:
    return DataLoader(torch.arange(float(count)), batch_size=4)  # type: ignore[arg-type]


def record(kit: Any, name: str, watched: bool) -> dict[str, Any]:
    """Run a program with one kit's classes; `watched`: every hook reads the metrics."""
    program = PROGRAMS[name]

    class Net(kit.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(1, 1)
            self.automatic_optimization = not program.get("manual", False)
            self.mean, self.validation_mean = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
            parts = {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
            self.errors = torchmetrics.MetricCollection(parts, prefix="errors/")

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            program.get("train", nothing)(self, batch, batch_idx)
            loss = self.line(torch.ones(1, 1)).sum() * 0
            if self.automatic_optimization:
                return loss
            if batch_idx % 2 == 0:
                self.manual_backward(loss)
                self.optimizers().step()
            return None

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            program.get("val", nothing)(self, batch, batch_idx, dataloader_idx)

        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.validation_step(batch, batch_idx, dataloader_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Rows(kit.Logger):  # type: ignore[misc]
        name, version = "rows", "0"

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            rows.append([step, plain(metrics)])

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def answer(hook: str) -> Callable[..., None]:
        def method(self: Any, trainer: Any, module: Any, *_: Any) -> None:
            nonlocal before
            program.get("callback", lambda *_: None)(self, module, hook)
            if watched:
                now = views(trainer)
                seen.append([hook, [changes(old, new) for old, new in zip(before, now, strict=True)]])
                before = now

        return method

    rows: list[Any] = []
    seen: list[Any] = []
    before: list[dict[str, Any]] = [{}, {}, {}]
    callback = type("Watches", (kit.Callback,), {hook: answer(hook) for hook in HOOKS})()
    settings = {
        "accelerator": "cpu", "logger": Rows(), "callbacks": [callback], "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2, "log_every_n_steps": 1,
        "num_sanity_val_steps": 0, **program.get("settings", {}),
    }  # fmt: skip
    trainer = kit.Trainer(**settings)
    loaders = [loader(count) for count in program.get("loaders", [6])]
    results: Any = None
    if "stage" in program:
        results = [plain(result) for result in getattr(trainer, program["stage"])(Net(), loaders, verbose=False)]
    else:
        trainer.fit(Net(), loader(program.get("count", 6)), loaders if "val" in program else None)
    return {"rows": rows, "results": results, "seen": seen, "final": views(trainer)}


def views(trainer: Any) -> list[dict[str, Any]]:
    return [plain(m) for m in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)]


def plain(metrics: Any) -> dict[str, Any]:
    values = {name: float(value) for name, value in metrics.items()}
    return {name: "nan" if math.isnan(value) else round(value, 5) for name, value in values.items()}


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    gone = {name: None for name in before if name not in now}
    return {**gone, **{name: value for name, value in now.items() if before.get(name) != value}}


PROGRAMS: dict[str, dict[str, Any]] = {
    "training": {"train": train},
    "training and validation": {"train": train, "val": validate},
    "two validation loaders": {"train": train, "val": validate, "loaders": [6, 5]},
    "validation after each batch": {"train": train, "val": validate, "settings": {"val_check_interval": 1}},
    "sanity check": {"train": train, "val": validate, "settings": {"num_sanity_val_steps": 1}},
    "accumulation": {
        "train": train, "val": validate, "count": 18,
        "settings": {"accumulate_grad_batches": 2, "val_check_interval": 1},
    },
    "every second step": {"train": train, "count": 18, "settings": {"log_every_n_steps": 2}},
    "never": {"train": train, "count": 18, "settings": {"log_every_n_steps": 0}},
    "no logger": {"train": train, "val": validate, "settings": {"logger": False}},
    "validate": {"val": validate, "stage": "validate"},
    "validate two loaders": {"val": validate, "stage": "validate", "loaders": [6, 5]},
    "test two loaders": {"val": validate, "stage": "test", "loaders": [6, 5], "callback": everywhere},
    "some batches only": {"train": sometimes, "count": 18},
    "a value called step": {"train": own_step, "val": own_step},
    "a value called epoch": {"train": own_epoch},
    "twice in a step": {"train": twice},
    "reductions": {"train": reductions},
    "metric objects": {"train": objects, "val": evaluated_objects, "settings": {"num_sanity_val_steps": 1}},
    "metric objects of two loaders": {"val": evaluated_objects, "stage": "validate", "loaders": [6, 5]},
    "every hook": {"train": train, "val": validate, "callback": everywhere},
    "every hook, two loaders": {"train": train, "val": validate, "callback": everywhere, "loaders": [6, 5]},
    "a value put there by a callback": {"train": train, "val": validate, "callback": adds_a_watched_value},
    "manual optimization": {"train": train, "count": 18, "manual": True, "settings": {"log_every_n_steps": 2}},
    "a step limit": {"train": train, "count": 18, "settings": {"max_steps": 3, "log_every_n_steps": 50}},
    "a stop": {"train": train, "val": validate, "count": 18, "callback": stops, "settings": {"log_every_n_steps": 50}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:log_every_n_steps", "ignore:The ``compute`` method")
@pytest.mark.parametrize("watched", [True, False], ids=["watched", "unwatched"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_logs_as_in_lightning(name: str, watched: bool) -> None:
    expected = EXPECTED[f"{name}{', watched' if watched else ''}"]
    outcome = json.loads(json.dumps(record(KIT, name, watched)))
    for part in expected:
        assert outcome[part] == expected[part], part
