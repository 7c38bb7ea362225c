"""Check the Trainer's arguments when it is made: what was given, what is possible, what to write instead."""

from __future__ import annotations

import ast
import functools
import math
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from trainkit.duration import parse_duration
from trainkit.errors import MisconfigurationException, WrongTypeException, warn


def count(name: str, value: Any, *, least: int, required: bool = False, what: str = "a whole number") -> Any:
    """Return a whole number of at least `least`; or None, unless it is required."""
    if value is None and not required:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongTypeException(f"{name} must be {what}. Received: {value!r}.")
    if value < least:
        meaning = " (-1: no limit)" if least == -1 else ""
        raise MisconfigurationException(f"{name} must be at least {least}{meaning}. Received: {value!r}.")
    return value


def trial(name: str, value: Any) -> int | bool:
    """Return fast_dev_run as it was given: whether to, or a number of batches."""
    if isinstance(value, bool):
        return value
    batches: int = count(name, value, least=0, required=True, what="True, False or a number of batches")
    return batches


def folder(name: str, value: Any) -> str:
    """Return a folder's absolute path, the current one for None."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise WrongTypeException(f"{name} must be a path. Received: {value!r}.")
    path: str = os.path.abspath(os.path.expanduser(os.fspath(value or ".")))
    return path


def order(low: str, least: int | None, high: str, most: int | None) -> None:
    """Warn of a minimum above its maximum: the maximum wins."""
    if least is not None and most is not None and most != -1 and least > most:
        warn(f"{low}={least} is more than {high}={most}: the run ends at {high}.")


def flag(name: str, value: Any, *also: Any) -> Any:
    """Return True, False, None, or one of the other values that are allowed."""
    if value is None or isinstance(value, bool) or value in also:
        return value
    allowed = ", ".join(map(repr, (True, False, *also)))
    raise WrongTypeException(f"{name} must be one of {allowed}. Received: {value!r}.")


def limit(name: str, value: float | None, default: float = 1.0) -> float:
    """Return a number of batches (int) or a fraction of them (float from 0.0 to 1.0)."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WrongTypeException(f"{name} must be a number of batches or a fraction of them. Received: {value!r}.")
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return value
    if value > 1.0 and value % 1.0 == 0.0:  # 2.0 and 1e6 can only be meant as numbers
        return int(value)
    raise MisconfigurationException(
        f"{name} must be a whole number of batches, at least 0, or a fraction from 0.0 to 1.0. Received: {value!r}."
    )


def clip_value(name: str, value: Any) -> float | None:
    """Return gradient_clip_val as it was given: a number, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise WrongTypeException(f"{name} must be a number. Received: {value!r}.")
    if value is not None and math.isnan(value):
        raise MisconfigurationException(
            f"{name} must be a number above 0, or None or 0 to clip nothing. Received: nan."
        )
    return value


def choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """Return one of the words, or None."""
    if value is None or value in choices:
        return value
    raise MisconfigurationException(f"{name} must be {' or '.join(map(repr, choices))}. Received: {value!r}.")


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "backend": (str, Callable),  # type: ignore[dict-item]
    "mode": (str,),
    "dynamic": (bool,),
    "fullgraph": (bool,),
    "options": (dict,),
}
"""What torch.compile takes."""


def compilation(name: str, value: Any) -> bool | str | dict[str, Any]:
    """Return what to compile with: False, True, a mode, "auto", "graph", or arguments of torch.compile."""
    if value is None or value is False:
        return False
    words = ("auto", "graph", *COMPILE_MODES)
    if value is True or (isinstance(value, str) and value in words):
        return value
    possible = f"True, False, {', '.join(map(repr, words))}, or a dict of {', '.join(COMPILE_ARGUMENTS)}"
    if isinstance(value, str):
        raise MisconfigurationException(f"{name} must be {possible}. Received: {value!r}.")
    if not isinstance(value, Mapping):
        raise WrongTypeException(f"{name} must be {possible}. Received: {value!r}.")
    for key, setting in value.items():
        if key not in COMPILE_ARGUMENTS:
            raise MisconfigurationException(
                f"{name}={dict(value)!r}: torch.compile has no {key!r}; a dict may have {', '.join(COMPILE_ARGUMENTS)}."
            )
        if setting is not None and not isinstance(setting, COMPILE_ARGUMENTS[key]):
            wanted = " or ".join(kind.__name__ for kind in COMPILE_ARGUMENTS[key])
            raise WrongTypeException(f"{name}: {key!r} must be of type {wanted}. Received: {setting!r}.")
    given = {key: setting for key, setting in value.items() if setting is not None}
    if "mode" in given and given["mode"] not in COMPILE_MODES:
        raise MisconfigurationException(
            f"{name}: 'mode' must be one of {', '.join(map(repr, COMPILE_MODES))}. Received: {given['mode']!r}."
        )
    if "mode" in given and "options" in given:
        raise MisconfigurationException(f"{name}: 'mode' stands for a set of 'options'. Give one of the two.")
    return given or True


def validation_interval(value: Any, every_n_epoch: int | None) -> float | timedelta:
    """Return val_check_interval: a fraction of the epoch, a number of batches, or a time."""
    if isinstance(value, (str, timedelta, Mapping)):
        return parse_duration(value, "val_check_interval")
    interval = limit("val_check_interval", value)
    if interval == 0:
        raise MisconfigurationException(
            f"val_check_interval={value!r} is never; limit_val_batches=0 turns validation off."
        )
    if isinstance(value, float) and every_n_epoch is None:
        raise MisconfigurationException(
            "check_val_every_n_epoch=None counts batches across epochs, so val_check_interval must be a whole number "
            f"of batches or a time. Received: val_check_interval={value!r}."
        )
    return interval


def watching(name: str, value: Any) -> bool | float | None:
    """Return watchdog: whether to, None for the default, or seconds."""
    if value is None or isinstance(value, bool):
        return value
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(seconds, (int, float)):
        raise WrongTypeException(f"{name} must be True, False, None, seconds or a timedelta. Received: {value!r}.")
    if not 0 < seconds < math.inf:
        raise MisconfigurationException(
            f"{name} must be a number of seconds above 0; False turns it off. Received: {value!r}."
        )
    return float(seconds)


def duration(name: str, value: Any) -> timedelta | None:
    """Return max_time as a timedelta."""
    return None if value is None else parse_duration(value, argument=name)


Check = Callable[[str, Any], Any]


def _count(least: int, default: int | None = None, required: bool = False) -> Check:
    def check(name: str, value: Any) -> Any:
        return count(name, default if value is None else value, least=least, required=required)

    return check


def _nodes(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MisconfigurationException(f"{name} must be a whole number of at least 1. Received: {value!r}.")
    return value


SETTINGS: dict[str, Check] = {
    "fast_dev_run": trial,
    "max_epochs": _count(-1),
    "max_steps": _count(-1, required=True),
    "min_epochs": _count(0),
    "min_steps": _count(0),
    "max_time": duration,
    "limit_train_batches": limit,
    "limit_val_batches": limit,
    "limit_test_batches": limit,
    "limit_predict_batches": limit,
    "overfit_batches": lambda name, value: limit(name, value, default=0.0),
    "check_val_every_n_epoch": _count(1),
    "num_sanity_val_steps": _count(-1, default=2),
    "log_every_n_steps": _count(0, default=50),
    "accumulate_grad_batches": _count(1, required=True),
    "gradient_clip_val": clip_value,
    "gradient_clip_algorithm": lambda name, value: choice(name, value, ("norm", "value")),
    "reload_dataloaders_every_n_epochs": _count(0, required=True),
    "num_nodes": _nodes,
    "deterministic": lambda name, value: flag(name, value, "warn"),
    "benchmark": flag,
    "inference_mode": flag,
    "detect_anomaly": flag,
    "nan_policy": lambda name, value: choice(name, "off" if value is None else value, ("off", "raise", "skip")),
    "compile": compilation,
    "matmul_precision": lambda name, value: choice(name, value, ("highest", "high", "medium")),
    "channels_last": flag,
    "fused_optimizers": lambda name, value: flag(name, True if value is None else value),
    "barebones": flag,
    "sync_batchnorm": flag,
    "use_distributed_sampler": flag,
    "keep_batch": lambda name, value: choice(name, "all" if value is None else value, ("all", "each")),
    "enable_autolog_hparams": flag,
    "watchdog": watching,
    "default_root_dir": folder,
}
"""The settings that are checked by themselves and become attributes of the Trainer."""


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among the Trainer's arguments, checked one by one and together."""
    values = {name: check(name, given[name]) for name, check in SETTINGS.items()}
    values["val_check_interval"] = validation_interval(given["val_check_interval"], values["check_val_every_n_epoch"])
    order("min_epochs", values["min_epochs"], "max_epochs", values["max_epochs"])
    order("min_steps", values["min_steps"], "max_steps", values["max_steps"])
    if values["barebones"]:
        _check_barebones(given)
        values.update(log_every_n_steps=0, num_sanity_val_steps=0)
    if values["num_sanity_val_steps"] == -1:
        values["num_sanity_val_steps"] = math.inf
    if batches := int(values["fast_dev_run"]):
        limits = dict.fromkeys(("train", "val", "test", "predict"), batches)
        values.update({f"limit_{kind}_batches": number for kind, number in limits.items()})
        values.update(max_epochs=1, max_steps=batches, num_sanity_val_steps=0)
        values.update(val_check_interval=1.0, check_val_every_n_epoch=1)
    if values["max_epochs"] is None and (values["max_steps"] != -1 or values["max_time"] is not None):
        values["max_epochs"] = -1
    if values["min_epochs"] is None and values["min_steps"] is not None:
        values["min_epochs"] = 1
    return values


NOT_BAREBONES = (
    "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps",
    "log_every_n_steps", "fast_dev_run", "detect_anomaly", "profiler",
)  # fmt: skip
"""What barebones turns off, and so can't be asked for beside it."""


def _check_barebones(given: Mapping[str, Any]) -> None:
    for name in NOT_BAREBONES:
        if given[name]:
            raise MisconfigurationException(
                f"{name}={given[name]!r} beside barebones=True, which turns it off to run at the bare speed of the "
                "loop. Leave one of the two out."
            )


F = TypeVar("F", bound=Callable[..., None])


def from_environment(init: F) -> F:
    """Let every argument that is not given come from the environment: PL_TRAINER_MAX_EPOCHS=3 is max_epochs=3.

    Values are Python literals where they can be read as such, else strings.
    """

    @functools.wraps(init)
    def with_defaults(self: Any, *unnamed: Any, **given: Any) -> None:
        if unnamed:
            raise WrongTypeException(
                f"Trainer takes its arguments by name, as in Trainer(max_epochs=3). Received without: {unnamed!r}."
            )
        prefix = "PL_TRAINER_"
        for variable, text in os.environ.items():
            name = variable.removeprefix(prefix).lower()
            if variable.startswith(prefix) and name in init.__annotations__ and name not in given:
                try:
                    given[name] = ast.literal_eval(text)
                except (ValueError, SyntaxError):
                    given[name] = text
        init(self, **given)

    return with_defaults  # type: ignore[return-value]
