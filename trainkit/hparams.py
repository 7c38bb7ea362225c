"""save_hyperparameters: remember what an object was made with, so that a checkpoint can make it again."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from trainkit.errors import warn
from trainkit.redaction import redacted

_told: WeakSet[HyperParameters] = WeakSet()
_given: ContextVar[tuple[type, dict[str, Any]] | None] = ContextVar("_given", default=None)


@contextmanager
def given_hyperparameters(cls: type, values: Mapping[str, Any]) -> Iterator[None]:
    """Let `save_hyperparameters` of an object of this class keep these values in place of what `__init__` got.

    A command line knows what an object was made from, where `__init__` gets objects that no checkpoint can hold.
    """
    token = _given.set((cls, dict(values)))
    try:
        yield
    finally:
        _given.reset(token)


if TYPE_CHECKING:
    class_only = classmethod
else:

    class class_only(classmethod):
        """A classmethod that says so when it is called on an object, where its result would be lost."""

        def __get__(self, instance: object, owner: type | None = None) -> Any:
            if instance is None:
                return super().__get__(instance, owner)
            name = f"{type(instance).__name__}.{self.__func__.__name__}"

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise TypeError(f"call {name} on the class, not on an object: it returns a new one.")

            return refuse


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there is: {', '.join(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0) + 3
        return "\n".join(f'"{key}":'.ljust(width) + f" {value}" for key, value in sorted(self.items()))


class HyperParameters:
    """Give a Module or DataModule `save_hyperparameters`, `hparams` and `hparams_initial`."""

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Iterable[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Remember the arguments of `__init__`, which calls this: they go into checkpoints and to the loggers.

        Args:
            args: names of arguments to keep (all of them when none is given), or one dict, Namespace or dataclass
                to keep instead.
            ignore: names of arguments not to keep, those that a base class kept included.
            frame: the frame of `__init__`, when this is called from somewhere else.
            logger: whether loggers get them.

        Raises:
            KeyError: `__init__` has no argument of that name.
            ValueError: neither names nor one dict, Namespace or dataclass.
        """
        if len(args) == 1 and not isinstance(args[0], torch.Tensor) and not args[0]:
            return  # nothing in it
        store = self.__dict__
        store["_log_hparams"] = logger
        current = inspect.currentframe()
        configured = _given.get()
        if configured is not None and configured[0] is type(self):
            given = configured[1]
        else:
            given = _init_arguments(self, frame if frame is not None else current and current.f_back)
        if any(not isinstance(name, str) for name in args):
            values = _mapping(args)
            # the argument that load_from_checkpoint has to give them to
            holders = [name for name, value in given.items() if value is args[0]]
            holders += [name for name, value in given.items() if type(value) is type(args[0]) and _same(value, args[0])]
            store["_hparams_name"] = holders[0] if holders else "kwargs"
        else:
            unknown = [name for name in args if name not in given]
            if unknown:
                raise KeyError(
                    f"save_hyperparameters: {type(self).__name__}.__init__ has no argument "
                    f"{', '.join(map(repr, unknown))}; it has: {', '.join(given)}."
                )
            values = {name: given[name] for name in args} if args else given
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        kept = {**store.get("_hparams", {}), **values}
        kept = {name: value for name, value in kept.items() if name not in ignored}
        for name, value in kept.items():
            if name in values and isinstance(value, torch.nn.Module):
                warn(
                    f"hyperparameter {name!r} is an nn.Module, whose weights are in the checkpoint already; "
                    f"leave it out with save_hyperparameters(ignore=[{name!r}])."
                )
        store["_hparams"] = AttributeDict(kept)
        store["_hparams_initial"] = {name: _copied(value) for name, value in kept.items() if not _heavy(value)}

    def remove_ignored_hparams(self, ignore_list: Iterable[str]) -> None:
        """Forget hyperparameters, those that a base class kept included."""
        for name in ignore_list:
            self.hparams.pop(name, None)

    @property
    def hparams(self) -> AttributeDict:
        """The hyperparameters, changeable."""
        store = self.__dict__
        if "_hparams" not in store:
            store["_hparams"] = AttributeDict()
        hparams: AttributeDict = store["_hparams"]
        return hparams

    @property
    def hparams_name(self) -> str:
        """The argument of `__init__` that held the hyperparameters as one object; "kwargs" when they were its own."""
        name: str = self.__dict__.get("_hparams_name", "kwargs")
        return name

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyperparameters as they were saved."""
        initial = self.__dict__.get("_hparams_initial", {})
        return AttributeDict({name: _copied(value) for name, value in initial.items()})


def _heavy(value: Any) -> bool:
    return isinstance(value, (torch.nn.Module, torch.Tensor))


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock, a file, a tensor of a graph: whatever a class may refuse to copy
        return value


def _mapping(args: tuple[Any, ...]) -> dict[str, Any]:
    given = args[0]
    if len(args) > 1:
        raise ValueError(f"save_hyperparameters takes names of arguments, or one object. Received: {args!r}.")
    if isinstance(given, Namespace):
        return dict(vars(given))
    if isinstance(given, Mapping):
        return dict(given)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    raise ValueError(
        "save_hyperparameters takes names of arguments, or one dict, Namespace or dataclass. "
        f"Received: {type(given).__name__}."
    )


def _init_arguments(owner: object, frame: FrameType | None) -> dict[str, Any]:
    """Return what an object is being made with: the arguments of its class's `__init__` and its base classes'."""
    if dataclasses.is_dataclass(owner):
        return {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner) if field.init}
    while frame is not None and not _is_init_of(owner, frame):
        frame = frame.f_back
    collected: dict[str, Any] = {}
    while frame is not None and _is_init_of(owner, frame):  # a base class's first, then those that called it
        code, values = frame.f_code, frame.f_locals
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        collected.update({name: values[name] for name in names if name in values})
        if code.co_flags & inspect.CO_VARKEYWORDS:
            index = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
            collected.update(values.get(code.co_varnames[index], {}))
        frame = frame.f_back
    return collected


def _is_init_of(owner: object, frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "__init__" and code.co_argcount > 0 and frame.f_locals.get(code.co_varnames[0]) is owner


def plain_hparams(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that a checkpoint can hold, paths as strings; others are left out with a warning.

    Secrets are "***" in it, see `trainkit.redaction`.
    """
    kept: dict[str, Any] = {}
    for name, given in redacted(hparams).items():
        value = os.fspath(given) if isinstance(given, os.PathLike) else given
        if isinstance(value, (Namespace, AttributeDict)):
            value = dict(vars(value) if isinstance(value, Namespace) else value)
        if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            value = value.item()
        if _is_plain(value):
            kept[name] = value
        else:
            warn(
                f"hyperparameter {name!r} ({type(value).__name__}) can't be stored in a checkpoint; give it again: "
                f"load_from_checkpoint(path, {name}=...)."
            )
    return kept


def tell_of_secrets(owner: HyperParameters) -> None:
    """Warn once, for an object whose hyperparameters are about to be written, which of them are not."""
    found: list[str] = []
    redacted(owner.hparams, found)
    if found and owner not in _told:
        _told.add(owner)
        names = ", ".join(map(repr, found))
        warn(
            f"the hyperparameter {names} of {type(owner).__name__} looks like a secret: checkpoints, config files and "
            f"loggers get '***' in its place. Give it again where a checkpoint is loaded: "
            f"load_from_checkpoint(path, {found[0].partition('.')[0]}=...)."
        )


def namespaces_of(hparams: Mapping[str, Any]) -> list[str]:
    """Return which hyperparameters are a Namespace, that a checkpoint holds as a dict."""
    return [name for name, value in hparams.items() if isinstance(value, Namespace)]


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype, torch.device)):
        return type(value) in (type(None), bool, int, float, str, torch.Tensor, torch.dtype, torch.device)
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return type(value) is dict and all(_is_plain(k) and _is_plain(v) for k, v in value.items())


def merged_hparams(owners: Iterable[HyperParameters]) -> dict[str, Any]:
    """Return the hyperparameters of several objects in one dict, for loggers.

    Raises:
        RuntimeError: two of them have one name and different values.
    """
    merged: dict[str, Any] = {}
    for owner in owners:
        if not owner.__dict__.get("_log_hparams", False):
            continue
        values = owner.hparams_initial
        clash = next((name for name in values if name in merged and _differ(merged[name], values[name])), None)
        if clash is not None:
            raise RuntimeError(
                f"the module and the data module have different values of the hyperparameter {clash!r}: "
                f"{merged[clash]!r} and {values[clash]!r}. Leave it out of one of them: "
                f"save_hyperparameters(ignore=[{clash!r}])."
            )
        merged.update(values)
    return merged


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except (TypeError, ValueError, RuntimeError):  # arrays and their like have no single answer
        return False
