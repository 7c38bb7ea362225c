"""What `log` was given: step values and epoch means, kept on the device and read only when somebody wants a number.

A logged tensor costs two small kernels and no synchronisation: one keeps the last value, one adds to the epoch's sum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainkit.errors import MisconfigurationException
from trainkit.tree import first_tensor_path, follow

REDUCTIONS = ("mean", "sum", "min", "max")
# log's defaults (on_step, on_epoch): inside a training batch, and everywhere else
TRAIN_BATCH = "training_step"
RUN_START = "on_train_start"
NO_LOGGING = {
    "setup": "the run has not begun",
    "teardown": "the run is over",
    "configure_optimizers": "the run has not begun",
    "on_fit_start": "the run has not begun",
    "on_fit_end": "the run is over",
    "on_sanity_check_start": "a sanity check logs nothing",
    "on_sanity_check_end": "a sanity check logs nothing",
    "on_train_end": "the last epoch's metrics are out already; use on_train_epoch_end",
    "on_validation_end": "the validation's metrics are out already; use on_validation_epoch_end",
    "on_test_end": "the test's metrics are out already; use on_test_epoch_end",
    "on_predict_start": "predict logs nothing",
    "on_predict_epoch_start": "predict logs nothing",
    "on_predict_epoch_end": "predict logs nothing",
    "on_predict_end": "predict logs nothing",
    "predict_step": "predict logs nothing",
    "on_save_checkpoint": "a checkpoint is being written",
    "on_save_point": "a checkpoint is being written",
    "on_exception": "the run has failed",
}


class Metric:
    """One logged name: its options, its last value, and its epoch's running reduction."""

    __slots__ = (
        "fresh", "given", "hook", "last", "logger", "name", "on_epoch", "on_step", "prog_bar", "reduce", "suffix",
        "total", "weight",
    )  # fmt: skip
    RUNNING = ("last", "total", "weight", "fresh")
    """The attributes that change from call to call; the others are options."""

    def __init__(
        self,
        name: str,
        hook: str,
        suffix: str,
        prog_bar: bool,
        logger: bool,
        on_step: bool,
        on_epoch: bool,
        reduce: str,
    ) -> None:
        self.name, self.hook, self.suffix = name, hook, suffix
        self.prog_bar, self.logger, self.on_step, self.on_epoch = prog_bar, logger, on_step, on_epoch
        self.reduce = reduce
        self.given: tuple[Any, ...] | None = None  # the options as the user gave them, to compare later calls with
        self.reset()

    def reset(self) -> None:
        """Forget the values, keep the options."""
        self.last: Any = None
        self.total: Any = None
        self.weight: Any = 0.0
        self.fresh = False

    def update(self, value: Any, weight: Any) -> None:
        """Take one value in; a tensor's is read later."""
        if isinstance(value, Tensor):
            value = value.detach()
            if value.ndim:
                value = value.reshape(())
            last = self.last
            if isinstance(last, Tensor) and last.device == value.device:
                last.copy_(value)
            else:
                self.last = _buffer(value, _kept_dtype(value), value.device)
        else:
            self.last = value
        self.fresh = True
        if self.on_epoch:
            self._accumulate(value, weight)

    def _accumulate(self, value: Any, weight: Any) -> None:
        reduce = self.reduce
        if self.total is None:
            self.total = _neutral(reduce)
        total = self.total
        if isinstance(value, Tensor) or isinstance(total, Tensor):
            if not (isinstance(value, Tensor) and isinstance(total, Tensor) and value.device == total.device):
                total, value = self._together(value)
            if reduce == "mean" and isinstance(weight, Tensor):
                total.add_(value.to(total.dtype) * weight)  # as alpha, a tensor would be read here
            elif reduce == "mean":
                total.add_(value, alpha=weight)
            elif reduce == "sum":
                total.add_(value)
            elif reduce == "min":
                torch.minimum(total, value.to(total.dtype), out=total)
            else:
                torch.maximum(total, value.to(total.dtype), out=total)
        elif reduce in ("mean", "sum"):
            self.total = total + value * (weight if reduce == "mean" else 1)
        elif (value < total if reduce == "min" else value > total) or math.isnan(value):
            self.total = value  # and a NaN stays, as it does in torch
        self.weight = self.weight + weight

    def _together(self, value: Any) -> tuple[Tensor, Tensor]:
        """Return the total and the value as tensors that can be added: an accelerator takes numbers from the host."""
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value), dtype=torch.float64)
        total = self.total
        if not isinstance(total, Tensor) or (total.device != value.device and value.device.type != "cpu"):
            wide = torch.float32 if value.device.type == "mps" else torch.float64
            total = self.total = _buffer(total, wide, value.device)
        return total, value

    def epoch_value(self) -> Any:
        """Return the epoch's reduction so far, a tensor or a number; None when nothing was logged."""
        value = self.total
        if value is None:
            return None
        if self.reduce == "mean":
            no_weight = not isinstance(self.weight, Tensor) and self.weight == 0
            value = math.nan if no_weight else value / self.weight
        if isinstance(value, Tensor):
            value = value.to(self.last.dtype if isinstance(self.last, Tensor) else value.dtype, copy=True)
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return the options and the running values."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "given"}


class Table:
    """The metrics of one stage: training, or one evaluation."""

    def __init__(self, stage: str) -> None:
        self.stage = stage  # "train", "validation" or "test"
        self.metrics: dict[tuple[str, str, int], Metric] = {}
        self.num_dataloaders = 1
        self.dataloader_idx = 0

    @property
    def logs_steps(self) -> bool:
        """Whether any value goes to the loggers step by step."""
        return any(metric.on_step and metric.logger for metric in self.metrics.values())

    def values(self, kind: str, keep: Callable[[Metric], bool]) -> Iterator[tuple[str, Any]]:
        """Yield the names and values of one kind, "step" or "epoch"."""
        for metric in self.metrics.values():
            if not keep(metric):
                continue
            forked = metric.on_step and metric.on_epoch
            name = f"{metric.name}_{kind}{metric.suffix}" if forked else metric.name + metric.suffix
            if kind == "step" and metric.on_step and metric.last is not None:
                yield name, metric.last
            elif kind == "epoch" and metric.on_epoch and (value := metric.epoch_value()) is not None:
                yield name, value


class Metrics:
    """All that a run has logged. The loop says where it is; `log` files the value; readers ask for numbers."""

    def __init__(self) -> None:
        self.hook: str = "setup"
        self.train = Table("train")
        self.table = self.train
        self.batch: Any = None
        self.epoch_ended = False  # from here on an epoch's reductions may be watched
        self.published: dict[str, Any] = {}  # values that stay until they are replaced: ends of epochs and evaluations
        self.published_bar: dict[str, Any] = {}
        self.logged: dict[str, float] = {}
        self._size_path: tuple[Any, ...] = ()

    # ------------------------------------------------------------------ writing
    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
    ) -> None:
        """File one value under the hook the run is in. See `Module.log`."""
        table = self.table
        metric = table.metrics.get((self.hook, name, table.dataloader_idx))
        options = (prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx)
        if metric is None or metric.given is None:
            metric = self._first(name, value, options)
        elif metric.given != options:
            raise MisconfigurationException(
                f"self.log({name!r}, ...) was called twice in {self.hook} with different options. "
                "Give both calls the same ones, or log under two names."
            )
        if not isinstance(value, (Tensor, int, float)):
            value = _number(name, value)
        weight: float = 1
        if metric.on_epoch and metric.reduce == "mean":
            weight = batch_size if batch_size is not None else self._batch_size()
        try:
            metric.update(value, weight)
        except RuntimeError as error:
            if isinstance(value, Tensor) and value.numel() != 1:
                raise _not_a_scalar(name, value) from error
            raise

    def _first(self, name: str, value: Any, options: tuple[Any, ...]) -> Metric:
        """Check a name's first call and remember its options."""
        prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx = options
        hook, table = self.hook, self.table
        if hook in NO_LOGGING:
            raise MisconfigurationException(f"self.log({name!r}, ...) can't be used in {hook}: {NO_LOGGING[hook]}.")
        if not isinstance(name, str):
            raise TypeError(f"self.log takes a name first, a string. Received: {name!r}.")
        if "/dataloader_idx_" in name:
            raise MisconfigurationException(
                f"self.log({name!r}, ...): the suffix /dataloader_idx_N is added by itself when there are several "
                "loaders; leave it out, or turn it off with add_dataloader_idx=False."
            )
        if isinstance(value, Tensor) and value.numel() != 1:
            raise _not_a_scalar(name, value)
        if isinstance(value, Tensor) and value.is_complex():
            raise ValueError(
                f"self.log({name!r}, ...) takes a real number. Received: {value.dtype}. Log .abs() or .real."
            )
        in_train_batch, in_batch = hook == TRAIN_BATCH, _is_in_batch(hook)
        on_step = in_train_batch if on_step is None else on_step
        on_epoch = (not in_train_batch) if on_epoch is None else on_epoch
        if on_step and not in_batch:
            raise MisconfigurationException(
                f"self.log({name!r}, ..., on_step=True) can't be used in {hook}: there is no step there. "
                "Leave on_step out."
            )
        if not on_step and not on_epoch:
            raise MisconfigurationException(
                f"self.log({name!r}, ..., on_step=False, on_epoch=False) logs nothing. Set one of them to True."
            )
        if callable(reduce_fx) and getattr(reduce_fx, "__name__", "") in (*REDUCTIONS, "amin", "amax"):
            reduce = reduce_fx.__name__.removeprefix("a")
        elif isinstance(reduce_fx, str) and reduce_fx.lower() in (*REDUCTIONS, "avg"):
            reduce = {"avg": "mean"}.get(reduce_fx.lower(), reduce_fx.lower())
        else:
            raise MisconfigurationException(
                f"self.log({name!r}, ..., reduce_fx={reduce_fx!r}): only {', '.join(REDUCTIONS)} are possible. "
                "Reduce the values yourself in an epoch_end hook and log the result."
            )
        suffixed = table.num_dataloaders > 1 and add_dataloader_idx and in_batch
        suffix = f"/dataloader_idx_{table.dataloader_idx}" if suffixed else ""
        if not suffix and any(
            other.suffix == suffix and index != table.dataloader_idx
            for (other_hook, other_name, index), other in table.metrics.items()
            if other_name == name and other_hook == hook
        ):
            raise MisconfigurationException(
                f"self.log({name!r}, ..., add_dataloader_idx=False) is called for two loaders: the names must differ."
            )
        key = (hook, name, table.dataloader_idx)
        if key not in table.metrics:  # else: restored from a checkpoint, with its running values
            table.metrics[key] = Metric(name, hook, suffix, prog_bar, logger is not False, on_step, on_epoch, reduce)
        table.metrics[key].given = options
        return table.metrics[key]

    def _batch_size(self) -> int:
        """Return the first dimension of the batch's first tensor; the way to it is found once."""
        batch = self.batch
        if batch is None:
            return 1
        try:
            size: int = follow(batch, self._size_path).shape[0]
        except (KeyError, IndexError, TypeError, AttributeError):  # the first batch, or one of another structure
            path = first_tensor_path(batch)
            if path is None:
                return 1
            self._size_path, size = path, follow(batch, path).shape[0]
        return size

    def publish(self, values: dict[str, Any]) -> None:
        """Put values among the callback metrics, where they stay until they are replaced."""
        self.published.update(values)

    # ------------------------------------------------------------------ the run moves on
    def begin(self, stage: str, num_dataloaders: int = 1) -> Table:
        """Enter an evaluation: what is logged from here goes to a table of its own."""
        self.table = Table(stage)
        self.table.num_dataloaders = num_dataloaders
        return self.table

    def resume_train(self, hook: str) -> None:
        """Leave an evaluation: what is logged from here is training's again."""
        self.table, self.hook, self.batch = self.train, hook, None

    def start_epoch(self) -> None:
        """Forget the last epoch's running values; what on_train_start logged belongs to the first epoch of a run."""
        for metric in self.train.metrics.values():
            if metric.hook != RUN_START or self.epoch_ended:
                metric.reset()
        self.epoch_ended = False

    def forget(self) -> None:
        """Forget everything, as after a sanity check."""
        self.published.clear()
        self.published_bar.clear()
        self.train = Table("train")
        self.resume_train("on_sanity_check_end")

    def step_metrics(self) -> dict[str, float]:
        """Return what goes to the loggers at a log point, in one transfer; only what was logged since the last one."""
        return self._fresh(self.train)

    def evaluation_step_metrics(self) -> dict[str, float]:
        """Return what the last evaluation batch logged with on_step=True."""
        return self._fresh(self.table)

    @staticmethod
    def _fresh(table: Table) -> dict[str, float]:
        found: dict[str, Any] = {}
        for metric in table.metrics.values():
            if metric.on_step and metric.logger and metric.fresh:
                name = f"{metric.name}_step{metric.suffix}" if metric.on_epoch else metric.name + metric.suffix
                found[name], metric.fresh = metric.last, False
        return numbers(found)

    def epoch_metrics(self) -> dict[str, float]:
        """Return an epoch's reductions for the loggers, and publish them for callbacks."""
        return self._finish(self.train)

    def evaluation_metrics(self) -> dict[str, float]:
        """Return an evaluation's reductions for the loggers, and publish them for callbacks."""
        return self._finish(self.table)

    def evaluation_results(self) -> list[dict[str, float]]:
        """Return a dict for each loader, as `trainer.validate` and `trainer.test` give them."""
        results: list[dict[str, Any]] = [{} for _ in range(self.table.num_dataloaders)]
        for (hook, _, index), metric in self.table.metrics.items():
            values = dict(_watched(metric, steps=False, epoch=True))
            for result in [results[index]] if _is_in_batch(hook) else results:
                result.update(values)
        return [numbers(result) for result in results]

    def _finish(self, table: Table) -> dict[str, float]:
        self.published.update(self._callback_values(table, final=True))
        self.published_bar.update(_bar_values(table))
        return numbers(dict(table.values("epoch", lambda metric: bool(metric.logger))))

    # ------------------------------------------------------------------ reading
    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Everything a callback may watch, newest values, as 0-dimensional tensors."""
        values = {**self.published, **self._callback_values(self.train, final=self.epoch_ended)}
        if self.table is not self.train:
            values.update(self._callback_values(self.table, final=False))
        return {name: v.clone() if isinstance(v, Tensor) else torch.tensor(float(v)) for name, v in values.items()}

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What was logged with prog_bar=True, as numbers. Reading it waits for the device."""
        values = {**self.published_bar, **_bar_values(self.train)}
        if self.table is not self.train:
            values.update(_bar_values(self.table))
        return numbers(values)

    @staticmethod
    def _callback_values(table: Table, final: bool) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for metric in table.metrics.values():
            values.update(_watched(metric, steps=table.stage == "train", epoch=final or metric.hook != TRAIN_BATCH))
        return values

    # ------------------------------------------------------------------ resume
    def state_dict(self) -> dict[str, Any]:
        """Return the running values of the epoch in progress and the published ones."""
        return {
            "train": [
                metric.state_dict()
                for metric in self.train.metrics.values()
                if metric.last is not None and metric.hook != RUN_START  # logged again when the run is resumed
            ],
            "published": dict(self.published),
            "published_bar": dict(self.published_bar),
            "epoch_ended": self.epoch_ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.published = dict(state["published"])
        self.published_bar = dict(state["published_bar"])
        self.epoch_ended = bool(state["epoch_ended"])
        for saved in state["train"]:
            metric = Metric(**{name: value for name, value in saved.items() if name not in Metric.RUNNING})
            for name in Metric.RUNNING:
                setattr(metric, name, copy.deepcopy(saved[name]))  # they change in place
            self.train.metrics[metric.hook, metric.name, 0] = metric


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Turn tensors into numbers, with one transfer for each device they are on."""
    by_device: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(name)
    read: dict[str, float] = {}
    for device, names in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        read.update(zip(names, torch.stack([values[name].to(wide) for name in names]).tolist(), strict=True))
    return {name: read[name] if name in read else float(value) for name, value in values.items()}


def _is_in_batch(hook: str) -> bool:
    return hook.endswith("_step") or "_batch_" in hook


def _watched(metric: Metric, steps: bool, epoch: bool) -> Iterator[tuple[str, Any]]:
    """Yield the names and values that callbacks may watch: a forked name's parts, and the newest of them bare."""
    newest: list[tuple[str, Any]] = []
    if steps and metric.on_step:
        newest.append(("_step", metric.last))
    if epoch and metric.on_epoch:
        newest.append(("_epoch", metric.epoch_value()))
    for part, value in newest:
        if value is not None:
            yield metric.name + metric.suffix, value
            if metric.on_step and metric.on_epoch:
                yield metric.name + part + metric.suffix, value


def _bar_values(table: Table) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if table.stage == "train":
        found.update(table.values("step", lambda metric: metric.prog_bar))
    found.update(table.values("epoch", lambda metric: metric.prog_bar))
    return found


def _kept_dtype(value: Tensor) -> torch.dtype:
    return value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32


def _buffer(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a copy that may be changed in place for as long as the run lasts, wherever log is called."""
    with torch.inference_mode(False):  # else a value logged under inference_mode could not be updated outside
        buffer = torch.empty((), dtype=dtype, device=device)
        return buffer.copy_(value) if isinstance(value, Tensor) else buffer.fill_(value)


def _neutral(reduce: str) -> float:
    return {"mean": 0.0, "sum": 0.0, "min": math.inf, "max": -math.inf}[reduce]


def _number(name: str, value: Any) -> Any:
    """Return a numpy scalar and its like as a number."""
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "size", 1) == 1 and isinstance(number := item(), (int, float)):
        return number
    raise ValueError(
        f"self.log({name!r}, ...) takes a number or a tensor of one element. Received: {type(value).__name__}."
        + (" Use self.log_dict for several values." if isinstance(value, dict) else "")
    )


def _not_a_scalar(name: str, value: Tensor) -> ValueError:
    return ValueError(
        f"self.log({name!r}, ...) takes a tensor of one element. Received: shape {tuple(value.shape)}. "
        "Reduce it first, for example with .mean()."
    )
