"""Hyperparameters in a YAML file, or in a CSV file with the columns key and value."""

from __future__ import annotations

import csv
from argparse import Namespace
from ast import literal_eval
from collections.abc import Mapping
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

from trainkit.errors import warn

StrPath = str | PathLike[str]


def load_hparams(path: StrPath) -> dict[str, Any]:
    """Return the hyperparameters in a file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is neither YAML nor CSV by its name, or does not hold a mapping.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".yaml", ".yml"):
        raise ValueError(f"hparams_file must be a .yaml, .yml or .csv file. Received: {path}.")
    return _from_csv(path) if kind == ".csv" else _from_yaml(path)


def load_hparams_from_yaml(config_yaml: StrPath, use_omegaconf: bool = True) -> dict[str, Any]:
    """Return the hyperparameters in a YAML file; nothing, with a warning, if it is not there.

    Args:
        config_yaml: the file.
        use_omegaconf: kept for Lightning's signature; plain dicts are returned.
    """
    return _from_yaml(Path(config_yaml)) if _is_there(config_yaml) else {}


def load_hparams_from_tags_csv(tags_csv: StrPath) -> dict[str, Any]:
    """Return the hyperparameters in a CSV file; nothing, with a warning, if it is not there."""
    return _from_csv(Path(tags_csv)) if _is_there(tags_csv) else {}


def save_hparams_to_yaml(
    config_yaml: StrPath, hparams: Mapping[str, Any] | Namespace, use_omegaconf: bool = True
) -> None:
    """Write hyperparameters to a YAML file; those that YAML can't hold are left out with a warning.

    Args:
        config_yaml: the file; its folder must be there.
        hparams: a mapping or a Namespace.
        use_omegaconf: kept for Lightning's signature; plain YAML is written.

    Raises:
        RuntimeError: there is no such folder.
        TypeError: neither a mapping nor a Namespace.
    """
    import yaml

    path = _in_a_folder(config_yaml)
    kept = {}
    for name, given in _mapping(hparams).items():
        value = given.name if isinstance(given, Enum) else given
        try:
            yaml.dump(value)
        except (TypeError, ValueError):
            warn(f"hyperparameter {name!r} ({type(value).__name__}) can't be written to YAML, and is left out.")
        else:
            kept[name] = value
    path.write_text(yaml.dump(kept))


def save_hparams_to_tags_csv(tags_csv: StrPath, hparams: Mapping[str, Any] | Namespace) -> None:
    """Write hyperparameters to a CSV file with the columns key and value; see `save_hparams_to_yaml`."""
    with _in_a_folder(tags_csv).open("w", newline="") as file:
        csv.writer(file).writerows([("key", "value"), *_mapping(hparams).items()])


def _mapping(hparams: Mapping[str, Any] | Namespace) -> Mapping[str, Any]:
    given = vars(hparams) if isinstance(hparams, Namespace) else hparams
    if not isinstance(given, Mapping):
        raise TypeError(f"hparams must be a mapping or a Namespace. Received: {type(given).__name__}.")
    return given


def _from_yaml(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values, and the tuples that yaml.dump writes."""

    def construct_tuple(loader: Any, node: Any) -> tuple[Any, ...]:
        return tuple(loader.construct_sequence(node, deep=True))

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", construct_tuple)
    with path.open() as file:
        loaded = yaml.load(file, Loader)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must be a YAML mapping of hyperparameters. Received: {type(loaded).__name__}.")
    return loaded


def _from_csv(path: Path) -> dict[str, Any]:
    with path.open(newline="") as file:
        return {row[0]: _literal(row[1]) for row in list(csv.reader(file))[1:]}


def _literal(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_there(path: StrPath) -> bool:
    there = Path(path).exists()
    if not there:
        warn(f"{path} is not there, so it has no hyperparameters.")
    return there


def _in_a_folder(path: StrPath) -> Path:
    path = Path(path)
    if not path.parent.is_dir():
        raise RuntimeError(f"the folder {path.parent} is not there. Make it before writing hyperparameters to it.")
    return path
