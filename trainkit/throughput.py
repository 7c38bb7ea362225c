"""Throughput: how much work a run does in a second, over a window of its latest measurements."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Throughput:
    """Turn running totals of time, batches, samples and items into rates over the last measurements.

    A rate is the difference between the newest and the oldest measurement of the window, over the time between them,
    and is there once the window is full. On a device that works asynchronously, synchronize before the clock is read.

    Args:
        available_flops: floating-point operations one device could do in a second, for the share that is used (model
            FLOPs utilization, Chowdhery et al., PaLM, 2022); see `get_available_flops`.
        world_size: how many devices work on it. With more than one there are totals beside the rates per device.
        window_size: how many measurements a rate is taken over, at least 2.
        separator: stands between "device" and a rate's name.

    Raises:
        ValueError: `world_size` is below 1 or `window_size` below 2.

    Example:
        >>> throughput = Throughput(window_size=2)
        >>> for step in (1, 2):
        ...     throughput.update(time=0.5 * step, batches=step, samples=8 * step)
        >>> throughput.compute()["device/samples_per_sec"]
        16.0
    """

    def __init__(
        self, available_flops: float | None = None, world_size: int = 1, window_size: int = 100, separator: str = "/"
    ) -> None:
        for name, value, least in (("world_size", world_size, 1), ("window_size", window_size, 2)):
            if value < least:
                raise ValueError(f"Throughput({name}=...) must be {least} or more. Received: {value!r}.")
        self.available_flops = available_flops
        self.world_size = world_size
        self.window_size = window_size
        self.separator = separator
        self.reset()

    def reset(self) -> None:
        """Forget all measurements."""
        self._totals: dict[str, deque[float]] = {
            name: deque(maxlen=self.window_size) for name in ("time", "batches", "samples", "lengths")
        }
        self._flops: deque[int] = deque(maxlen=self.window_size)

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None
    ) -> None:
        """Take a measurement.

        Args:
            time: seconds since the start.
            batches: batches since the start, on this device.
            samples: samples since the start, on this device.
            lengths: items in these samples, for example tokens.
            flops: floating-point operations since the last measurement, on this device.

        Raises:
            ValueError: a total did not grow, or there are fewer samples than batches or fewer items than samples.
            RuntimeError: `lengths` was left out of an earlier measurement of the window.
        """
        if samples < batches:
            raise ValueError(f"there can't be fewer samples ({samples}) than batches ({batches}).")
        if lengths is not None and lengths < samples:
            raise ValueError(f"there can't be fewer items ({lengths}, the lengths) than samples ({samples}).")
        for name, value in (("time", time), ("batches", batches), ("samples", samples), ("lengths", lengths)):
            if value is None:
                continue
            total = self._totals[name]
            if total and value <= total[-1]:
                raise ValueError(f"{name} is a total and must grow. Received: {value} after {total[-1]}.")
        for name, value in (("time", time), ("batches", batches), ("samples", samples), ("lengths", lengths)):
            if value is not None:
                self._totals[name].append(value)
        if lengths is not None and len(self._totals["lengths"]) != len(self._totals["samples"]):
            raise RuntimeError("lengths must be given in each update, or in none.")
        if flops is not None:
            self._flops.append(flops)

    def compute(self) -> dict[str, float]:
        """Return the totals and, once the window is full, the rates; nothing before the first measurement.

        "time", "batches", "samples" and "lengths" are totals. "device/batches_per_sec", "device/samples_per_sec",
        "device/items_per_sec" and "device/flops_per_sec" are rates of one device, "device/mfu" is the share of
        `available_flops`. With several devices, the names without "device/" are the rates of all.
        """
        metrics: dict[str, float] = {name: total[-1] for name, total in self._totals.items() if total}
        times = self._totals["time"]
        if len(times) < self.window_size:
            return metrics
        seconds = times[-1] - times[0]
        rates = {}
        for total, rate in (("batches", "batches"), ("samples", "samples"), ("lengths", "items")):
            values = self._totals[total]
            if len(values) == self.window_size:
                rates[f"{rate}_per_sec"] = (values[-1] - values[0]) / seconds
        if len(self._flops) == self.window_size:  # those of the first measurement were before its time
            rates["flops_per_sec"] = (sum(self._flops) - self._flops[0]) / seconds
        if self.world_size > 1:
            metrics |= {name: value * self.world_size for name, value in rates.items()}
        if self.available_flops and "flops_per_sec" in rates:
            rates["mfu"] = rates["flops_per_sec"] / self.available_flops
        return metrics | {f"device{self.separator}{name}": value for name, value in rates.items()}


def measure_flops(
    model: torch.nn.Module, forward_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor] | None = None
) -> int:
    """Return the floating-point operations of a forward pass, and of the backward pass if there is a loss.

    A multiplication with an addition counts as two. On the "meta" device nothing is computed, so that it takes no time
    and no memory.

    Args:
        model: whose operations they are; the calls below are what is measured.
        forward_fn: calls the model and returns what it gives.
        loss_fn: turns that into a loss.

    Example:
        >>> with torch.device("meta"):
        ...     model, batch = torch.nn.Linear(16, 4), torch.randn(8, 16)
        >>> measure_flops(model, lambda: model(batch))
        1024
        >>> measure_flops(model, lambda: model(batch), torch.Tensor.sum)
        2048
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())
