"""save_hyperparameters: remember what an object was made with, so that a checkpoint can make it again."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch

from trainkit.errors import MisconfigurationException


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there is: {', '.join(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __repr__(self) -> str:
        return "\n".join(f"{key!r}: {value!r}" for key, value in self.items())


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
            ignore: names of arguments not to keep.
            frame: the frame of `__init__`, when this is called from somewhere else.
            logger: whether loggers get them.
        """
        if len(args) == 1 and not isinstance(args[0], str):
            values = _mapping(args[0])
        else:
            current = inspect.currentframe()
            caller = frame if frame is not None else (current.f_back if current else None)
            given = _init_arguments(self, caller)
            unknown = [name for name in args if name not in given]
            if unknown:
                raise ValueError(
                    f"save_hyperparameters: {type(self).__name__}.__init__ has no argument "
                    f"{', '.join(map(repr, unknown))}; it has: {', '.join(given)}."
                )
            values = {name: given[name] for name in args} if args else given
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        kept = AttributeDict({name: value for name, value in values.items() if name not in ignored})
        for name, value in kept.items():
            if isinstance(value, torch.nn.Module):
                warnings.warn(
                    f"hyperparameter {name!r} is an nn.Module, whose weights are in the checkpoint already; "
                    f"leave it out with save_hyperparameters(ignore=[{name!r}]).",
                    stacklevel=2,
                )
        store = self.__dict__
        store["_hparams"] = AttributeDict({**store.get("_hparams", {}), **kept})
        store["_hparams_initial"] = copy.deepcopy({k: v for k, v in store["_hparams"].items() if not _heavy(v)})
        store["_log_hparams"] = logger

    @property
    def hparams(self) -> AttributeDict:
        """The hyperparameters, changeable."""
        store = self.__dict__
        if "_hparams" not in store:
            store["_hparams"] = AttributeDict()
        hparams: AttributeDict = store["_hparams"]
        return hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyperparameters as they were saved."""
        return AttributeDict(copy.deepcopy(self.__dict__.get("_hparams_initial", {})))


def _heavy(value: Any) -> bool:
    return isinstance(value, (torch.nn.Module, torch.Tensor))


def _mapping(given: Any) -> dict[str, Any]:
    if isinstance(given, Namespace):
        return dict(vars(given))
    if isinstance(given, Mapping):
        return dict(given)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    raise TypeError(
        "save_hyperparameters takes names of arguments, or one dict, Namespace or dataclass. "
        f"Received: {type(given).__name__}."
    )


def _init_arguments(owner: object, frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of the `__init__` in a frame and of the subclasses' `__init__`s that called it."""
    collected: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__":
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not names or frame.f_locals.get(names[0]) is not owner:
            break
        values = {name: frame.f_locals[name] for name in names[1:] if name in frame.f_locals}
        if code.co_flags & inspect.CO_VARKEYWORDS:
            index = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
            extra = frame.f_locals.get(code.co_varnames[index], {})
            values.update({key: value for key, value in extra.items() if key not in values})
        collected = {**collected, **values}
        frame = frame.f_back
    return collected


def plain_hparams(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that a checkpoint can hold; the others are left out with a warning."""
    kept: dict[str, Any] = {}
    for name, value in hparams.items():
        if _is_plain(value):
            kept[name] = value
        else:
            warnings.warn(
                f"hyperparameter {name!r} ({type(value).__name__}) can't be stored in a checkpoint; give it again: "
                f"load_from_checkpoint(path, {name}=...).",
                stacklevel=2,
            )
    return kept


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype, torch.device)):
        return type(value) in (type(None), bool, int, float, str, torch.Tensor, torch.dtype, torch.device)
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return type(value) is dict and all(_is_plain(k) and _is_plain(v) for k, v in value.items())


def merged_hparams(owners: Iterable[HyperParameters]) -> dict[str, Any]:
    """Return the hyperparameters of several objects in one dict, for loggers.

    Raises:
        MisconfigurationException: two of them have one name and different values.
    """
    merged: dict[str, Any] = {}
    for owner in owners:
        if not owner.__dict__.get("_log_hparams", False):
            continue
        values = owner.hparams_initial
        clash = next((name for name in values if name in merged and merged[name] != values[name]), None)
        if clash is not None:
            raise MisconfigurationException(
                f"the module and the data module have different values of the hyperparameter {clash!r}: "
                f"{merged[clash]!r} and {values[clash]!r}. Leave it out of one of them: "
                f"save_hyperparameters(ignore=[{clash!r}])."
            )
        merged.update(values)
    return merged
