"""Nested data on a device, and off its graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainkit.moving import move_data_to_device, recursive_detach, tensors_on_device


@dataclass
class Pair:
    x: Any
    name: str


class Movable:
    """What is not a tensor and moves itself, forgetting to return itself."""

    device: Any = None

    def to(self, device: torch.device) -> None:
        self.device = device


def test_everything_that_can_be_moved_is_moved() -> None:
    movable = Movable()
    data = {"a": [torch.ones(2), (torch.zeros(1), "b", None)], "pair": Pair(torch.ones(3), "c"), "m": movable}
    moved = move_data_to_device(data, "meta")
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == moved["pair"].x.device.type == "meta"
    assert (moved["a"][1][1:], moved["pair"].name) == (("b", None), "c")
    assert moved["m"] is movable
    assert movable.device == torch.device("meta")
    assert data["a"][0].device.type == "cpu"  # the data themselves stay where they are


def test_detached_data_keep_their_values_and_containers() -> None:
    weight = torch.ones(2, requires_grad=True)
    detached = recursive_detach({"loss": weight * 2, "more": [weight.sum(), 3]}, to_cpu=True)
    assert not detached["loss"].requires_grad
    assert torch.equal(detached["loss"], torch.full((2,), 2.0))
    assert (detached["more"][0].requires_grad, detached["more"][1]) == (False, 3)


def test_numbers_become_tensors_in_their_containers() -> None:
    data = {"a": [1, 2.5, True], "b": (torch.ones(2), np.zeros(3)), "c": "text", "d": None}
    found = tensors_on_device(data, "cpu")
    assert [value.dtype for value in found["a"]] == [torch.int64, torch.float32, torch.uint8]
    assert [value.item() for value in found["a"]] == [1, 2.5, 1]
    assert found["b"][0] is data["b"][0]
    assert torch.equal(found["b"][1], torch.zeros(3, dtype=torch.float64))
    assert (found["c"], found["d"], type(found["b"])) == ("text", None, tuple)
