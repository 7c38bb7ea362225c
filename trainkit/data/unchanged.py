"""Whether a data set is still as it was: what its workers have is a copy, made when they started.

torch starts new workers for each epoch unless it is told to keep them, so that they see what the main process has
changed meanwhile: `dataset.epoch = 3`, `samples.append(...)`, a tensor written to. Workers that are kept must not miss
that. A `Snapshot` notes all that a data set is made of, and says later whether it is the same: the very objects, lists
and dicts with the same entries, tensors of the same version, arrays with the same bytes. What can't be seen into (a
random generator, an open file, an object of a C library) or would take too long to look at makes it say that it does
not know.

Global variables that its functions name are looked at, too, but not far into: a function that they call may name more.
Not looked at are files.
"""

from __future__ import annotations

import dis
import enum
import hashlib
import itertools
import pathlib
import re
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from typing import Any

import torch

MOST_THINGS = 20_000
"""So many containers and objects are looked at: ten to twenty milliseconds."""
MOST_BYTES = 2**24
"""So many bytes of arrays."""
FIXED: tuple[Any, ...] = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, type(...), type(NotImplemented),
    types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.GetSetDescriptorType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.MemberDescriptorType, types.GenericAlias, weakref.ref, re.Pattern, enum.Enum,
    pathlib.PurePath, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip
"""What does not change; or, as a class, is looked at elsewhere."""
NUMBERS = ("datetime", "decimal", "fractions", "uuid", "zoneinfo")
"""Modules whose objects don't change either, and need not be imported for it."""
PLAIN = type("Plain", (), {}).__basicsize__
"""How large an object is whose class was written in Python, besides its slots."""

LIBRARIES = ("torch.", "builtins", "typing", "abc", "collections")
"""Whose classes nobody changes."""
HEAP = 1 << 9
"""What a class that was made by Python code has among its `__flags__`, and few of the others."""


class Unknown(Exception):
    """Something that can't be seen into."""


class Snapshot:
    """What things are made of now.

    Args:
        things: data sets, functions and whatever else.
    """

    def __init__(self, *things: Any) -> None:
        self._checks: list[Callable[[], bool]] = []
        self._kept: list[Any] = []  # so that what is another object has another address
        self._seen: set[int] = set()
        self._bytes = 0
        self.whole = True
        """Whether everything could be seen."""
        waiting = list(things)
        try:
            while waiting:
                waiting.extend(self._look_at(waiting.pop()))
        except Exception:
            self.whole, self._checks = False, []

    def same(self) -> bool:
        """Whether everything is as it was; False when that can't be told."""
        try:
            return self.whole and all(check() for check in self._checks)
        except Exception:
            return False

    def _look_at(self, thing: Any) -> Any:
        """Note what a thing is made of, and return the parts of it that have to be looked at, too."""
        if isinstance(thing, FIXED) or id(thing) in self._seen:
            return ()
        self._seen.add(id(thing))
        self._kept.append(thing)
        if len(self._kept) > MOST_THINGS:
            raise Unknown
        kind = type(thing)
        if kind.__module__ in NUMBERS:
            return ()
        if isinstance(thing, torch.Tensor):
            return self._tensor(thing)
        if kind in (tuple, frozenset, torch.nn.parameter.Parameter):
            return thing
        if kind in (list, deque):
            return self._sequence(thing)
        if isinstance(thing, dict):
            base = next(one for one in (OrderedDict, defaultdict, dict) if isinstance(thing, one))
            return itertools.chain(self._dict(thing), () if kind is base else self._attributes(thing, base))
        if kind is set:
            self._check(partial(_equal, thing, set(thing)))
            return thing
        if kind is types.FunctionType:
            return self._function(thing)
        if kind is types.MethodType:
            return thing.__self__, thing.__func__
        if kind is partial:
            return thing.func, thing.args, thing.keywords
        if kind in (staticmethod, classmethod, property):
            return ()
        if kind.__module__ == "numpy":
            return self._numpy(thing)
        return self._attributes(thing, object)

    def _check(self, check: Callable[[], bool]) -> None:
        self._checks.append(check)

    def _tensor(self, tensor: torch.Tensor) -> Iterable[Any]:
        version, address, shape, shared = tensor._version, tensor.data_ptr(), tensor.shape, _is_shared(tensor)

        def same() -> bool:
            moves = not shared and _is_shared(tensor)  # into shared memory, when it is sent to a spawned worker
            return (tensor._version, tensor.shape) == (version, shape) and (moves or tensor.data_ptr() == address)

        self._check(same)
        if tensor.device.type == "cpu" and self._bytes + tensor.nbytes <= MOST_BYTES:
            self._bytes += tensor.nbytes  # a version does not count what is written through numpy, or `tensor.data`
            content = _content(tensor)
            self._check(lambda: _content(tensor) == content)
        return ()

    def _sequence(self, thing: Any) -> Iterable[Any]:
        copied = list(thing)
        self._check(lambda: len(thing) == len(copied) and all(map(is_, thing, copied)))
        return _inside(copied)

    def _dict(self, thing: Any) -> Iterable[Any]:
        names, values = list(thing), list(thing.values())
        self._check(
            lambda: len(thing) == len(names) and all(map(is_, thing, names)) and all(map(is_, thing.values(), values))
        )
        return _inside(values)

    def _function(self, function: Any) -> Iterable[Any]:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        code, defaults, by_name = function.__code__, function.__defaults__, function.__kwdefaults__

        def same() -> bool:
            held = [cell.cell_contents for cell in function.__closure__ or ()]
            now = [function.__code__, function.__defaults__, function.__kwdefaults__, *held]
            return all(map(is_, now, [code, defaults, by_name, *cells]))

        self._check(same)
        self._globals(function)
        return [*cells, defaults, by_name]

    def _globals(self, function: Any) -> None:
        """Note the global variables that a function names, and what plain containers and tensors among them hold."""
        everything, codes, names = function.__globals__, [function.__code__], set[str]()
        for code in codes:
            names.update(step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
            codes.extend(part for part in code.co_consts if isinstance(part, types.CodeType))  # functions inside
        held = {name: everything[name] for name in names if name in everything}
        self._check(lambda: all(everything.get(name) is value for name, value in held.items()))
        for value in held.values():
            if isinstance(value, torch.Tensor):
                self._tensor(value)
            elif type(value) is list:
                self._sequence(value)
            elif type(value) is dict:
                self._dict(value)

    def _numpy(self, thing: Any) -> Iterable[Any]:
        import numpy as np

        if isinstance(thing, (np.generic, np.dtype, np.ufunc)):
            return ()
        if type(thing) is not np.ndarray or thing.dtype.hasobject:
            raise Unknown
        self._bytes += thing.nbytes
        if self._bytes > MOST_BYTES:
            raise Unknown
        content = _digest(thing)
        self._check(lambda: _digest(thing) == content)
        return ()

    def _attributes(self, thing: Any, base: type) -> Iterable[Any]:
        """Look at an object whose class was written in Python, as far as that goes."""
        kind = type(thing)
        if any(not one.__flags__ & HEAP for one in kind.__mro__ if one not in base.__mro__):
            raise Unknown
        slots = [
            name for one in kind.__mro__ for name, member in vars(one).items() if _is_slot(member) and one is not base
        ]
        if kind.__basicsize__ > PLAIN + base.__basicsize__ - object.__basicsize__ + 8 * len(slots):
            raise Unknown
        held = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
        self._check(lambda: all(getattr(thing, name) is value for name, value in held.items()))
        parts = list(held.values())
        attributes = getattr(thing, "__dict__", None)
        if attributes is not None:
            parts += self._dict(attributes)
        for one in kind.__mro__:
            if id(one) not in self._seen and not one.__module__.startswith(LIBRARIES):
                self._seen.add(id(one))
                parts += self._class(one)
        return parts

    def _class(self, kind: type) -> Iterable[Any]:
        """Look at the attributes of a class, which its objects see as theirs."""
        copied = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}

        def same() -> bool:
            now = vars(kind)
            return all(now.get(name) is value for name, value in copied.items())

        self._check(same)
        for value in copied.values():
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if type(value) is types.FunctionType:
                self._globals(value)
        plain = (types.FunctionType, classmethod, staticmethod, property)
        return [value for name, value in copied.items() if not name.startswith("__") and not isinstance(value, plain)]


def _inside(values: list[Any]) -> Iterable[Any]:
    """Return which entries have to be looked at: none where all of them are fixed, or tuples of what is."""
    kinds = set(map(type, values))
    if all(issubclass(kind, FIXED) for kind in kinds):
        return ()
    if kinds == {tuple}:
        within = set(map(type, itertools.chain.from_iterable(values)))
        if all(issubclass(kind, FIXED) for kind in within):
            return ()
    return values


def _is_slot(member: Any) -> bool:
    return type(member) is types.MemberDescriptorType


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)


def _is_shared(tensor: Any) -> bool:
    return bool(tensor.is_shared())


def _content(tensor: torch.Tensor) -> bytes:
    return _digest(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def _digest(array: Any) -> bytes:
    import numpy as np

    return hashlib.blake2b(np.ascontiguousarray(array).view(np.uint8).data, digest_size=16).digest()
