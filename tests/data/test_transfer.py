"""How batches come to the device, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from trainkit import DataModule, Module
from trainkit.data.transfer import check_device, transfer_of
from trainkit.errors import MisconfigurationException
from trainkit.strategies import Strategy

CPU, META = torch.device("cpu"), torch.device("meta")


def noting(base: type, *hooks: str) -> Any:
    """Return a module or data module that notes which transfer hooks were called with what."""
    trace: list[Any] = []

    def hook(name: str) -> Any:
        def note(self: Any, batch: Any, *arguments: Any) -> Any:
            trace.append((name, *arguments))
            return [*batch, name]

        return note

    made = type(base.__name__, (base,), {name: hook(name) for name in hooks})()
    made.__dict__["trace"] = trace
    return made


BEFORE, MOVE, AFTER = "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"


def test_on_the_host_without_hooks_there_is_nothing_to_do() -> None:
    assert transfer_of(Strategy("cpu"), Module(), None) is None
    assert transfer_of(Strategy("cpu"), Module(), DataModule()) is None


def test_elsewhere_everything_in_the_batch_is_moved() -> None:
    transfer = transfer_of(Strategy(META), Module(), None)
    assert transfer is not None
    batch = {"x": [torch.ones(2)], "packed": pack_sequence([torch.ones(2)]), "name": "a"}
    moved = transfer(batch, 0)
    assert moved["x"][0].is_meta
    assert moved["packed"].data.is_meta
    assert moved["name"] == "a"
    assert not batch["x"][0].is_meta  # type: ignore[union-attr]


@pytest.mark.parametrize("device", [CPU, META])
def test_the_modules_hooks_are_called_in_order_with_the_loaders_index(device: torch.device) -> None:
    module = noting(Module, BEFORE, MOVE, AFTER)
    transfer = transfer_of(Strategy(device), module, DataModule())
    assert transfer is not None
    assert transfer([], 3) == [BEFORE, MOVE, AFTER]
    assert module.trace == [(BEFORE, 3), (MOVE, device, 3), (AFTER, 3)]


def test_the_data_modules_hooks_win_one_by_one() -> None:
    module, data = noting(Module, BEFORE, AFTER), noting(DataModule, AFTER)
    with pytest.warns(UserWarning, match="both have on_after_batch_transfer: the DataModule's is called"):
        transfer = transfer_of(Strategy(CPU), module, data)
    assert transfer is not None
    assert transfer([], 0) == [BEFORE, AFTER]
    assert (module.trace, data.trace) == ([(BEFORE, 0)], [(AFTER, 0)])


@pytest.mark.parametrize("hook", [BEFORE, AFTER])
def test_one_hook_alone_does_not_keep_the_batch_from_being_moved(hook: str) -> None:
    module = noting(Module, hook)
    transfer = transfer_of(Strategy(META), module, None)
    assert transfer is not None
    moved = transfer([torch.ones(1)], 0)
    assert moved[0].is_meta
    assert moved[1] == hook


# ---------------------------------------------------------------- the check of the first batch
@pytest.mark.parametrize(
    ("batch", "device"),
    [
        (torch.ones(1), CPU),
        ([torch.ones(1), {"x": torch.ones(1)}], CPU),
        (["no tensor", 3], META),
        ([torch.ones(1, device=META)], META),
        ([torch.ones(1, device=META), torch.ones(1)], META),  # lengths may stay on the host
        ([torch.ones(1, device=META), pack_sequence([torch.ones(1)]).to("cpu")], META),
        (pack_sequence([torch.ones(1)]).to(META), META),
        (None, META),
    ],
    ids=range(8),
)
def test_a_batch_that_is_there_is_taken(batch: Any, device: torch.device) -> None:
    check_device(batch, device)


@pytest.mark.parametrize(
    ("batch", "device", "message"),
    [
        (
            [torch.ones(1, device=META)],
            CPU,
            r"batch\[0\] is on meta, the module on cpu\. Let the data set give tensors",
        ),
        ({"x": (torch.ones(1), torch.ones(1, device=META))}, CPU, r"batch\['x'\]\[1\] is on meta, the module on cpu"),
        ({"x": torch.ones(1)}, META, r"batch\['x'\] is on cpu, the module on meta.*fix transfer_batch_to_device"),
        (pack_sequence([torch.ones(1)]), META, r"batch\.data is on cpu"),
    ],
    ids=range(4),
)
def test_a_batch_that_is_elsewhere_is_refused_with_the_first_such_tensor(
    batch: Any, device: torch.device, message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        check_device(batch, device)


@pytest.mark.gpu
def test_a_batch_comes_to_the_gpu_and_a_forgotten_one_is_refused() -> None:
    device = torch.device("cuda", 0)
    transfer = transfer_of(Strategy(device), nn.Module(), None)  # type: ignore[arg-type]
    assert transfer is not None
    check_device(transfer([torch.ones(1).pin_memory()], 0), device)
    with pytest.raises(MisconfigurationException, match="is on cpu, the module on cuda:0"):
        check_device([torch.ones(1)], device)
