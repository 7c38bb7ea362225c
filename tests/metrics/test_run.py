"""What `log` files, where it shows up, and that filing never waits for a device."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.errors import MisconfigurationException
from trainkit.loggers import Logger
from trainkit.metrics import NO_LOGGING, TRAIN_BATCH, Metrics, numbers

X = torch.arange(10, dtype=torch.float32)  # batches of 4, 4 and 2: the last one is smaller
BATCHES = X.split(4)
EPOCH_MEAN = torch.tensor(float(X.double().mean()))


class Records(Logger):
    """Keep every row."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def column(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]


class Logs(Module):
    """Call a function in training_step and in validation_step, with itself and the batch."""

    def __init__(self, train: Callable[..., Any] | None = None, val: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.train_with, self.val_with = train, val

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.train_with is not None:
            self.train_with(self, batch)
        return self.line(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.val_with is not None:
            self.val_with(self, batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def validating() -> Metrics:
    metrics = Metrics()
    metrics.begin("validation")
    metrics.begin_loader(0, "validation_step")
    return metrics


def result_of(metrics: Metrics) -> dict[str, float]:
    metrics.end_loader(0, 1)
    return metrics.end_evaluation()[0][0]


def loader(data: Any = X) -> DataLoader[Any]:
    return DataLoader(data, batch_size=4)


def trainer_of(**settings: Any) -> Trainer:
    bare = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(**{**bare, **settings})


def fitted(module: Module, val: Any = None, **settings: Any) -> tuple[Trainer, Records]:
    records = Records()
    trainer = trainer_of(logger=records, log_every_n_steps=1, **settings)
    trainer.fit(module, loader(), val)
    return trainer, records


def validated(val: Callable[..., Any], *loaders: Any, **settings: Any) -> tuple[list[dict[str, float]], Trainer]:
    trainer = trainer_of(**settings)
    return trainer.validate(Logs(val=val), list(loaders) or loader(), verbose=False), trainer


# ---------------------------------------------------------------- names and values
def test_a_value_logged_by_step_and_by_epoch_forks_its_name() -> None:
    module = Logs(lambda self, batch: self.log("x", batch.mean(), on_step=True, on_epoch=True, prog_bar=True))
    trainer, records = fitted(module)
    assert records.column("x_step") == [1.5, 5.5, 8.5]
    assert records.column("x_epoch") == [4.5]
    assert records.column("x") == []
    assert set(trainer.callback_metrics) == {"x", "x_step", "x_epoch"}
    assert trainer.callback_metrics["x"] == trainer.callback_metrics["x_epoch"] == 4.5
    assert trainer.progress_bar_metrics == {"x_step": 8.5, "x_epoch": 4.5}


def test_training_logs_by_step_and_evaluation_by_epoch_unless_told_otherwise() -> None:
    module = Logs(lambda self, batch: self.log("t", batch.mean()), lambda self, batch: self.log("v", batch.mean()))
    _, records = fitted(module, loader())
    assert records.column("t") == [1.5, 5.5, 8.5]
    assert records.column("v") == [4.5]


def test_the_row_of_a_step_has_its_zero_based_index() -> None:
    _, records = fitted(Logs(lambda self, batch: self.log("t", batch.mean())))
    assert [step for step, row in records.rows if "t" in row] == [0, 1, 2]


def test_a_metric_called_step_is_the_x_value() -> None:
    module = Logs(val=lambda self, batch: self.log_dict({"v": batch.mean(), "step": 7.0}))
    _, records = fitted(module, loader())
    assert [(step, row["v"]) for step, row in records.rows if "v" in row] == [(7, 4.5)]


def test_a_row_is_written_at_every_nth_update_and_holds_only_what_this_epoch_logged() -> None:
    def log(self: Logs, batch: Tensor) -> None:
        if self.trainer.global_step == 0:
            self.log("early", 1.0)
        self.log("x", batch.mean())

    records = Records()
    trainer_of(logger=records, log_every_n_steps=2, max_epochs=2).fit(Logs(log), loader())
    assert [(step, set(row) - {"epoch"}) for step, row in records.rows] == [(1, {"early", "x"}), (3, {"x"}), (5, {"x"})]


@pytest.mark.parametrize(("flags", "in_rows"), [({"logger": False}, False), ({"logger": True}, True), ({}, True)])
def test_logger_false_keeps_a_value_from_the_loggers_only(flags: dict[str, bool], in_rows: bool) -> None:
    def log(self: Logs, batch: Tensor) -> None:
        self.log("x", batch.mean(), on_step=True, on_epoch=True, **flags)

    trainer, records = fitted(Logs(log))
    assert bool(records.column("x_step")) is in_rows
    assert bool(records.column("x_epoch")) is in_rows
    assert trainer.callback_metrics["x"] == 4.5
    assert trainer.progress_bar_metrics == {}


def test_a_row_written_past_log_is_among_the_logged_metrics() -> None:
    class Writes(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.log_metrics({"rate": 2.5, "size": torch.tensor(3)}, step=7)

    trainer, records = fitted(Logs(), callbacks=Writes(), limit_train_batches=1)
    assert records.rows == [(7, {"rate": 2.5, "size": 3.0})]
    assert trainer.logged_metrics == {"rate": 2.5, "size": 3}
    assert trainer.callback_metrics == {}


def test_log_dict_logs_each_value_with_the_same_options() -> None:
    options = {"on_step": False, "on_epoch": True, "prog_bar": True}
    module = Logs(lambda self, batch: self.log_dict({"a": batch.mean(), "b": batch.max()}, **options))
    trainer, records = fitted(module)
    assert trainer.progress_bar_metrics == {"a": 4.5, "b": pytest.approx((3 * 4 + 7 * 4 + 9 * 2) / 10)}
    assert records.column("a") == [4.5]


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [
        ("mean", float(EPOCH_MEAN)), ("avg", float(EPOCH_MEAN)), (torch.mean, float(EPOCH_MEAN)),
        ("sum", 1.5 + 5.5 + 8.5), (torch.sum, 15.5), (sum, 15.5),
        ("min", 1.5), (min, 1.5), (torch.min, 1.5), (torch.amin, 1.5),
        ("max", 8.5), (max, 8.5), (torch.amax, 8.5), ("MAX", 8.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_number", [False, True])
def test_an_epochs_values_become_one(reduce_fx: Any, expected: float, as_number: bool) -> None:
    def log(self: Logs, batch: Tensor) -> None:
        self.log("x", float(batch.mean()) if as_number else batch.mean(), reduce_fx=reduce_fx)

    assert validated(log)[0] == [{"x": expected}]


@pytest.mark.parametrize("reduce_fx", ["median", "", None, 3, torch.median, lambda values: values[0]])
def test_another_reduction_is_refused_with_the_possible_ones(reduce_fx: Any) -> None:
    with pytest.raises(MisconfigurationException, match="only mean, sum, min, max"):
        validated(lambda self, batch: self.log("x", 1.0, reduce_fx=reduce_fx))


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 1000)), min_size=1, max_size=30),
    st.sampled_from(["tensors", "numbers", "either"]),
)
def test_an_epochs_mean_is_the_weighted_mean_in_double_precision(pairs: list[tuple[float, int]], kind: str) -> None:
    metrics = validating()
    for index, (value, size) in enumerate(pairs):
        as_tensor = kind == "tensors" or (kind == "either" and index % 2 == 0)
        logged = torch.tensor(value, dtype=torch.float64) if as_tensor else value
        metrics.log("x", logged, batch_size=size)
    expected = math.fsum(value * size for value, size in pairs) / sum(size for _, size in pairs)
    scale = max(abs(value) for value, _ in pairs)
    assert result_of(metrics)["x"] == pytest.approx(expected, rel=1e-12, abs=1e-12 * (1 + scale))


def test_many_small_values_do_not_drown_in_a_float32_sum() -> None:
    metrics = validating()
    value = torch.tensor(0.1)
    for _ in range(20_000):
        metrics.log("x", value, reduce_fx="sum")
    assert result_of(metrics)["x"] == pytest.approx(2000, rel=1e-6)


@pytest.mark.parametrize("reduce_fx", ["mean", "sum", "min", "max"])
@pytest.mark.parametrize("values", [[1.0, math.nan, 2.0], [math.nan, 1.0], [1.0, math.nan]])
def test_a_nan_shows_in_the_reduction_of_numbers_and_tensors(reduce_fx: str, values: list[float]) -> None:
    metrics = validating()
    for value in values:
        metrics.log("number", value, reduce_fx=reduce_fx)
        metrics.log("tensor", torch.tensor(value), reduce_fx=reduce_fx)
    assert all(math.isnan(value) for value in result_of(metrics).values())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        (2.5, 2.5),
        (True, 1.0),
        (np.float32(0.25), 0.25),
        (np.float64(0.1), 0.1),
        (np.int64(7), 7.0),
        (np.array([1.5]), 1.5),
        (torch.tensor(4), 4.0),
        (torch.tensor(True), 1.0),
        (torch.tensor([1.5]), 1.5),
        (torch.tensor([[2.5]]), 2.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(0.5, dtype=torch.float16), 0.5),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        (nn.Parameter(torch.tensor([2.0])), 2.0),
    ],
    ids=repr,
)
def test_any_number_and_any_tensor_of_one_element_can_be_logged(value: Any, expected: float) -> None:
    trainer, records = fitted(Logs(lambda self, batch: self.log("x", value, on_step=True, on_epoch=True)))
    assert records.column("x_step") == [expected] * 3
    assert records.column("x_epoch") == [pytest.approx(expected, rel=1e-15)]
    assert all(type(value) is float for value in records.column("x_step") + records.column("x_epoch"))
    kept = trainer.callback_metrics["x"]
    assert kept.shape == ()
    assert kept.is_floating_point()
    assert not kept.requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), r"one element. Received: shape \(3,\).*\.mean\(\)"),
        (torch.zeros(0), r"Received: shape \(0,\)"),
        (torch.tensor(1j), "takes a real number"),
        (np.zeros(2), "a number, a tensor of one element or a metric object. Received: ndarray"),
        (np.array(["a"]), "Received: ndarray"),
        ("0.5", "Received: str"),
        (np.str_("0.5"), "Received: str_"),
        (None, "Received: NoneType"),
        ([1.0], "Received: list"),
        ({"a": 1.0}, "Received: dict. Use self.log_dict"),
        (1j, "Received: complex"),
    ],
    ids=repr,
)
def test_what_is_no_number_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(lambda self, batch: self.log("x", value))


def test_a_tensor_that_grows_after_its_first_call_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        validated(lambda self, batch: self.log("x", batch[:1] if batch[0] < 4 else batch[:2]))


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a name first"):
        validated(lambda self, batch: self.log(batch.mean(), "x"))


# ---------------------------------------------------------------- weights
class Pair(NamedTuple):
    words: list[str]
    x: Tensor


@dataclass
class Item:
    scale: float
    x: Tensor


def nested(batch: Tensor, kind: str) -> Any:
    return {
        "tensor": lambda: batch,
        "tuple": lambda: (batch, batch * 2),
        "dict": lambda: {"weight": torch.tensor(3.0), "inner": [{"x": batch}]},
        "named": lambda: Pair(["a"], batch),
        "dataclass": lambda: Item(0.5, batch),
        "column": lambda: batch.reshape(-1, 1).expand(-1, 5),
    }[kind]()


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "named", "dataclass", "column"])
def test_the_weight_is_the_first_dimension_of_the_first_tensor(kind: str) -> None:
    batches = [nested(batch, kind) for batch in BATCHES]
    means = iter(batch.mean() for batch in BATCHES)
    trainer = trainer_of()
    results = trainer.validate(Logs(val=lambda self, batch: self.log("x", next(means))), iter(batches), verbose=False)
    assert results == [{"x": 4.5}]


def test_the_structure_may_change_from_batch_to_batch() -> None:
    kinds = ("tuple", "dict", "tensor")
    batches = [nested(batch, kind) for batch, kind in zip(BATCHES, kinds, strict=True)]
    means = iter(batch.mean() for batch in BATCHES)
    results = trainer_of().validate(
        Logs(val=lambda self, batch: self.log("x", next(means))), iter(batches), verbose=False
    )
    assert results == [{"x": 4.5}]


def test_the_mean_over_batches_without_tensors_needs_their_size() -> None:
    def validate(**options: Any) -> list[dict[str, float]]:
        module = Logs(val=lambda self, batch: self.log("x", float(len(batch)), **options))
        return trainer_of().validate(module, iter([["a", "b"], ["c"], ["d"]]), verbose=False)

    with pytest.raises(MisconfigurationException, match=r"no tensor in this batch.*self.log\(..., batch_size=...\)"):
        validate()
    assert validate(batch_size=1) == [{"x": pytest.approx(4 / 3)}]
    assert validate(reduce_fx="sum") == [{"x": 4.0}]


@pytest.mark.parametrize("wrap", [int, float, np.int64, torch.tensor])
def test_batch_size_sets_the_weight(wrap: Callable[[int], Any]) -> None:
    sizes = iter([wrap(1), wrap(1), wrap(8)])
    results, _ = validated(lambda self, batch: self.log("x", batch.mean(), batch_size=next(sizes)))
    assert results == [{"x": pytest.approx((1.5 + 5.5 + 8 * 8.5) / 10)}]


def test_a_mean_without_any_weight_is_nan() -> None:
    results, _ = validated(lambda self, batch: self.log_dict({"a": 1.0, "b": torch.tensor(1.0)}, batch_size=0))
    assert all(math.isnan(value) for value in results[0].values())


# ---------------------------------------------------------------- several loaders
def test_several_loaders_get_a_suffix_after_the_fork() -> None:
    def log(self: Logs, batch: Tensor) -> None:
        self.log("x", batch.mean(), on_step=True, on_epoch=True)
        self.log("plain", batch.mean())

    results, trainer = validated(log, loader(), loader(X + 10))
    names = ("x_epoch", "plain")
    assert results == [{f"{name}/dataloader_idx_{i}": 4.5 + 10 * i for name in names} for i in range(2)]
    watched = {name for result in results for name in result} | {f"x/dataloader_idx_{i}" for i in range(2)}
    assert set(trainer.callback_metrics) == watched


def test_the_suffix_can_be_left_out_where_the_names_differ() -> None:
    def log(self: Logs, batch: Tensor) -> None:
        self.log("low" if batch[0] < 10 else "high", batch.mean(), add_dataloader_idx=False)

    assert validated(log, loader(), loader(X + 10))[0] == [{"low": 4.5}, {"high": 14.5}]


def test_leaving_out_the_suffix_of_one_name_for_two_loaders_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="the names must differ"):
        validated(lambda self, batch: self.log("x", 1.0, add_dataloader_idx=False), loader(), loader())


def test_what_the_end_of_an_epoch_logs_belongs_to_all_loaders_and_has_no_suffix() -> None:
    class Ends(Logs):
        def on_validation_epoch_end(self) -> None:
            self.log("total", 3.0)

    results = trainer_of().validate(
        Ends(val=lambda self, batch: self.log("x", batch.mean())), [loader(), loader()], verbose=False
    )
    assert results == [{"x/dataloader_idx_0": 4.5, "total": 3.0}, {"x/dataloader_idx_1": 4.5, "total": 3.0}]


def test_a_name_with_a_loaders_suffix_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="added by itself"):
        validated(lambda self, batch: self.log("x/dataloader_idx_0", 1.0))


# ---------------------------------------------------------------- options and places
def test_the_same_name_twice_with_the_same_options_is_one_metric() -> None:
    def log(self: Logs, batch: Tensor) -> None:
        self.log("x", 1.0)
        self.log("x", 3.0)

    assert validated(log)[0] == [{"x": 2.0}]


@pytest.mark.parametrize(
    "other", [{"prog_bar": True}, {"logger": False}, {"on_step": True}, {"rank_zero_only": True}, {"reduce_fx": "sum"}]
)
def test_the_same_name_twice_with_other_options_is_refused(other: dict[str, Any]) -> None:
    def log(self: Logs, batch: Tensor) -> None:
        self.log("x", 1.0)
        self.log("x", 1.0, **other)

    with pytest.raises(MisconfigurationException, match=r"'x'.*twice in validation_step with different options"):
        validated(log)


def test_logging_neither_by_step_nor_by_epoch_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="logs nothing"):
        fitted(Logs(lambda self, batch: self.log("x", 1.0, on_step=False)))


NEVER_CALLED = {
    "on_save_checkpoint", "on_load_checkpoint", "on_save_point", "on_exception", "configure_optimizers",
    "configure_callbacks", "configure_model", "predict_step", "lr_scheduler_step", "on_before_batch_transfer",
    "transfer_batch_to_device", "on_after_batch_transfer", "prepare_data", "outside",
}  # fmt: skip


@pytest.mark.parametrize("hook", sorted(set(NO_LOGGING) - NEVER_CALLED))
def test_where_nothing_can_be_logged_the_error_says_why(hook: str) -> None:
    def log(self: Callback, trainer: Trainer, module: Module, *_: Any) -> None:
        if not called:
            called.append(hook)
            with pytest.raises(MisconfigurationException, match=f"can't be used in {hook}: {NO_LOGGING[hook][:20]}"):
                module.log("x", 1.0)

    called: list[str] = []
    trainer = trainer_of(callbacks=type("Logging", (Callback,), {hook: log})(), num_sanity_val_steps=1)
    module = type("Predicts", (Logs,), {"predict_step": lambda self, batch, batch_idx: batch})()
    trainer.fit(module, loader(), loader())
    trainer.test(module, loader(), verbose=False)
    trainer.predict(module, loader())
    assert called == [hook]


def test_predict_step_and_configure_optimizers_and_save_points_can_not_log() -> None:
    class Wrong(Logs):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", 1.0)

        def configure_optimizers(self) -> Any:
            self.log("x", 1.0)

    class Saves(Callback):
        def on_save_point(self, trainer: Trainer, module: Module) -> None:
            module.log("x", 1.0)

    with pytest.raises(MisconfigurationException, match="predict_step"):
        trainer_of().predict(Wrong(), loader())
    with pytest.raises(MisconfigurationException, match="configure_optimizers"):
        trainer_of().fit(Wrong(), loader())
    with pytest.raises(MisconfigurationException, match="on_save_point"):
        trainer_of(callbacks=Saves()).fit(Logs(), loader())


EPOCH_HOOKS = [
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end",
]  # fmt: skip


@pytest.mark.parametrize("owner", [Logs, Callback])
@pytest.mark.parametrize("hook", EPOCH_HOOKS)
def test_hooks_outside_of_batches_log_for_the_epoch(hook: str, owner: type) -> None:
    if owner is Logs:
        module: Module = type("Module", (Logs,), {hook: lambda self: self.log("x", 2.0)})()
        callbacks: list[Callback] = []
    else:
        module = Logs()
        callbacks = [type("Logging", (Callback,), {hook: lambda self, trainer, module: module.log("x", 2.0)})()]
    trainer, records = fitted(module, loader(), callbacks=callbacks, max_epochs=2)
    assert records.column("x") == ([2.0] if hook == "on_train_start" else [2.0, 2.0])
    assert trainer.callback_metrics["x"] == 2.0


@pytest.mark.parametrize("hook", EPOCH_HOOKS)
def test_on_step_outside_of_batches_is_refused(hook: str) -> None:
    module = type("Module", (Logs,), {hook: lambda self: self.log("x", 2.0, on_step=True)})()
    with pytest.raises(MisconfigurationException, match=f"on_step=True.*can't be used in {hook}"):
        fitted(module, loader())


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
        "on_before_optimizer_step", "on_train_batch_end",
    ],
)  # fmt: skip
def test_hooks_of_a_training_batch_log_by_step(hook: str) -> None:
    def log(self: Callback, trainer: Trainer, module: Module, *_: Any) -> None:
        module.log("x", float(trainer.global_step))

    _, records = fitted(Logs(), callbacks=type("Logging", (Callback,), {hook: log})())
    assert records.column("x") == ([1.0, 2.0, 3.0] if hook == "on_train_batch_end" else [0.0, 1.0, 2.0])


def test_without_a_trainer_log_warns_and_does_nothing() -> None:
    with pytest.warns(UserWarning, match=r"self\.log\(.x., \.\.\.\) does nothing: this object is not attached"):
        Logs().log("x", 1.0)


def test_a_module_inside_a_module_logs_to_the_same_run() -> None:
    class Part(Module):
        def forward(self) -> None:
            self.log("inner", 2.0)

    class Whole(Logs):
        def __init__(self) -> None:
            super().__init__(lambda self, batch: self.part())
            self.part = Part()

    trainer, _ = fitted(Whole())
    assert trainer.callback_metrics["inner"] == 2.0


# ---------------------------------------------------------------- what callbacks may watch, and when
class Watches(Callback):
    """Note a metric in each hook."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[str, list[float | None]] = {}

    def note(self, hook: str, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(self.name)
        self.seen.setdefault(hook, []).append(None if value is None else float(value))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("train batch", trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("train epoch end", trainer)

    def on_save_point(self, trainer: Trainer, *_: Any) -> None:
        self.note("save point", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("validation batch", trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.note("validation end", trainer)


def test_an_epochs_mean_is_watched_from_the_end_of_the_epoch_on() -> None:
    watches = Watches("x")
    module = Logs(lambda self, batch: self.log("x", batch.mean() + self.current_epoch, on_step=False, on_epoch=True))
    fitted(module, callbacks=watches, max_epochs=2)
    assert watches.seen["train batch"] == [None, None, None, 4.5, 4.5, 4.5]  # of the epoch before, not a part of this
    assert watches.seen["train epoch end"] == [4.5, 5.5]
    assert watches.seen["save point"] == [None, None, 4.5, 4.5, 4.5, 5.5]


def test_a_step_value_is_watched_at_once_and_its_mean_takes_its_place_at_the_end() -> None:
    bare, step, mean = Watches("x"), Watches("x_step"), Watches("x_epoch")
    module = Logs(lambda self, batch: self.log("x", batch.mean(), on_step=True, on_epoch=True))
    fitted(module, callbacks=[bare, step, mean])
    assert bare.seen["train batch"] == step.seen["train batch"] == [1.5, 5.5, 8.5]
    assert mean.seen["train batch"] == [None, None, None]
    assert (bare.seen["train epoch end"], step.seen["train epoch end"]) == ([4.5], [8.5])
    assert mean.seen["train epoch end"] == [4.5]


def test_one_name_in_training_and_validation_is_the_one_of_the_stage_that_runs() -> None:
    watches = Watches("x")
    module = Logs(
        lambda self, batch: self.log("x", batch.mean(), on_step=False, on_epoch=True),
        lambda self, batch: self.log("x", batch.mean() + 100),
    )
    _, records = fitted(module, loader(), callbacks=watches)
    assert watches.seen["validation end"] == [104.5]
    assert watches.seen["train epoch end"] == [4.5]
    assert records.column("x") == [104.5, 4.5]


def test_what_is_watched_is_a_copy() -> None:
    kept: list[Tensor] = []

    class Keeps(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            kept.append(trainer.callback_metrics["x"])
            trainer.callback_metrics["x"].fill_(-1)

    trainer, records = fitted(Logs(lambda self, batch: self.log("x", batch.mean())), callbacks=Keeps())
    assert [float(value) for value in kept] == records.column("x") == [1.5, 5.5, 8.5]
    assert trainer.callback_metrics["x"] == 8.5


def test_a_sanity_check_leaves_no_metrics() -> None:
    class Looks(Callback):
        def on_train_start(self, trainer: Trainer, module: Module) -> None:
            seen.append((dict(trainer.callback_metrics), trainer.progress_bar_metrics))

    seen: list[Any] = []
    module = Logs(val=lambda self, batch: self.log("v", batch.mean(), prog_bar=True))
    _, records = fitted(module, loader(), callbacks=Looks(), num_sanity_val_steps=2)
    assert seen == [({}, {})]
    assert records.column("v") == [4.5]


# ---------------------------------------------------------------- nothing is kept, nothing is waited for
def test_a_tensor_that_changes_later_was_logged_as_it_was() -> None:
    running = torch.zeros(())

    def log(self: Logs, batch: Tensor) -> None:
        running.add_(1)
        self.log("x", running, on_step=True, on_epoch=True, batch_size=1)
        running.mul_(10)

    _, records = fitted(Logs(log))
    assert records.column("x_step") == [1.0, 11.0, 111.0]
    assert records.column("x_epoch") == [41.0]


def test_a_logged_value_keeps_neither_its_graph_nor_its_storage() -> None:
    class Big(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            saved = torch.zeros(1000)
            alive.append(weakref.ref(saved))
            context.saved = saved
            return x.sum()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient

    alive: list[weakref.ref[Any]] = []
    metrics = Metrics()
    metrics.start_batches(TRAIN_BATCH)
    for _ in range(2):
        value = Big.apply(torch.ones(1, requires_grad=True))
        row = torch.zeros(1000)
        alive.append(weakref.ref(row))
        metrics.log("x", value, on_step=True, on_epoch=True)
        metrics.log("y", row[3])
        del value, row
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4
    assert metrics.callback_metrics["y"].untyped_storage().nbytes() == 4


def test_a_batch_is_not_kept_after_it_was_weighed() -> None:
    metrics = validating()
    batch = torch.zeros(3)
    reference = weakref.ref(batch)
    metrics.batch = batch
    metrics.log("x", 1.0)
    metrics.batch = None
    del batch
    assert reference() is None


class Waits(TorchDispatchMode):
    """Note every operation that a device would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.stacked = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"):
            self.waits.append(name)
        if name == "aten::_to_copy" and (kwargs or {}).get("device") not in (None, args[0].device):
            self.waits.append(name)
        self.stacked += name in ("aten::stack", "aten::cat")
        return function(*args, **(kwargs or {}))


def finish(metrics: Metrics) -> None:
    """End the epoch of training, or of the validation."""
    if metrics.table is metrics.train:
        metrics.end_batches()
    else:
        metrics.end_loader(0, 3)


def log_everything(metrics: Metrics, device: str) -> None:
    """Log values of every kind, as a step on that device would."""
    for round_ in range(3):
        metrics.batch = torch.zeros(4 - round_, 2, device=device)
        for reduce_fx in ("mean", "sum", "min", "max"):
            loss = torch.full((), 0.5, device=device, requires_grad=True) * 2
            metrics.log(f"{reduce_fx}", loss, prog_bar=True, on_step=True, on_epoch=True, reduce_fx=reduce_fx)
            value = torch.ones(1, 1, device=device, dtype=torch.bfloat16)
            metrics.log(f"{reduce_fx} half", value, on_epoch=True, reduce_fx=reduce_fx)
            metrics.log(f"{reduce_fx} number", 0.5, on_epoch=True, reduce_fx=reduce_fx)
            either = 0.5 if round_ == 1 else torch.ones((), device=device, dtype=torch.int64)
            metrics.log(f"{reduce_fx} either", either, on_epoch=True, reduce_fx=reduce_fx)
        metrics.log("weighed", torch.ones((), device=device), on_epoch=True, batch_size=torch.ones((), device=device))


@pytest.mark.parametrize("hook", [TRAIN_BATCH, "validation_step"])
def test_filing_a_value_waits_for_nothing(hook: str) -> None:
    metrics = validating()
    if hook == TRAIN_BATCH:
        metrics.leave_evaluation(TRAIN_BATCH)
    with Waits() as mode:
        log_everything(metrics, "cpu")
        finish(metrics)
        values = metrics.callback_metrics  # copies, to be read by whoever asked
    assert values
    assert mode.waits == []


@pytest.mark.parametrize("hook", [TRAIN_BATCH, "validation_step"])
def test_filing_a_value_never_looks_at_it(hook: str) -> None:
    metrics = validating()
    if hook == TRAIN_BATCH:
        metrics.leave_evaluation(TRAIN_BATCH)
    log_everything(metrics, "meta")  # there is nothing to look at: reading would raise
    finish(metrics)
    values = metrics.callback_metrics
    assert values
    assert all(value.is_meta or "number" in name for name, value in values.items())


@pytest.mark.gpu
def test_filing_a_value_does_not_synchronise_with_the_gpu() -> None:
    metrics = validating()
    torch.cuda.set_sync_debug_mode("error")
    try:
        log_everything(metrics, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = validating()
    log_everything(on_host, "cpu")
    assert result_of(metrics) == result_of(on_host)


def test_all_values_are_read_in_one_transfer() -> None:
    values = {f"x{i}": torch.tensor(float(i), dtype=torch.bfloat16 if i % 2 else torch.float64) for i in range(20)}
    with Waits() as mode:
        read = numbers({**values, "number": 3})
    assert read == {**{f"x{i}": float(i) for i in range(20)}, "number": 3.0}
    assert (mode.stacked, mode.waits) == (1, [])  # one stacked tensor, read as a whole


# ---------------------------------------------------------------- unusual moments
def test_a_metric_may_change_between_numbers_and_tensors_of_any_kind() -> None:
    values = iter([0.5, torch.tensor(1, dtype=torch.int32), torch.tensor([3.0], dtype=torch.float64)])
    results, _ = validated(lambda self, batch: self.log("x", next(values), reduce_fx="sum"))
    assert results == [{"x": 4.5}]


def test_a_value_may_be_logged_inside_and_outside_of_inference_mode() -> None:
    def log(self: Logs, batch: Tensor) -> None:
        with torch.inference_mode(bool(batch[0] == 0)):
            self.log("x", batch.mean() + 0, on_step=True, on_epoch=True)

    trainer, records = fitted(Logs(log))
    assert records.column("x_step") == [1.5, 5.5, 8.5]
    assert records.column("x_epoch") == [4.5]
    assert not trainer.callback_metrics["x"].is_inference()


@pytest.mark.gpu
@pytest.mark.parametrize("order", [("cpu", "cuda", "cpu"), ("cuda", "cpu", "cuda")])
@pytest.mark.parametrize("reduce_fx", ["mean", "sum", "min", "max"])
def test_a_metric_may_come_from_the_host_and_from_the_gpu(order: tuple[str, ...], reduce_fx: str) -> None:
    metrics = validating()
    for value, device in zip((3.0, 1.0, 2.0), order, strict=True):
        metrics.log("x", torch.tensor(value, device=device), reduce_fx=reduce_fx)
    assert metrics.evaluation_results() == [{"x": {"mean": 2.0, "sum": 6.0, "min": 1.0, "max": 3.0}[reduce_fx]}]


# ---------------------------------------------------------------- resume
def train_on(metrics: Metrics, values: list[float]) -> None:
    metrics.start_batches(TRAIN_BATCH)
    for value in values:
        metrics.batch = torch.zeros(int(value * 10) % 5 + 1)
        for reduce_fx in ("mean", "sum", "min", "max"):
            options = {"on_step": True, "on_epoch": True, "reduce_fx": reduce_fx, "prog_bar": True}
            metrics.log(f"{reduce_fx} tensor", torch.tensor(value), **options)
            metrics.log(f"{reduce_fx} number", value, **options)
        metrics.log("weighed", torch.tensor(value), on_epoch=True, batch_size=torch.tensor(2))


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_epoch_goes_on_from_its_state_exactly(stop: int) -> None:
    values = [0.3, 1.7, -0.4, 2.2, 0.9]
    whole, first, second = Metrics(), Metrics(), Metrics()
    train_on(whole, values)
    train_on(first, values[:stop])
    state = copy.deepcopy(first.state_dict())
    before = copy.deepcopy(state)
    second.load_state_dict(state)
    train_on(second, values[stop:])
    for metrics in (whole, second):
        metrics.end_batches()
    assert second.callback_metrics == whole.callback_metrics
    assert second.progress_bar_metrics == whole.progress_bar_metrics
    assert second.end_epoch(whole=True) == whole.end_epoch(whole=True)
    assert repr(state) == repr(before)  # a state may be loaded twice


def test_a_restored_metric_takes_its_options_from_the_first_call_and_checks_the_next() -> None:
    first, second = Metrics(), Metrics()
    first.hook = second.hook = TRAIN_BATCH
    first.log("x", 1.0)
    second.load_state_dict(first.state_dict())
    second.log("x", 2.0)
    with pytest.raises(MisconfigurationException, match="different options"):
        second.log("x", 2.0, prog_bar=True)


@pytest.mark.gpu
def test_a_state_from_the_host_goes_on_on_the_gpu() -> None:
    first, second = Metrics(), Metrics()
    first.hook = second.hook = TRAIN_BATCH
    first.log("x", torch.tensor(1.0), on_epoch=True)
    second.load_state_dict(first.state_dict())
    second.log("x", torch.tensor(2.0, device="cuda"), on_epoch=True)
    second.end_batches()
    assert numbers(second.end_epoch(whole=True)) == {"x_epoch": 1.5}


def test_an_epoch_goes_on_exactly_from_a_checkpoint_file(tmp_path: Path) -> None:
    def log(self: Logs, batch: Tensor) -> None:
        for reduce_fx in ("mean", "sum", "min", "max"):
            options = {"on_step": True, "on_epoch": True, "reduce_fx": reduce_fx}
            self.log(f"{reduce_fx} tensor", (batch + 0.1).log().mean(), **options)
            self.log(f"{reduce_fx} number", float((batch + 0.1).log().mean()), **options)

    def run(steps: int, ckpt_path: Path | None = None) -> tuple[Trainer, Records]:
        records = Records()
        trainer = trainer_of(logger=records, log_every_n_steps=1, max_steps=steps, max_epochs=-1)
        trainer.fit(Logs(log), loader(), ckpt_path=ckpt_path)
        return trainer, records

    file = tmp_path / "inside.ckpt"
    whole, rows = run(6)
    for stop in (1, 2, 4):
        run(stop)[0].save_checkpoint(file)
        resumed, rest = run(6, file)
        assert resumed.callback_metrics == whole.callback_metrics
        assert rest.rows == [(step, row) for step, row in rows.rows if step is not None and step >= stop]
