"""A copy of a state in memory that is used again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainkit.checkpoint.format import check_plain
from trainkit.checkpoint.snapshot import Snapshot


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 30))
    module[1].weight = nn.Parameter(module[0].weight.detach().t())  # another look at the same numbers
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.rand(4, 30)).sum().backward()
    optimizer.step()
    return module, optimizer


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return check_plain({"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()], "text": "x"})  # type: ignore[no-any-return]


def test_training_on_does_not_change_the_copy() -> None:
    module, optimizer = trained()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    copy = Snapshot().take(state_of(module, optimizer))
    optimizer.step()
    assert not torch.equal(module.state_dict()["0.weight"], before["0.weight"])
    assert all(torch.equal(copy["state_dict"][name], tensor) for name, tensor in before.items())
    assert type(copy["state_dict"]) is OrderedDict
    assert copy["state_dict"]._metadata == module.state_dict()._metadata


def test_the_second_copy_is_in_the_memory_of_the_first() -> None:
    module, optimizer = trained()
    snapshot = Snapshot()
    first = snapshot.take(state_of(module, optimizer))
    places = [tensor.data_ptr() for tensor in first["state_dict"].values()]
    optimizer.step()
    second = snapshot.take(state_of(module, optimizer))
    assert [tensor.data_ptr() for tensor in second["state_dict"].values()] == places
    assert torch.equal(second["state_dict"]["0.weight"], module.state_dict()["0.weight"])


def test_each_byte_is_copied_once_and_tied_weights_stay_tied() -> None:
    module, optimizer = trained()
    snapshot = Snapshot()
    copy = snapshot.take(state_of(module, optimizer))["state_dict"]
    moments = sum(2 * p.numel() + 1 for p in optimizer.state)
    weights = 30 * 20 + 20 + 30  # one of the two weights
    assert snapshot.copied == 4 * (weights + moments)
    assert copy["0.weight"].untyped_storage().data_ptr() == copy["1.weight"].untyped_storage().data_ptr()
    assert copy["1.weight"].stride() == module[1].weight.stride()


def test_memory_that_is_of_no_use_any_more_is_given_back() -> None:
    snapshot = Snapshot()
    for size in (1000, 10, 10):
        snapshot.take({"w": torch.ones(size)})
    assert sum(len(buffers) for held in (snapshot._free, snapshot._used) for buffers in held.values()) == 1


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0), torch.tensor(3), torch.ones(1).expand(5), torch.arange(12).reshape(3, 4).t()[1:],
        torch.eye(3).to_sparse(), torch.tensor([1 + 2j]).conj(), torch.tensor([True]), torch.ones(3).bfloat16(),
    ],
)  # fmt: skip
def test_every_kind_of_tensor_comes_out_as_it_went_in(value: torch.Tensor) -> None:
    copy = Snapshot().take({"a": [value, (value, 3)]})
    found = copy["a"][0]
    assert (found.dtype, found.shape, found.layout) == (value.dtype, value.shape, value.layout)
    assert torch.equal(found.to_dense(), value.to_dense())
    assert found.data_ptr() != value.data_ptr() if value.layout == torch.strided and value.numel() else True
    assert copy["a"][1][1] == 3


def test_numbers_and_strings_are_shared_and_the_lists_around_them_are_not() -> None:
    text, numbers = "a long text" * 10, [1, 2]
    copy = Snapshot().take({"text": text, "numbers": numbers})
    numbers.append(3)
    assert copy["text"] is text
    assert copy["numbers"] == [1, 2]


@pytest.mark.gpu
def test_a_copy_from_a_device_holds_what_was_there_when_it_was_asked_for() -> None:
    snapshot = Snapshot()
    weight = torch.zeros(20_000_000, device="cuda")
    for number in range(5):
        weight.fill_(number)
        copy = snapshot.take({"w": weight})
        weight.fill_(-1)
        snapshot.wait()
        assert copy["w"].is_pinned()
        assert bool((copy["w"] == number).all())


def test_arrays_and_bytes_that_training_changes_in_place_are_copied() -> None:
    state = {"array": np.arange(3), "number": np.float32(0.5), "bytes": bytearray(b"abc"), "set": {1}}
    copy = Snapshot().take(check_plain(state))
    state["array"][0] = 7
    state["bytes"][0] = 0
    assert copy["array"].tolist() == [0, 1, 2]
    assert (copy["number"], type(copy["number"])) == (np.float32(0.5), np.float32)
    assert (copy["bytes"], copy["set"]) == (bytearray(b"abc"), {1})
