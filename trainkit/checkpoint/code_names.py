"""Names of code in hyperparameters from a file: refused, unless they name a class of the kind that belongs there.

jsonargparse makes objects of a LightningCLI's hyperparameters. Where an argument is annotated as a callable, a class or
an object, it imports what a string names, and it calls what a "class_path" names: good for a command line that its user
typed, not for a file that somebody sent. So each value is compared with the annotation of its argument before
jsonargparse sees it. A class may be named where the program has imported it and the annotation asks for one of its
kind; where there is no annotation, one of torch's modules. A function is never named by a file.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from enum import Enum
from types import FunctionType, UnionType
from typing import Any

from torch import nn

from trainkit.checkpoint.plain import MAX_DEPTH

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_VALUES = (bool, int, float, complex, str, bytes, type(None), list, tuple, dict, set, frozenset, range, timedelta)
_ANYTHING = (Any, object, type)


def imported(class_path: Any) -> Any:
    """Return what a dotted name means, of what the program has imported.

    Raises:
        ValueError: it has not been imported.
    """
    module, _, name = str(class_path).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if found is None:
        raise ValueError(
            f"the checkpoint names the class {class_path!r}, which this program has not imported, and a file may not "
            f"choose what is. If you trust it: import {module or class_path} first."
        )
    return found


def check(cls: Any, arguments: Mapping[str, Any], but: Collection[str] = (), at: str = "", depth: int = 0) -> None:
    """Refuse arguments from a file that would choose code.

    Args:
        cls: the class that they are for, or a function that makes it.
        arguments: its arguments, as jsonargparse is to get them.
        but: names of those that are not from the file.
        at: where they are in larger hyperparameters, for the message.
        depth: how deep that is.

    Raises:
        ValueError: one of them names code that does not belong there; the message has its name.
    """
    hints = _hints(cls)
    for name, value in arguments.items():
        where = f"{at}.{name}".strip(".")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"the checkpoint has a hyperparameter {where!r}, which can't be an argument's name.")
        if name in but:
            continue
        _check(value, hints.get(name, collections.abc.Callable), where, depth)
        if at:  # where an object stands inside another, what does not fit its annotation may become one all the same
            _check(value, Any, where, depth)


def _hints(cls: Any) -> dict[str, Any]:
    """Return the annotations of a class's arguments, and of its base classes', to which `**kwargs` may lead."""
    makers = [vars(base).get("__init__") for base in cls.__mro__] if isinstance(cls, type) else [cls]
    hints: dict[str, Any] = {}
    for maker in makers:
        if not isinstance(maker, FunctionType):
            continue
        try:
            found = typing.get_type_hints(maker)
        except Exception:  # a name that is there for type checkers only: taken for the worst
            found = dict.fromkeys(maker.__annotations__, collections.abc.Callable)
        for name, parameter in inspect.signature(maker).parameters.items():
            default = parameter.default  # from which jsonargparse takes what is not annotated
            plain = default is parameter.empty or default is None or isinstance(default, _VALUES)
            hints.setdefault(name, found.get(name, Any if plain else collections.abc.Callable))
    return hints


def _check(value: Any, hint: Any, where: str, depth: int = 0) -> None:
    """Compare a value, and what is inside it, with the annotation of the argument it belongs to."""
    if depth > MAX_DEPTH:
        raise ValueError(f"the checkpoint's hyperparameter {where!r} is nested deeper than {MAX_DEPTH} levels.")
    parts = set(_parts(hint))
    kinds = [part for part in parts if isinstance(part, type) and part not in _ANYTHING and not _is_value(part)]
    callables = collections.abc.Callable in parts or type in parts
    if not (kinds or callables or parts & {Any, object}):
        return  # numbers and strings stay what they are
    if isinstance(value, str):
        _check_text(value, hint, bool(kinds or callables), kinds, where, depth)
    elif isinstance(value, Mapping):
        _check_mapping(value, hint, kinds, where, depth)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _check(item, hint, where, depth + 1)


def _check_mapping(value: Mapping[Any, Any], hint: Any, kinds: list[type], where: str, depth: int) -> None:
    cls: type | None = None
    if "class_path" in value:
        cls = imported(value["class_path"])
        if not _is_one_of(cls, kinds or [nn.Module]):
            raise _refusal(value["class_path"], where)
    made_of = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    for key, item in value.items():
        if key in ("init_args", "dict_kwargs") and isinstance(item, Mapping):
            check(cls or type, item, at=where, depth=depth + 1)
        elif cls is None and len(made_of) == 1 and key in (fields := _hints(made_of[0])):
            _check(item, fields[key], f"{where}.{key}", depth + 1)
        elif key != "class_path":
            _check(item, hint, f"{where}.{key}", depth + 1)


def _check_text(text: str, hint: Any, imports: bool, kinds: list[type], where: str, depth: int) -> None:
    """Check a string, which jsonargparse may read as YAML, as a file's name or as the name of something to import."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if isinstance(value, (Mapping, list)):
        return _check(value, hint, where, depth + 1)
    if not imports:
        return
    if _DOTTED.fullmatch(text):
        root = text.partition(".")[0]
        named = imported(text) if root in sys.modules or importlib.util.find_spec(root) is not None else None
        if named is not None and not (_is_one_of(named, kinds) or isinstance(named, tuple(kinds))):
            raise _refusal(text, where)
    if "://" in text or os.path.exists(text):
        raise _refusal(text, where)


def _is_one_of(found: Any, kinds: list[type]) -> bool:
    try:
        return isinstance(found, type) and issubclass(found, tuple(kinds))
    except TypeError:  # a protocol, which does not say what it is
        return False


def _refusal(name: Any, where: str) -> ValueError:
    return ValueError(
        f"the checkpoint's hyperparameter {where!r} names {name!r}, and a file may not choose the code that is run: "
        "the annotation of that argument does not ask for such a class. If you trust it, give it yourself: "
        f"load_from_checkpoint(path, {where.partition('.')[0]}=...)."
    )


def _parts(hint: Any) -> Iterator[Any]:
    """Yield the types an annotation consists of; what can't be known of it is taken for a callable."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return
    if isinstance(hint, (str, typing.ForwardRef)) or hint is typing.Callable:
        yield collections.abc.Callable
    elif isinstance(hint, typing.TypeVar) or hint is None or hint is ...:
        yield Any if isinstance(hint, typing.TypeVar) else type(None)
    elif hasattr(hint, "__supertype__"):
        yield from _parts(hint.__supertype__)
    elif origin is None:
        yield hint
    else:
        if origin in (collections.abc.Callable, type):
            yield origin
            inside = inside[-1:]  # of a callable what it returns
        elif isinstance(origin, type) and origin is not UnionType and not _is_value(origin):
            yield origin
        for one in inside:
            if isinstance(one, list):
                continue
            yield from _parts(one)


def _is_value(kind: type) -> bool:
    """Whether values of a type are no objects that jsonargparse would make: numbers, strings, what holds them."""
    try:
        return kind in _VALUES or issubclass(kind, (Enum, os.PathLike)) or kind.__module__ == "collections.abc"
    except TypeError:
        return False
