"""One logged name: its options, its last value, and its epoch's running reduction.

A logged tensor costs two small kernels and no synchronisation: one keeps the last value, one adds to the epoch's sum.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from trainkit.errors import MisconfigurationException
from trainkit.metrics.options import Options
from trainkit.metrics.reduction import without_rounding

Kind = Literal["step", "epoch"]


class Metric:
    """A name that numbers and tensors are logged under, in one hook and for one loader.

    The sum and its weight are kept apart, so that each can be reduced over processes before they are divided.
    """

    __slots__ = (
        "alone", "given", "hook", "last", "loader", "logged", "logger", "name", "on_epoch", "on_step", "options",
        "prog_bar", "reduce", "suffix", "total", "weight", "weighted",
    )  # fmt: skip
    SAVED: tuple[str, ...] = (
        "name", "hook", "suffix", "loader", "prog_bar", "logger", "on_step", "on_epoch", "reduce", "weighted", "alone",
    )  # fmt: skip
    RUNNING: tuple[str, ...] = ("last", "total", "weight", "logged")
    takes_objects = False

    def __init__(self, name: str, hook: str, suffix: str, loader: int | None) -> None:
        self.name, self.hook, self.suffix = name, hook, suffix
        self.loader = loader  # None: it belongs to no loader in particular
        self.alone = False  # of several processes, only the first logs it
        self.options: Options | None = None
        self.given: tuple[Any, ...] | None = None  # the options as the user gave them, to compare later calls with
        self.reset()

    def configure(self, options: Options) -> None:
        """Take the options of the name's first call."""
        self.options = options
        self.prog_bar, self.logger = options.prog_bar, options.logger
        self.on_step, self.on_epoch, self.reduce = options.on_step, options.on_epoch, options.reduce
        self.weighted, self.alone = self.on_epoch and self.reduce == "mean", options.rank_zero_only

    def reset(self) -> None:
        """Forget the values, keep the options."""
        self.last: Any = None
        self.total: Any = None
        self.weight: Any = 0.0
        self.logged = False  # nothing since the last reset

    def accept(self, value: Any, module: Any) -> Any:
        """Return a numpy scalar and its like as a number.

        Raises:
            ValueError: it can't be logged.
            MisconfigurationException: it is a metric object, and numbers were logged under this name.
        """
        if is_metric_object(value):
            raise MisconfigurationException(
                f"self.log({self.name!r}, ...) was called with a number before, and now with a "
                f"{type(value).__name__}. Log the two under different names."
            )
        return as_number(self.name, value)

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
        self.logged = True
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
            value = math.nan if no_weight else without_rounding(value, self.kind_of_value()) / self.weight
        if isinstance(value, Tensor):
            value = value.to(self.kind_of_value(), copy=True)
        return value

    def kind_of_value(self) -> torch.dtype | None:
        """Return the dtype of what is logged, None for numbers."""
        if isinstance(self.last, Tensor):
            return self.last.dtype
        return self.total.dtype if isinstance(self.total, Tensor) else None

    def value(self, kind: Kind) -> Any:
        """Return the last value ("step") or the epoch's reduction so far; None where that is not logged."""
        if kind == "step":
            return self.last if self.on_step else None
        return self.epoch_value() if self.on_epoch else None

    def called(self, kind: Kind) -> str:
        """Return the name that a value of one kind has: the loader's suffix comes after the fork."""
        return f"{self.name}_{kind}{self.suffix}" if self.on_step and self.on_epoch else self.name + self.suffix

    def state_dict(self) -> dict[str, Any]:
        """Return the options and the running values."""
        return {name: getattr(self, name) for name in (*self.SAVED, *self.RUNNING)}


def is_metric_object(value: object) -> bool:
    """Whether a value is a metric that is updated, computed and reset; a collection of them is not."""
    methods = ("update", "compute", "reset")
    return all(callable(getattr(value, name, None)) for name in methods) and not hasattr(value, "items")


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Turn tensors into numbers, with one transfer for each device they are on."""
    by_device: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(name)
    read: dict[str, float] = {}
    for device, names in by_device.items():
        several = [values[name] for name in names]
        if len({value.dtype for value in several}) > 1:
            wide = torch.float32 if device.type == "mps" else torch.float64
            several = [value.to(wide) for value in several]
        read.update(zip(names, map(float, torch.stack(several).tolist()), strict=True))
    return {name: read[name] if name in read else float(value) for name, value in values.items()}


def as_number(name: str, value: Any) -> Any:
    """Return a number as it is, and a numpy scalar and its like as a number.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, (int, float)):
        return value
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "size", 1) == 1 and isinstance(number := item(), (int, float)):
        return number
    raise ValueError(
        f"self.log({name!r}, ...) takes a number, a tensor of one element or a metric object. "
        f"Received: {type(value).__name__}."
        + (" Use self.log_dict for several values." if hasattr(value, "items") else "")
    )


def not_a_scalar(name: str, value: Tensor) -> ValueError:
    """Return the error for a tensor of several elements, or of none."""
    return ValueError(
        f"self.log({name!r}, ...) takes a tensor of one element. Received: shape {tuple(value.shape)}. "
        "Reduce it first, for example with .mean()."
    )


def _kept_dtype(value: Tensor) -> torch.dtype:
    return value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32


def _buffer(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a copy that may be changed in place for as long as the run lasts, wherever log is called."""
    with torch.inference_mode(False):  # else a value logged under inference_mode could not be updated outside
        buffer = torch.empty((), dtype=dtype, device=device)
        return buffer.copy_(value) if isinstance(value, Tensor) else buffer.fill_(value)


def _neutral(reduce: str) -> float:
    return {"mean": 0.0, "sum": 0.0, "min": math.inf, "max": -math.inf}[reduce]
