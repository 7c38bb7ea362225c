"""What jsonargparse knows of a class: its arguments, their types, and the classes that fit a slot."""

from __future__ import annotations

import argparse
import collections.abc
import enum
import importlib
import inspect
import os
import pkgutil
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jsonargparse

from trainkit.config.problems import suggest


@dataclass(frozen=True)
class Parameter:
    """One argument: its type, its default, and whether it must be given."""

    hint: Any = Any
    default: Any = None
    required: bool = False


Parameters = dict[str, "Parameter | Parameters"]
"""Arguments by name; a group of them, like `trainer`, is a mapping again."""


def parser_parameters(parser: jsonargparse.ArgumentParser) -> Parameters:
    """Return the arguments of a parser, nested as their keys are."""
    found: Parameters = {}
    for action in parser._actions:
        if action.default is argparse.SUPPRESS or action.dest == "config":  # help pages, and the files themselves
            continue
        *groups, name = action.dest.split(".")
        group = found
        for key in groups:
            inner = group.setdefault(key, {})
            if not isinstance(inner, dict):
                inner = group[key] = {}
            group = inner
        group[name] = Parameter(getattr(action, "_typehint", action.type) or Any, action.default, action.required)
    return found


def class_parameters(cls: Any, skip: Iterable[str] = ()) -> Parameters:
    """Return the arguments of a class's constructor, or of a function, those behind its `**kwargs` included."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, print_config=None, add_help=False)
    add = parser.add_class_arguments if isinstance(cls, type) else parser.add_function_arguments
    add(cls, fail_untyped=False, skip=set(skip))
    found = parser_parameters(parser)
    for name in needed(cls) & set(found) - set(skip):  # jsonargparse 4 lets some of them be None
        parameter = found[name]
        if isinstance(parameter, Parameter):
            found[name] = Parameter(parameter.hint, parameter.default, required=True)
    return found


def needed(cls: Any) -> set[str]:
    """Return the names of a constructor's or a function's own arguments that have no default."""
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in named}


def refuses(hint: Any, value: Any) -> bool:
    """Whether jsonargparse refuses a value for a type."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, print_config=None, add_help=False)
    try:
        parser.add_argument("--value", type=hint)
    except (TypeError, ValueError):  # a type it does not know; then it checks nothing
        return False
    try:
        parser.parse_object({"value": value})
    except Exception:  # an import may raise anything
        return True
    return False


# ---------------------------------------------------------------- types in words
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true, false",
    str: "a string",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
}


def choices(hint: Any) -> list[tuple[Any, Any]]:
    """Return the alternatives of a type as (origin, type): `int | None` has two, `int` has one."""
    if type(hint).__name__ == "TypeAliasType":  # `type Name = ...`, Python 3.12
        return choices(hint.__value__)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [choice for inner in typing.get_args(hint) for choice in choices(inner)]
    if origin is typing.Annotated:
        return choices(typing.get_args(hint)[0])
    return [(origin, hint)]


def allows_nothing(hint: Any) -> bool:
    """Whether a type allows null."""
    inner: list[Any] = [choice for _, choice in choices(hint)]
    return type(None) in inner or None in inner or describe(hint) == "anything"


def describe(hint: Any) -> str:
    """Say what a type accepts: `int | None` is "a whole number or null"."""
    words: list[str] = []
    alternatives = choices(hint)
    inner: list[Any] = [choice for _, choice in alternatives]
    if any(choice is Any or _name(choice).startswith(("Untyped", "Unvalidated")) for choice in inner):
        return "anything"
    for origin, choice in sorted(alternatives, key=lambda pair: pair[1] is type(None)):
        if choice is int and float in inner:
            continue
        if origin is typing.Literal:
            words += [f'"{value}"' if isinstance(value, str) else str(value) for value in typing.get_args(choice)]
        elif _is_list(origin, choice):
            items = [item for item in typing.get_args(choice) if item is not Ellipsis]
            words.append("a list" + (f" of {_plural(items)}" if items else ""))
        elif choice in WORDS:
            words += WORDS[choice].split(", ")
        elif origin in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
            words.append("a mapping")
        elif isinstance(choice, type) and issubclass(choice, enum.Enum):
            words += [f'"{name}"' for name in choice.__members__]
        else:
            name = "path" if _name(choice) in ("Path", "PathLike") else _name(choice)
            words.append(f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
    unique = list(dict.fromkeys(words))
    return " or ".join([", ".join(unique[:-1]), unique[-1]] if len(unique) > 1 else unique)


def _plural(items: list[Any]) -> str:
    words = {int: "whole numbers", float: "numbers", str: "strings", dict: "mappings"}
    return " or ".join(words.get(item, f"{_name(item)}s") for item in items)


def _name(choice: Any) -> str:
    return getattr(choice, "__name__", None) or str(choice).rpartition(".")[2]


def _is_list(origin: Any, choice: Any) -> bool:
    base = origin if isinstance(origin, type) else choice
    if not isinstance(base, type) or base in (str, bytes):
        return False
    return base in (list, tuple, set, frozenset) or base.__module__ in ("collections.abc", "typing")


def item_hint(hint: Any) -> Any:
    """Return the type of a list's items, or None when the type allows no list."""
    for origin, choice in choices(hint):
        if _is_list(origin, choice):
            return next(iter(typing.get_args(choice)), Any)
    return None


def literals(hint: Any) -> list[str]:
    """Return the names a type allows: those of its Literal and Enum."""
    names: list[str] = []
    for origin, choice in choices(hint):
        if origin is typing.Literal:
            names += [value for value in typing.get_args(choice) if isinstance(value, str)]
        elif isinstance(choice, type) and issubclass(choice, enum.Enum):
            names += list(choice.__members__)
    return names


# ---------------------------------------------------------------- classes that fit
def bases(hint: Any) -> tuple[type, ...]:
    """Return the classes of a type that are given by class_path: `Logger | bool` has Logger."""
    return tuple(choice for _, choice in choices(hint) if _is_slot(choice))


def _is_slot(choice: Any) -> bool:
    if not isinstance(choice, type) or issubclass(choice, (enum.Enum, str, int, float, list, dict, tuple)):
        return False
    return choice.__module__.partition(".")[0] not in sys.stdlib_module_names


_OTHERS_TOOLS = ("trainkit.config.", "trainkit.lightning.cli", "trainkit.lightning.parser")
"""Classes of these modules belong to a command line itself, this one or LightningCLI."""


def fitting_classes(slots: Iterable[type[Any]]) -> list[type[Any]]:
    """Return the imported classes that fit a slot; private and abstract ones are left out."""
    found: dict[type[Any], None] = {}

    def visit(cls: type[Any]) -> None:
        private = cls.__name__.startswith("_") or "<locals>" in cls.__qualname__
        if not private and not inspect.isabstract(cls) and not cls.__module__.startswith(_OTHERS_TOOLS):
            found[cls] = None
        for inner in cls.__subclasses__():
            visit(inner)

    for slot in slots:
        for cls in slot.__subclasses__():
            visit(cls)
    return list(found)


def known_classes(slots: Iterable[type[Any]]) -> dict[str, type[Any]]:
    """Return the imported classes that fit a slot, by short name."""
    return {cls.__name__: cls for cls in reversed(fitting_classes(slots))}


def import_path(cls: type) -> str:
    """Return the shortest path a class can be imported from."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        package = ".".join(parts[:length])
        if getattr(sys.modules.get(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


class ClassProblem(Exception):
    """A class path that leads nowhere; carries what is to be told."""

    def __init__(self, title: str, hint: str = "", cause: Exception | None = None) -> None:
        super().__init__(title)
        self.title, self.hint, self.cause = title, hint, cause


def made_by(maker: Any) -> Any:
    """Return the class of what a class or a function makes; a function says it behind its arrow."""
    if isinstance(maker, types.FunctionType):
        return typing.get_type_hints(maker).get("return")
    return maker


def find_class(path: str, fitting: tuple[type, ...]) -> Any:
    """Return the class that a class path or a short name means, or a function that returns such a class's object.

    Raises:
        ClassProblem: there is none, it is no class, or it does not fit the slot.
    """
    wanted = " or ".join(cls.__name__ for cls in fitting)
    if "." not in path:
        known = known_classes(fitting)
        same = [cls for cls in fitting_classes(fitting) if cls.__name__ == path]
        if len(same) > 1:
            paths = " or ".join(map(import_path, same))
            raise ClassProblem(f"{len(same)} classes are called {path!r}", f"give the full path: {paths}")
        if same:
            return same[0]
        elsewhere = next((cls for cls in fitting_classes(_slots()) if cls.__name__ == path), None)
        hint = suggest(path, known) if known else "give the full path, like examples.digits.DigitsCNN"
        if elsewhere is not None:
            hint = _belongs(elsewhere, wanted)
        elif known and not hint.startswith("did you mean"):
            hint += "\na class of your own needs its full path, like package.module.Class"
        raise ClassProblem(f"no {wanted} is called {path!r}", hint)
    found = _import(path, fitting)
    made = made_by(found)
    if isinstance(made, type) and issubclass(made, fitting):
        return found
    if not isinstance(found, type):
        hint = f"expected a {wanted}, or a function whose annotation says that it returns one"
        raise ClassProblem(f"{path} is a {type(found).__name__}, not a class", hint)
    own = found.__name__ in known_classes(fitting)
    hint = f"trainkit's own is called {found.__name__!r}" if own else _belongs(found, wanted)
    raise ClassProblem(f"{path} is not a {wanted}", hint)


def _slots() -> dict[type[Any], str]:
    """Return what each kind of class is for."""
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from trainkit import Callback, DataModule, Module
    from trainkit.loggers import Logger

    return {
        Module: "model",
        DataModule: "data",
        Callback: "trainer.callbacks",
        Logger: "trainer.logger",
        Optimizer: "optimizer",
        LRScheduler: "lr_scheduler",
    }


def _belongs(cls: type, wanted: str) -> str:
    for base, key in _slots().items():
        if issubclass(cls, base):
            return f"it is a {base.__name__}; those go under {key!r}"
    inherited = ", ".join(f"{base.__module__}.{base.__qualname__}" for base in cls.__bases__)
    return f"it inherits {inherited}; it must inherit {wanted}"


def _import(path: str, fitting: tuple[type, ...]) -> Any:
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ClassProblem(f"{path!r} is not a class path", "write package.module.Class or a short name")
    found: Any = None
    for index, part in enumerate(parts):
        name = ".".join(parts[: index + 1])
        before = ".".join(parts[:index])
        if found is not None and not isinstance(found, types.ModuleType):
            if not hasattr(found, part):
                raise ClassProblem(f"{before} has no attribute {part!r}")
            found = getattr(found, part)
            continue
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise ClassProblem(*_nothing_there(found, parts, index, fitting)) from None
            raise ClassProblem(f"importing {name} failed: {type(error).__name__}: {error}", cause=error) from error
    return found


def _nothing_there(module: Any, parts: list[str], index: int, fitting: tuple[type, ...]) -> tuple[str, str]:
    """Say what is missing on the way to a class, and what is there instead."""
    part, before = parts[index], ".".join(parts[:index])
    known = known_classes(fitting)
    if parts[-1] in known and parts[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
        return f"no module {parts[0]!r}", f"trainkit's own is called {parts[-1]!r}"
    if module is None:
        here = _modules([os.getcwd()])
        hint = suggest(part, here)
        if not hint.startswith("did you mean"):
            hint = f"modules are looked up from {os.getcwd()} and among the installed packages"
        return f"no module {part!r}", hint
    classes = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, fitting)]
    own = [name for name in classes if getattr(module, name) not in fitting]
    modules = _modules(getattr(module, "__path__", []))
    if index == len(parts) - 1:
        return f"no class {part!r} in module {before!r}", suggest(part, own or modules)
    return f"no module {part!r} in {before!r}", suggest(part, modules)


def _modules(folders: Iterable[str]) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(list(folders))]


def load(path: str) -> Any:
    """Return the class of a full path that the parser has accepted."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:  # a class inside a class
        return getattr(load(module), name)


def specs(config: Any, key: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield every class a parsed config names: its dotted key, its path, its arguments."""
    if isinstance(config, list):
        for index, item in enumerate(config):
            yield from specs(item, f"{key}[{index}]")
    if isinstance(config, jsonargparse.Namespace):
        children = vars(config)
        if isinstance(children.get("class_path"), str):
            arguments = children.get("init_args")
            yield key, children["class_path"], vars(arguments) if arguments is not None else {}
        for name, child in children.items():
            yield from specs(child, f"{key}.{name}" if key else name)
