"""Walk the tensors of nested batches: tuples, named tuples, lists, dicts, dataclasses, and things with a `.to`."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def map_tensors(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with the function applied to every tensor, and to every other object that has a `.to`.

    Containers are copied, with their type and whatever else they carry; anything else (numbers, strings, None) is
    passed on as it is.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, (type, Mapping)):
        copied = copy.copy(tree)  # not dataclasses.replace, which would run __init__ and __post_init__ again
        for field in dataclasses.fields(tree):
            if hasattr(tree, field.name):
                object.__setattr__(copied, field.name, map_tensors(function, getattr(tree, field.name)))
        return copied
    if hasattr(tree, "to") and not isinstance(tree, (type, torch.nn.Module)):
        return function(tree)  # PackedSequence, transformers' BatchEncoding and their like move themselves
    if isinstance(tree, tuple):
        values = [map_tensors(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if isinstance(tree, list):
        items = copy.copy(tree)
        items[:] = [map_tensors(function, value) for value in tree]
        return items
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in tree.items()}
        if not isinstance(tree, MutableMapping):
            return mapped
        mapping = copy.copy(tree)
        for key, value in mapped.items():
            mapping[key] = value
        return mapping
    return tree


def children(tree: Any) -> list[Any] | None:
    """Return what a plain container holds; None for everything else, subclasses of containers included."""
    kind = type(tree)
    if kind in (dict, OrderedDict, defaultdict):
        return list(tree.values())
    if kind in (list, tuple, deque) or (isinstance(tree, tuple) and hasattr(tree, "_fields")):
        return list(tree)
    return None


def leaves(tree: Any, is_leaf: Callable[[Any], bool]) -> list[Any]:
    """Return what nested plain containers hold, in order; `is_leaf` stops early, at a container of numbers say."""
    held = None if is_leaf(tree) else children(tree)
    return [tree] if held is None else [leaf for child in held for leaf in leaves(child, is_leaf)]


def with_leaves(tree: Any, is_leaf: Callable[[Any], bool], values: Iterable[Any]) -> Any:
    """Return nested containers like these ones, with other leaves."""
    return _rebuilt(tree, is_leaf, iter(values))


def _rebuilt(node: Any, is_leaf: Callable[[Any], bool], left: Iterator[Any]) -> Any:
    held = None if is_leaf(node) else children(node)
    if held is None:
        return next(left)
    items = [_rebuilt(child, is_leaf, left) for child in held]
    if isinstance(node, dict):
        filled = copy.copy(node)  # keeps a defaultdict's factory
        filled.update(zip(node, items, strict=True))
        return filled
    return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)


def tensors(tree: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with where it is, written as the expression that reaches it."""
    if isinstance(tree, PackedSequence):  # its batch_sizes are on the host wherever its data are
        yield f"{path}.data", tree.data
    elif isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{path}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            yield from tensors(value, f"{path}[{index}]")
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors(getattr(tree, field.name), f"{path}.{field.name}")


def first_tensor_path(tree: Any) -> tuple[Any, ...] | None:
    """Return the keys that lead to the first tensor with at least one dimension, or None.

    A key is an index, a mapping's key, or `("attribute", name)` for a dataclass field.
    """
    if isinstance(tree, Tensor):
        return () if tree.ndim else None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        pairs = list(tree.items())
    elif isinstance(tree, (tuple, list)):
        pairs = list(enumerate(tree))
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        pairs = [(("attribute", f.name), getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    for key, value in pairs:
        rest = first_tensor_path(value)
        if rest is not None:
            return (key, *rest)
    return None


def follow(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return what a path of `first_tensor_path` leads to in a tree of the same structure."""
    for key in path:
        tree = (
            getattr(tree, key[1]) if isinstance(key, tuple) and len(key) == 2 and key[0] == "attribute" else tree[key]
        )
    return tree
