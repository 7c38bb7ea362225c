"""Let config files say `class_path: lightning.pytorch.callbacks.Timer`, and mean trainkit's.

A program changes its import lines; its YAML files, and those that Lightning saved, it need not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import jsonargparse

from trainkit.lightning.names import MODULES, ROOT

PACKAGES = {"lightning": "", "pytorch_lightning": "pytorch", "lightning_fabric": "fabric"}
"""The packages that Lightning comes as -> the module of the table that each of them is."""


@contextmanager
def standing_in() -> Iterator[None]:
    """Import trainkit's modules under Lightning's names inside this block.

    Nothing is left behind, and nothing happens in a program that has imported Lightning itself.
    """
    if _has_lightning():
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]


def renamed(value: Any) -> Any:
    """Return a parsed config with the classes that it names as Lightning does under their names here."""
    if isinstance(value, jsonargparse.Namespace):
        for key, inner in vars(value).items():
            setattr(value, key, _class_path(inner) if key == "class_path" else renamed(inner))
    elif isinstance(value, list):
        value[:] = map(renamed, value)
    return value


def _class_path(given: Any) -> Any:
    is_theirs = isinstance(given, str) and given.partition(".")[0] in PACKAGES
    return f"{ROOT}.{_entry(given)}" if is_theirs and not _has_lightning() else given


def _has_lightning() -> bool:
    return any(package in sys.modules for package in PACKAGES)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES or _entry(fullname) not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(f"{ROOT}.{_entry(module.__name__)}".rstrip("."))


def _entry(name: str) -> str:
    package, _, rest = name.partition(".")
    return ".".join(part for part in (PACKAGES[package], rest) if part)
