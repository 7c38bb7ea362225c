"""Which device the Trainer's arguments mean, on the machine that runs the tests and on imagined ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainkit import Trainer
from trainkit.devices import ACCELERATORS, available, resolve


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to be on a machine with so many cuda devices, and perhaps mps."""

    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "arguments", "devices"),
    [
        (0, False, {}, "cpu"),
        (2, False, {}, "cuda:0 cuda:1"),
        (0, True, {}, "mps"),
        (1, True, {}, "cuda:0"),
        (2, True, {"accelerator": "cpu"}, "cpu"),
        (2, False, {"accelerator": "gpu"}, "cuda:0 cuda:1"),
        (2, False, {"accelerator": "cuda"}, "cuda:0 cuda:1"),
        (0, True, {"accelerator": "gpu"}, "mps"),
        (0, True, {"accelerator": "mps"}, "mps"),
        (2, False, {"gpus": 1}, "cuda:0"),
        (0, True, {"gpus": 1}, "mps"),
        (2, False, {"gpus": 1, "accelerator": "cuda"}, "cuda:0"),
        (0, False, {"devices": 1}, "cpu"),
        (0, False, {"devices": "1"}, "cpu"),
        (0, False, {"devices": -1}, "cpu"),
        (0, False, {"devices": "-1"}, "cpu"),
        (0, False, {"devices": "auto", "accelerator": "cpu"}, "cpu"),
        (2, False, {"devices": 1}, "cuda:0"),
        (1, False, {"devices": -1}, "cuda:0"),
        (2, False, {"devices": [1]}, "cuda:1"),
        (2, False, {"devices": (1,)}, "cuda:1"),
        (2, False, {"devices": "1,"}, "cuda:1"),
        (2, False, {"devices": [0]}, "cuda:0"),
        (2, False, {"devices": 2}, "cuda:0 cuda:1"),
        (2, False, {"devices": -1}, "cuda:0 cuda:1"),
        (4, False, {"devices": [3, 1]}, "cuda:3 cuda:1"),
        (2, False, {"gpus": 2}, "cuda:0 cuda:1"),
        (0, False, {"devices": 3}, "cpu cpu cpu"),
        (2, False, {"devices": "2", "accelerator": "cpu"}, "cpu cpu"),
    ],
)
def test_the_arguments_mean_devices(
    machine: Any, cuda: int, mps: bool, arguments: dict[str, Any], devices: str
) -> None:
    machine(cuda, mps)
    assert resolve(**arguments) == [torch.device(device) for device in devices.split()]


@pytest.mark.parametrize(
    "arguments", [{"accelerator": "cuda"}, {"accelerator": "mps"}, {"accelerator": "gpu"}, {"gpus": 1}]
)
def test_an_accelerator_that_is_not_there_is_an_error_that_says_what_is(machine: Any, arguments: Any) -> None:
    machine()
    with pytest.raises(ValueError, match=r"is not there: this machine has the cpu\. Use accelerator='auto' or .*'cpu'"):
        Trainer(logger=False, **arguments)
    machine(cuda=2)
    with pytest.raises(
        ValueError, match=r"accelerator='mps' is not there: this machine has the cpu and 2 cuda devices"
    ):
        resolve("mps")
    machine(mps=True)
    with pytest.raises(ValueError, match=r"accelerator='cuda' is not there.*the cpu and 1 mps device"):
        resolve("cuda")


@pytest.mark.parametrize("cuda", [0, 2])
@pytest.mark.parametrize(
    ("devices", "error", "message"),
    [
        (0, ValueError, "at least 1, or -1 for all. Received: 0"),
        ("0", ValueError, "at least 1, or -1 for all. Received: '0'"),
        (-2, ValueError, "Received: -2"),
        (10**15, ValueError, r"devices=1000000000000000 (is more than there are|asks for)"),
        ([], ValueError, r"devices=\[\] names no device"),
        ("", ValueError, "devices must be 'auto', a number or a list of indices"),
        (",", ValueError, "devices must be 'auto'"),
        ("two", ValueError, "Received: 'two'"),
        ("1.5", ValueError, "Received: '1.5'"),
        (1.5, TypeError, "devices must be 'auto', a number or a list of indices. Received: 1.5"),
        (True, TypeError, "Received: True"),
        (None, TypeError, "Received: None"),
        (float("nan"), TypeError, "Received: nan"),
        ({"devices": 1}, TypeError, "Received: {'devices': 1}"),
    ],
)
def test_devices_that_can_not_be_are_refused(machine: Any, cuda: int, devices: Any, error: type, message: str) -> None:
    machine(cuda)
    with pytest.raises(error, match=message):
        Trainer(logger=False, devices=devices)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (3, "devices=3 is more than there are: this machine has the cpu and 2 cuda devices"),
        ([0, 0], "names a device twice"),
        ([2], r"devices=\[2\] is not there: this machine has the cpu and 2 cuda devices"),
        ([-1], r"devices=\[-1\] is not there"),
        ("5,", "devices='5,' is not there"),
    ],
)
def test_gpus_that_are_not_there_or_too_many_are_refused(machine: Any, devices: Any, message: str) -> None:
    machine(cuda=2)
    with pytest.raises(ValueError, match=message):
        resolve("gpu", devices)


@pytest.mark.parametrize("devices", [[True], ["0"], [0.0], [None]])
def test_indices_are_whole_numbers(machine: Any, devices: Any) -> None:
    machine(cuda=2)
    with pytest.raises(TypeError, match="devices must be a list of whole numbers"):
        resolve("cuda", devices)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("0,1", "devices='0,1': a list names accelerators, the cpu has no indices. Give devices=2"),
        ([0], r"devices=\[0\]: a list names accelerators, the cpu has no indices. Give devices=1"),
    ],
)
def test_the_cpu_has_no_indices(machine: Any, devices: Any, message: str) -> None:
    machine()
    with pytest.raises(ValueError, match=message):
        resolve("cpu", devices)


@pytest.mark.parametrize("accelerator", ["tpu", "CPU", "", None, 0, ["cpu"], "cuda:0"])
def test_an_unknown_accelerator_is_refused_with_the_known_ones(accelerator: Any) -> None:
    with pytest.raises(ValueError, match="accelerator must be one of 'auto', 'cpu', 'gpu', 'cuda', 'mps'"):
        Trainer(logger=False, accelerator=accelerator)


@pytest.mark.parametrize("gpus", [0, -1, 1.0, "1", True, [0], float("nan")])
def test_gpus_is_a_number_of_them(gpus: Any) -> None:
    with pytest.raises(ValueError, match="gpus must be a whole number of at least 1"):
        Trainer(logger=False, gpus=gpus)


@pytest.mark.parametrize("beside", [{"accelerator": "cpu"}, {"devices": 1}, {"accelerator": "tpu"}])
def test_gpus_and_what_it_is_short_for_are_not_given_both(machine: Any, beside: Any) -> None:
    machine(cuda=1)
    with pytest.raises(ValueError, match="gpus=1 is short for accelerator='gpu', devices=1"):
        resolve(gpus=1, **beside)


def test_the_machine_that_runs_this_test_has_a_cpu() -> None:
    assert available().startswith("the cpu")
    assert Trainer(accelerator="cpu", logger=False).device == torch.device("cpu")
    assert {device.type for device in resolve()} <= set(ACCELERATORS)


@pytest.mark.gpu
def test_a_gpu_is_taken_by_itself_and_by_each_name() -> None:
    for arguments in (
        {},
        {"accelerator": "gpu"},
        {"accelerator": "cuda", "devices": 1},
        {"gpus": 1},
        {"devices": "0,"},
    ):
        assert resolve(**arguments)[0] == torch.device("cuda", 0)  # type: ignore[arg-type]
