"""The pages behind `--KEY.help`: the arguments of a class, or the classes that fit a slot."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

from trainkit import Trainer
from trainkit.config.parser import LEFT_OUT
from trainkit.config.problems import ConfigError, Place, Problem, suggest
from trainkit.config.signatures import (
    ClassProblem,
    Parameter,
    bases,
    class_parameters,
    describe,
    find_class,
    item_hint,
    known_classes,
)
from trainkit.config.tree import Tree

WIDTH = 100


def page(tree: Tree, key: str, name: str) -> str:
    """Return the help page of a key: of the class called `name`, of the config's class, or a list of classes.

    Raises:
        ConfigError: no such key, no such class, or a key that takes no class.
    """
    place = Place(f"command line: --{key}.help {name}".rstrip())
    known: Any = tree.parameters
    for part in key.split("."):
        if not isinstance(known, dict) or part not in known:
            hint = suggest(part, known) if isinstance(known, dict) else ""
            raise ConfigError(Problem(f"unknown key {key!r}", place, key, hint))
        known = known[part]
    if isinstance(known, dict):
        return arguments(Trainer, key, set())
    slots = bases(known.hint) or tuple(base for item in _items(known) for base in bases(item))
    if not slots:
        return f"--{key}  {describe(known.hint)}{_default(known)}"
    given = tree.find(key)
    given = given.find("class_path") or given if given is not None else None
    if not name and given is not None and isinstance(given.content, str):
        name = given.content
    if not name:
        return listing(slots, key)
    try:
        return arguments(find_class(name, slots), key, LEFT_OUT.get(key, set()))
    except ClassProblem as problem:
        raise ConfigError(Problem(problem.title, place, key, problem.hint)) from None


def arguments(cls: type, key: str, skip: set[str]) -> str:
    """Describe a class and each of its arguments, as options under a key."""
    told = documented(cls)
    lines = [f"{cls.__name__}: {_first_line(cls)}", ""]
    for name, parameter in class_parameters(cls, skip).items():
        if not isinstance(parameter, Parameter):
            lines.append(f"--{key}.{name}  a group: {', '.join(parameter)}")
            continue
        says = describe(parameter.hint)
        needed = "  (required)" if parameter.required else _default(parameter)
        lines += textwrap.wrap(f"--{key}.{name}  {says}{needed}", WIDTH, subsequent_indent="      ")
        if name in told:
            lines += textwrap.wrap(told[name], WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def listing(slots: tuple[type, ...], key: str) -> str:
    """List the classes that fit a slot by short name."""
    known = known_classes(slots)
    wanted = " or ".join(slot.__name__ for slot in slots)
    if not known:
        return f"--{key} takes a {wanted} of your own: give its full path, like package.module.Class"
    width = max(map(len, known))
    lines = [f"--{key} takes a {wanted}, one of these or the full path of your own:", ""]
    for name, cls in sorted(known.items()):
        line = f"  {name:<{width}}  {_first_line(cls)}"
        lines.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ...")
    return "\n".join([*lines, "", f"--{key}.help NAME shows the arguments of one"])


def documented(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class, its bases and their constructors say of each argument."""
    told: dict[str, str] = {}
    for base in cls.__mro__[:-1]:
        for owner in (base, vars(base).get("__init__")):
            document = inspect.cleandoc(getattr(owner, "__doc__", None) or "")
            section = re.search(r"^(?:Args|Arguments|Parameters):\n((?:[ \t]+.*\n?|\n)+)", document, re.MULTILINE)
            if section is None:
                continue
            body = textwrap.dedent(section.group(1))
            for entry in re.split(r"\n(?=\S)", body):
                found = re.match(r"\*{0,2}(\w+)[^:\n]*:\s*(.*)", entry, re.DOTALL)
                if found:
                    told.setdefault(found.group(1), " ".join(found.group(2).split()))
    return told


def _first_line(cls: type) -> str:
    own = vars(cls).get("__doc__") or ""
    return next((line.strip() for line in own.splitlines() if line.strip()), "")


def _default(parameter: Any) -> str:
    default = parameter.default
    text = {None: "null", True: "true", False: "false"}.get(default) if _is_plain(default) else None
    return f"  (default: {text if text is not None else default})"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _items(parameter: Parameter) -> list[Any]:
    item = item_hint(parameter.hint)
    return [item] if item is not None else []
