from __future__ import annotations

from typing import Any

import pytest
import torch

from trainkit.throughput import Throughput, measure_flops


def test_totals_are_there_at_once_and_rates_when_the_window_is_full() -> None:
    throughput = Throughput(window_size=3)
    assert throughput.compute() == {}
    throughput.update(time=2.0, batches=1, samples=4, lengths=40)
    throughput.update(time=2.5, batches=2, samples=8, lengths=80)
    assert throughput.compute() == {"time": 2.5, "batches": 2, "samples": 8, "lengths": 80}
    throughput.update(time=3.0, batches=4, samples=10, lengths=90)
    assert throughput.compute() == {
        "time": 3.0, "batches": 4, "samples": 10, "lengths": 90,
        "device/batches_per_sec": 3.0, "device/samples_per_sec": 6.0, "device/items_per_sec": 50.0,
    }  # fmt: skip
    throughput.update(time=4.0, batches=5, samples=14, lengths=110)  # the first one leaves the window
    assert throughput.compute()["device/samples_per_sec"] == 4.0
    throughput.reset()
    assert throughput.compute() == {}


def test_operations_are_those_since_the_first_measurement_and_mfu_is_their_share() -> None:
    throughput = Throughput(available_flops=1000, window_size=2)
    throughput.update(time=1.0, batches=1, samples=1, flops=99)
    throughput.update(time=3.0, batches=2, samples=2, flops=500)
    metrics = throughput.compute()
    assert (metrics["device/flops_per_sec"], metrics["device/mfu"]) == (250.0, 0.25)


def test_several_devices_have_totals_beside_the_rates_of_one() -> None:
    throughput = Throughput(available_flops=100, world_size=4, window_size=2, separator="|")
    for step in (1, 2):
        throughput.update(time=float(step), batches=step, samples=2 * step, lengths=6 * step, flops=10)
    assert throughput.compute() == {
        "time": 2.0, "batches": 2, "samples": 4, "lengths": 12,
        "device|batches_per_sec": 1.0, "device|samples_per_sec": 2.0, "device|items_per_sec": 6.0,
        "device|flops_per_sec": 10.0, "device|mfu": 0.1,
        "batches_per_sec": 4.0, "samples_per_sec": 8.0, "items_per_sec": 24.0, "flops_per_sec": 40.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"time": 1.0, "batches": 2, "samples": 2}, "time is a total and must grow"),
        ({"time": 2.0, "batches": 1, "samples": 2}, "batches is a total"),
        ({"time": 2.0, "batches": 2, "samples": 1}, "fewer samples"),
        ({"time": 2.0, "batches": 2, "samples": 3, "lengths": 2}, "fewer items"),
    ],
)
def test_totals_that_make_no_sense_are_errors_and_change_nothing(update: Any, message: str) -> None:
    throughput = Throughput(window_size=2)
    throughput.update(time=1.0, batches=1, samples=1)
    with pytest.raises(ValueError, match=message):
        throughput.update(**update)
    assert throughput.compute() == {"time": 1.0, "batches": 1, "samples": 1}


def test_lengths_now_and_then_are_an_error() -> None:
    throughput = Throughput()
    throughput.update(time=1.0, batches=1, samples=1)
    with pytest.raises(RuntimeError, match="in each update"):
        throughput.update(time=2.0, batches=2, samples=2, lengths=2)


@pytest.mark.parametrize("arguments", [{"window_size": 1}, {"world_size": 0}])
def test_a_window_of_one_and_no_device_are_errors(arguments: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Throughput(**arguments)


def test_flops_are_measured_with_and_without_the_backward_pass() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
        batch = torch.randn(2, 16)
    forward = 2 * 2 * (16 * 8 + 8 * 4)
    assert measure_flops(model, lambda: model(batch)) == forward
    inputs_need_none = 2 * 2 * 16 * 8  # no gradient flows into the batch
    assert measure_flops(model, lambda: model(batch), torch.Tensor.sum) == 3 * forward - inputs_need_none
