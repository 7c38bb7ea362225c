"""Walking batches of any structure."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from trainkit.tree import first_tensor_path, follow, map_tensors, tensors

ONE = torch.ones(2)


def double(value: Any) -> Any:
    return value * 2 if isinstance(value, Tensor) else value


class Named(NamedTuple):
    x: Any
    label: str = "a"


@dataclass
class Item:
    x: Any
    label: str = "a"


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Any


@dataclass
class Computes:
    """Take an argument that is no field, compute a field, count how often it is made."""

    x: Tensor
    scale: InitVar[float]
    made: list[int] = field(default_factory=list)
    total: Tensor = field(init=False)
    later: Tensor = field(init=False)

    def __post_init__(self, scale: float) -> None:
        self.total = self.x.sum() * scale
        self.made.append(1)


class Sequence(list):  # type: ignore[type-arg]
    name = ""


class Moves:
    """Knows how to move itself."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: str) -> Moves:
        return Moves(device)


class MovingDict(UserDict):  # type: ignore[type-arg]
    def to(self, device: str) -> MovingDict:
        return MovingDict({**self.data, "moved": device})


# ---------------------------------------------------------------- map_tensors
@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (ONE, ONE * 2),
        ([ONE, 3], [ONE * 2, 3]),
        ((ONE, "a", None), (ONE * 2, "a", None)),
        ({"x": ONE, 3: [ONE]}, {"x": ONE * 2, 3: [ONE * 2]}),
        (Named(ONE), Named(ONE * 2)),
        (OrderedDict(b=ONE, a=1), OrderedDict(b=ONE * 2, a=1)),
        (UserDict(x=ONE), UserDict(x=ONE * 2)),
        (Item(Item(ONE)), Item(Item(ONE * 2))),
        (Frozen(ONE), Frozen(ONE * 2)),
        (3, 3),
        ("text", "text"),
        (None, None),
        ([], []),
        ({1, 2}, {1, 2}),
        (Item, Item),
        (torch.Size([2]), torch.Size([2])),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_every_container_is_rebuilt_as_what_it_was(tree: Any, expected: Any) -> None:
    mapped = map_tensors(double, tree)
    assert type(mapped) is type(expected)
    assert repr(mapped) == repr(expected)


def test_the_original_stays_as_it_was() -> None:
    batch = {"x": [ONE], "item": Item(ONE)}
    map_tensors(double, batch)
    assert batch["x"][0] is batch["item"].x is ONE  # type: ignore[index, union-attr]


def test_a_dictionary_keeps_its_kind_and_its_default() -> None:
    mapped = map_tensors(double, defaultdict(list, x=ONE))
    assert mapped["new"] == []
    assert torch.equal(mapped["x"], ONE * 2)


def test_a_list_of_ones_own_keeps_what_it_carries() -> None:
    mine = Sequence([ONE])
    mine.name = "mine"
    mapped = map_tensors(double, mine)
    assert (type(mapped), mapped.name) == (Sequence, "mine")
    assert torch.equal(mapped[0], ONE * 2)


def test_a_mapping_that_can_not_change_becomes_a_dict() -> None:
    mapped = map_tensors(double, MappingProxyType({"x": ONE}))
    assert torch.equal(mapped["x"], ONE * 2)


def test_a_dataclass_is_copied_and_not_made_again() -> None:
    item = Computes(ONE, 10.0)
    mapped = map_tensors(double, item)
    assert torch.equal(mapped.x, ONE * 2)
    assert mapped.total == 40.0
    assert item.total == 20.0
    assert item.made == mapped.made == [1]
    assert not hasattr(mapped, "later")


def test_things_that_move_themselves_are_handed_over_whole() -> None:
    def move(value: Any) -> Any:
        return value.to("meta")

    mapped = map_tensors(move, [Moves(), MovingDict(a=1), ONE])
    assert mapped[0].device == "meta"
    assert mapped[1] == {"a": 1, "moved": "meta"}
    assert mapped[2].is_meta


def test_modules_and_classes_stay_where_they_are() -> None:
    module = nn.Linear(1, 1)
    assert map_tensors(lambda value: value.to("meta"), [module, Moves]) == [module, Moves]
    assert not module.weight.is_meta


def test_a_packed_sequence_moves_as_a_whole() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(1)])
    mapped = map_tensors(lambda value: value.to("meta"), (packed,))[0]
    assert isinstance(mapped, PackedSequence)
    assert mapped.data.is_meta
    assert not mapped.batch_sizes.is_meta  # they stay on the host: PackedSequence insists


# ---------------------------------------------------------------- tensors
def test_tensors_come_with_the_expression_that_reaches_them() -> None:
    packed = pack_sequence([ONE])
    batch = {"x": [ONE, (ONE, "a")], 3: Item(Named(ONE)), "packed": packed, "text": "abc", "number": 1.0}
    places = dict(tensors(batch))
    assert list(places) == [
        "batch['x'][0]", "batch['x'][1][0]", "batch[3].x[0]", "batch['packed'].data",
    ]  # fmt: skip
    for place, tensor in places.items():
        assert eval(place, {"batch": batch}) is tensor


# ---------------------------------------------------------------- the way to the first tensor
@pytest.mark.parametrize(
    ("tree", "path"),
    [
        (ONE, ()),
        ([ONE], (0,)),
        ({"a": 1, "b": (None, ONE)}, ("b", 1)),
        ({"weight": torch.tensor(1.0), "x": ONE}, ("x",)),
        (Item(Named(ONE)), (("attribute", "x"), 0)),
        (torch.tensor(1.0), None),
        (["a", "b"], None),
        ("text", None),
        ({}, None),
        (None, None),
        (3, None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_the_first_tensor_with_a_dimension_is_found(tree: Any, path: Any) -> None:
    assert first_tensor_path(tree) == path
    if path is not None:
        assert follow(tree, path) is ONE


TREES = st.recursive(
    st.sampled_from([ONE, torch.tensor(1.0), "a", 1, None]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        inner.map(Item),
        inner.map(Named),
    ),
    max_leaves=8,
)


@given(TREES)
def test_any_tree_is_walked_alike_by_all(tree: Any) -> None:
    found = [tensor for _, tensor in tensors(tree)]
    mapped = [tensor for _, tensor in tensors(map_tensors(double, tree))]
    assert [float(t.sum()) * 2 for t in found] == [float(t.sum()) for t in mapped]
    path = first_tensor_path(tree)
    with_dimensions = [tensor for tensor in found if tensor.ndim]
    assert (path is None) == (not with_dimensions)
    if path is not None:
        assert follow(tree, path) is with_dimensions[0]
