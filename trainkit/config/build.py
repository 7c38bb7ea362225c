"""The objects a config describes: a Trainer, a module, its data, its optimizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jsonargparse
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit import Callback, DataModule, Module, Trainer
from trainkit.config.explain import user_frames
from trainkit.config.parser import SCHEDULE_KEYS
from trainkit.config.problems import ConfigError
from trainkit.config.signatures import load, made_by, specs
from trainkit.config.tree import Tree
from trainkit.hooks import is_overridden
from trainkit.random import MAX_SEED

LOADERS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
"""The data each command needs."""


class UserCodeError(Exception):
    """A constructor of the user's own that raised; its text has the key, the place and the user's frames."""


def check(config: Any, tree: Tree, command: str) -> None:
    """Check what goes beyond single arguments, before anything is made.

    Raises:
        ConfigError: there is no model or no data, the seed is out of range, or optimizer and lr_scheduler do not fit.
    """
    if config.model is None:
        hint = "write `model:` with a class_path, or give --model, for example --model examples.digits.DigitsCNN"
        raise ConfigError(tree.problem("no model given", "model", hint))
    cls = made_by(load(config.model.class_path))
    if config.data is None and not is_overridden(cls, LOADERS[command]):
        hint = f"write `data:` with a class_path, or a {LOADERS[command]} into {cls.__name__}"
        raise ConfigError(tree.problem(f"no data given, and {cls.__name__} has no {LOADERS[command]}", "data", hint))
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed <= MAX_SEED:
        title = f"seed_everything must be true, false or a number from 0 to {MAX_SEED}. Received: {seed}."
        raise ConfigError(tree.problem(title, "seed_everything"))
    if command == "fit":
        _check_optimizer(config, tree)


def make_trainer(parser: jsonargparse.ArgumentParser, config: Any, tree: Tree, callbacks: list[Callback]) -> Trainer:
    """Return the Trainer, with these callbacks behind the config's own.

    Raises:
        ConfigError: an argument is out of range, or does not go with another.
        UserCodeError: a callback or logger of the user's own raised.
    """
    arguments = vars(_instantiate(parser, _part(config, "trainer"), config, tree).trainer)
    own = arguments.get("callbacks")
    listed = own if isinstance(own, list) else [own] if own is not None else []
    trainer: Trainer = _construct(Trainer, (), {**arguments, "callbacks": [*listed, *callbacks]}, "trainer", tree)
    return trainer


def make_module(
    parser: jsonargparse.ArgumentParser, config: Any, tree: Tree, command: str
) -> tuple[Module, DataModule | None]:
    """Return the module, with the config's optimizer, and its data.

    Raises:
        ConfigError: a class of trainkit refuses its arguments.
        UserCodeError: a class of the user's own raised.
    """
    made = _instantiate(parser, _part(config, "model", "data"), config, tree)
    module: Module = made.model
    if command == "fit" and config.optimizer is not None:
        module.configure_optimizers = functools.partial(  # type: ignore[method-assign]
            configured_optimizers, module, config.optimizer, config.lr_scheduler, _schedule(config), tree
        )
    return module, made.data


# ---------------------------------------------------------------- constructing
def _part(config: Any, *keys: str) -> Any:
    """Return a config with these keys only, so that nothing else is made of it."""
    part = config.clone()
    for key in set(vars(config)) - set(keys):
        del part[key]
    return part


def _instantiate(parser: jsonargparse.ArgumentParser, part: Any, config: Any, tree: Tree) -> Any:
    failures: list[tuple[type, Mapping[str, Any], Exception]] = []

    def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return cls(*args, **kwargs)
        except Exception as error:
            failures.append((cls, kwargs, error))
            raise

    try:
        return parser.instantiate(part, instantiators=[(construct, object, True)])
    except Exception:
        if not failures:
            raise
        cls, kwargs, error = failures[0]
        raise _failure(cls, kwargs, error, _key_of(cls, kwargs, config), tree) from error


def _construct(cls: type, first: tuple[Any, ...], arguments: dict[str, Any], key: str, tree: Tree) -> Any:
    try:
        return cls(*first, **arguments)
    except Exception as error:
        raise _failure(cls, arguments, error, key, tree) from error


def _failure(cls: Any, arguments: Mapping[str, Any], error: Exception, key: str, tree: Tree) -> Exception:
    """Return what a constructor's exception is to the user: a mistake in the config, or one in their own code."""
    if cls.__module__.partition(".")[0] in ("trainkit", "torch") and isinstance(error, (ValueError, TypeError)):
        inits = key if cls is Trainer else f"{key}.init_args"
        named = [word for word in re.findall(r"[A-Za-z_]\w*", str(error)) if word in arguments]
        written = [word for word in named if tree.find(f"{inits}.{word}") is not None]
        if named:
            key = f"{inits}.{(written or named)[0]}"
        first, _, rest = str(error).partition("\n")
        return ConfigError(tree.problem(first if cls is Trainer else f"{cls.__name__}: {first}", key, rest))
    title = f"{cls.__name__} raised {type(error).__name__}: {error}"
    return UserCodeError(str(tree.problem(title, key, "\n".join(user_frames(error)))))


def _key_of(cls: type, arguments: Mapping[str, Any], config: Any) -> str:
    """Return the dotted key under which a config asks for a class with these arguments."""
    plain = {name: value for name, value in arguments.items() if isinstance(value, (str, int, float, type(None)))}
    found = [(key, inits) for key, named, inits in specs(config) if load(named) is cls]
    matching = [key for key, inits in found if all(inits.get(name) == value for name, value in plain.items())]
    return next(iter([*matching, *(key for key, _ in found)]), cls.__name__)


# ---------------------------------------------------------------- optimizer and schedule
def _check_optimizer(config: Any, tree: Tree) -> None:
    cls = made_by(load(config.model.class_path))
    own = is_overridden(cls, "configure_optimizers")
    schedule = _schedule(config)
    if config.optimizer is not None and own:
        hint = f"remove `optimizer` from the config, or configure_optimizers from {cls.__name__}: only one can win"
        raise ConfigError(
            tree.problem(f"{cls.__name__}.configure_optimizers makes its own optimizer", "optimizer", hint)
        )
    if config.optimizer is None and (config.lr_scheduler is not None or schedule):
        hint = f"{cls.__name__}.configure_optimizers makes the schedule" if own else "write `optimizer:` too"
        raise ConfigError(tree.problem("lr_scheduler needs an optimizer from the config", "lr_scheduler", hint))
    if config.optimizer is None and not own:
        hint = f"write `optimizer: Adam` into the config, or a configure_optimizers into {cls.__name__}"
        raise ConfigError(tree.problem(f"no optimizer: {cls.__name__} has no configure_optimizers", "optimizer", hint))
    if config.lr_scheduler is None and schedule:
        key = f"lr_scheduler.{next(iter(schedule))}"
        raise ConfigError(tree.problem("there is no lr_scheduler for this", key, "write its class_path too"))
    plateau = config.lr_scheduler is not None and issubclass(load(config.lr_scheduler.class_path), ReduceLROnPlateau)
    if plateau and "monitor" not in schedule:
        hint = "write `monitor: val/loss` (the name of a logged metric) beside its class_path"
        raise ConfigError(tree.problem("ReduceLROnPlateau needs a metric to watch", "lr_scheduler.monitor", hint))
    if schedule.get("frequency", 1) < 1:
        title = f"frequency must be at least 1. Received: {schedule['frequency']}."
        raise ConfigError(tree.problem(title, "lr_scheduler.frequency"))


def _schedule(config: Any) -> dict[str, Any]:
    given = {key: config.get(f"lr_scheduler_{key}") for key in SCHEDULE_KEYS}
    return {key: value for key, value in given.items() if value is not None}


def configured_optimizers(module: Module, optimizer: Any, scheduler: Any, schedule: dict[str, Any], tree: Tree) -> Any:
    """Make the optimizer and the schedule of a config; stands in for a module's configure_optimizers."""
    made = _from_spec(optimizer, module.parameters(), "optimizer", tree)
    if scheduler is None:
        return made
    return {
        "optimizer": made,
        "lr_scheduler": {"scheduler": _from_spec(scheduler, made, "lr_scheduler", tree), **schedule},
    }


def _from_spec(spec: Any, first: Any, key: str, tree: Tree) -> Any:
    cls = load(spec.class_path)
    inits = spec.get("init_args")
    arguments = vars(inits) if inits is not None else {}
    extra = spec.get("dict_kwargs") or {}
    return _construct(cls, (first,), {**arguments, **dict(extra)}, key, tree)
