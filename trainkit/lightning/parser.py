"""The parser of a LightningCLI: jsonargparse's, with a place for classes, optimizers and lr schedulers."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from typing import Any

import jsonargparse
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainkit import Callback, DataModule, Module, Trainer
from trainkit.errors import MisconfigurationException

jsonargparse.register_unresolvable_import_paths(torch)  # some of torch's classes lie about where they are


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """torch's schedule of that name, which also knows the metric it watches, so that a config can say it.

    Args:
        optimizer: whose learning rate is lowered.
        monitor: the name of a logged metric.
        args, kwargs: see `torch.optim.lr_scheduler.ReduceLROnPlateau`.
    """

    def __init__(self, optimizer: Optimizer, monitor: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


LRSchedulerTypeTuple = (ReduceLROnPlateau, LRScheduler)  # ours first: it is the one that its short name means
LRSchedulerTypeUnion = LRScheduler | ReduceLROnPlateau
LRSchedulerType = type[LRScheduler] | type[ReduceLROnPlateau]

ArgsType = list[str] | dict[str, Any] | jsonargparse.Namespace | None
"""What a LightningCLI takes as `args`."""
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
"""The type of an argument that makes an optimizer of parameters: in a config, the optimizer's class and arguments."""
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
"""The type of an argument that makes an lr scheduler of an optimizer."""

AUTOMATIC = "AUTOMATIC"
"""The `link_to` of an optimizer or lr scheduler that the CLI gives to the module's `configure_optimizers` itself."""

_Classes = type[Any] | tuple[type[Any], ...]


class LightningArgumentParser(jsonargparse.ArgumentParser):
    """A jsonargparse parser that knows the classes of a run.

    Args:
        args, kwargs: see `jsonargparse.ArgumentParser`.
        description: the first line of `--help`.
        env_prefix: what the environment variables begin with, when `default_env` lets them be read.
        default_env: whether arguments may come from the environment: PL_TRAINER__MAX_EPOCHS=3.
    """

    def __init__(
        self,
        *args: Any,
        description: str = "Train, validate, test and predict from config files and options.",
        env_prefix: str = "PL",
        default_env: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, description=description, env_prefix=env_prefix, default_env=default_env, **kwargs)
        self.callback_keys: list[str] = []
        """The keys of callbacks that every run of this CLI has."""
        self.optimizers: dict[str, tuple[_Classes, str]] = {}
        """Key -> the class or classes, and the key they are linked to."""
        self.lr_schedulers: dict[str, tuple[_Classes, str]] = {}

    def add_lightning_class_args(
        self,
        lightning_class: Callable[..., Any] | type[Any],
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Add the arguments of a Trainer, module, data module or callback under a key, and return their names.

        Args:
            lightning_class: the class, or a function whose annotation says that it returns one.
            nested_key: where they go: "trainer", "model", "my_early_stopping".
            subclass_mode: whether the config names the class: any subclass of this one.
            required: whether it must, in subclass mode.

        Raises:
            MisconfigurationException: something else was given.
        """
        made = lightning_class if isinstance(lightning_class, type) else _made_by(lightning_class)
        if not (isinstance(made, type) and issubclass(made, (Trainer, Module, DataModule, Callback))):
            raise MisconfigurationException(
                "add_lightning_class_args takes a Trainer, Module, DataModule or Callback class, or a function whose "
                f"annotation says that it returns one. Received: {lightning_class!r}."
            )
        cls = lightning_class if isinstance(lightning_class, type) else class_from_function(lightning_class)
        if issubclass(made, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            added = self.add_subclass_arguments(cls, nested_key, fail_untyped=False, required=required)
        else:
            makes = not issubclass(made, Trainer)  # the CLI makes the Trainer, when its callbacks are there
            added = self.add_class_arguments(cls, nested_key, fail_untyped=False, instantiate=makes, sub_configs=True)
        return list(added or ())  # in subclass mode nobody knows them yet

    def add_optimizer_args(
        self, optimizer_class: _Classes = (Optimizer,), nested_key: str = "optimizer", link_to: str = AUTOMATIC
    ) -> None:
        """Add the arguments of an optimizer under a key.

        Args:
            optimizer_class: the class; in a tuple, the config names a subclass of it.
            nested_key: where they go.
            link_to: the argument that gets class and arguments; "AUTOMATIC" puts the optimizer into the module's
                `configure_optimizers`.
        """
        self._add_slot(optimizer_class, (Optimizer,), nested_key, "params")
        self.optimizers[nested_key] = (optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: _Classes = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = AUTOMATIC,
    ) -> None:
        """Add the arguments of an lr scheduler under a key; see `add_optimizer_args`."""
        self._add_slot(lr_scheduler_class, LRSchedulerTypeTuple, nested_key, "optimizer")
        self.lr_schedulers[nested_key] = (lr_scheduler_class, link_to)

    def _add_slot(self, given: _Classes, bases: tuple[type[Any], ...], key: str, first: str) -> None:
        for cls in given if isinstance(given, tuple) else (given,):
            if not (isinstance(cls, type) and issubclass(cls, bases)):
                names = " or ".join(base.__name__ for base in bases)
                raise MisconfigurationException(f"{key!r} takes a subclass of {names}. Received: {cls!r}.")
        if isinstance(given, tuple):
            self.add_subclass_arguments(given, key, instantiate=False, fail_untyped=False, skip={first})
        else:
            self.add_class_arguments(given, key, instantiate=False, fail_untyped=False, sub_configs=True, skip={first})

    def link_slots(self) -> None:
        """Link every optimizer and lr scheduler that has a `link_to` of its own."""
        for key, (given, target) in {**self.optimizers, **self.lr_schedulers}.items():
            if target == AUTOMATIC:
                continue
            if isinstance(given, tuple):
                self.link_arguments(key, target)
            else:
                self.link_arguments(key, target, compute_fn=_spec_of(given))

    def automatic(self, slots: dict[str, tuple[_Classes, str]]) -> list[str]:
        """Return the keys of the optimizers, or lr schedulers, that nothing is linked to."""
        return [key for key, (_, target) in slots.items() if target == AUTOMATIC]


def _spec_of(cls: type[Any]) -> Callable[[Any], dict[str, Any]]:
    def spec(arguments: Any) -> dict[str, Any]:
        return class_spec(cls, arguments)

    return spec


def class_spec(cls: type[Any], arguments: Any) -> dict[str, Any]:
    """Return the class and its arguments as a config writes them."""
    given = arguments.as_dict() if isinstance(arguments, jsonargparse.Namespace) else arguments
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(given or {})}


def class_from_function(function: Callable[..., Any]) -> type[Any]:
    """Return a class whose making calls the function, with the function's arguments and the type it returns."""
    made: type[Any] = jsonargparse.typing.class_from_function(function)
    return made


def _made_by(function: Callable[..., Any]) -> Any:
    try:
        return typing.get_type_hints(function).get("return") if callable(function) else None
    except (NameError, TypeError):  # an annotation that can't be looked up says nothing
        return None


def module_type(given: Any) -> Any:
    """Return the class of what a class or a function makes."""
    return given if isinstance(given, type) else _made_by(given)
