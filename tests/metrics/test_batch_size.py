"""The weight of a batch in an epoch's mean."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from trainkit.errors import MisconfigurationException
from trainkit.metrics.batch_size import BatchSize

THREE = torch.zeros(3, 2)


@dataclass
class Item:
    name: str
    x: Tensor


class Walked:
    """Something that can only be iterated over."""

    def __iter__(self) -> Any:
        return iter([1, THREE])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (THREE, 3),
        ((THREE, torch.zeros(3)), 3),
        ({"label": ["a"], "inner": [{"x": THREE}]}, 3),
        ([torch.tensor(1.0), THREE], 3),
        (Item("a", THREE), 3),
        (Walked(), 3),
        (torch.tensor(1.0), 1),
        (torch.nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(1)]), 3),
    ],
)
@pytest.mark.filterwarnings("ignore:the batch's tensors differ")
def test_it_is_the_first_dimension_of_the_first_tensor_that_has_one(batch: Any, size: int) -> None:
    sizes = BatchSize()
    assert [sizes.of(batch), sizes.of(batch)] == [size, size]


def test_batches_may_change_their_structure() -> None:
    sizes = BatchSize()
    assert [sizes.of(batch) for batch in (THREE, [torch.zeros(2)], {"a": torch.zeros(1)}, Walked(), THREE)] == [
        3, 2, 1, 3, 3,
    ]  # fmt: skip


def test_tensors_of_different_sizes_are_doubted_once() -> None:
    sizes = BatchSize()
    batch = [torch.zeros(2), torch.zeros(5)]
    with pytest.warns(UserWarning, match=r"differ in their first dimension; 2, .*batch_size=\.\.\."):
        assert sizes.of(batch) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sizes.of([*batch, 1]) == sizes.of({"x": batch}) == 2


@pytest.mark.parametrize("batch", [["a", "b"], {}, 3, "text"])
def test_a_batch_without_tensors_is_refused(batch: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"a {type(batch).__name__}. Give it: self.log"):
        BatchSize().of(batch)


def test_later_batches_are_not_walked() -> None:
    class Notes(dict[str, Any]):
        def items(self) -> Any:
            walks.append(1)
            return super().items()

    walks: list[int] = []
    sizes = BatchSize()
    for _ in range(5):
        assert sizes.of(Notes(x=THREE, y=THREE)) == 3
    assert len(walks) == 1
