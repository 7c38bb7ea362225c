"""Why the parser refused a config: every problem, with the place where it was written.

jsonargparse alone decides what is valid. Once it has refused, the tree is walked along the same signatures: a value is
wrong when jsonargparse refuses it for its type, a key when jsonargparse does not know it.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from trainkit.config import document
from trainkit.config.document import CLASS_KEYS, Node, file_of, names_class
from trainkit.config.parser import LEFT_OUT
from trainkit.config.problems import Place, Problem, suggest
from trainkit.config.signatures import (
    ClassProblem,
    Parameter,
    Parameters,
    allows_nothing,
    bases,
    class_parameters,
    describe,
    find_class,
    item_hint,
    known_classes,
    literals,
    load,
    needed,
    refuses,
    specs,
)
from trainkit.config.tree import Tree

FOREIGN = {"trainkit", "jsonargparse", "torch", "torchvision", *sys.stdlib_module_names}
"""Packages whose frames tell a user nothing about their own code."""

DULL = (
    "Parser key",
    "Does not validate",
    "Subtypes:",
    "Subtype errors:",
    "Errors:",
    "Given value",
    "Known subclasses:",
    "Source:",
    "Expected a <class 'NoneType'>",
)
"""How lines of jsonargparse's messages begin that say nothing to a user."""

COMMANDS = ("fit", "validate", "test", "predict")


def explain(tree: Tree, refusal: Exception) -> list[Problem]:
    """Return what is wrong, given what the parser said."""
    search = _Search(tree, complete=True)
    search.mapping(tree.root, tree.parameters, "")
    if not search.problems:  # what one file has wrong and a later one repairs is refused as well
        for file in tree.files:
            search = _Search(tree, complete=False)
            search.mapping(file, tree.parameters, "")
            if search.problems:
                break
    return search.problems or [translated(refusal, tree)]


def unsaid(tree: Tree, config: Any) -> list[Problem]:
    """Return the arguments without a default that nobody gave, where the parser let them be None."""
    problems = []
    for key, class_path, arguments in specs(config):
        node = tree.find(key)
        if node is None or file_of(node):  # given in a file of its own
            continue
        cls = load(class_path)
        for name in sorted(needed(cls) - LEFT_OUT.get(key, set())):
            inner = f"{key}.init_args.{name}"
            if name in arguments and arguments[name] is None and tree.find(inner) is None:
                hint = f"{cls.__name__} needs it: {_says(class_parameters(cls)[name])}"
                place = (node.find("class_path") or node).place
                problems.append(Problem(f"missing key {name!r} in '{key}.init_args'", place, inner, hint))
    return problems


class _Search:
    """The walk. `complete` is whether a missing key is a problem: not in one file of several."""

    def __init__(self, tree: Tree, complete: bool) -> None:
        self.tree, self.complete = tree, complete
        self.problems: list[Problem] = []

    def add(self, title: str, place: Place | None, key: str, hint: str = "") -> None:
        self.problems.append(Problem(title, place, key, hint))

    def mapping(self, node: Node, known: Parameters, path: str, owner: type | None = None) -> None:
        """Check a mapping's keys and values against the arguments of a group or a class."""
        if node.mapping is None:
            what = f"the arguments of {owner.__name__}" if owner else "keys and values"
            file = file_of(node)
            if file is None:
                self.add(f"expected a mapping: {what}", node.where, path, f"got {shown(node)}")
                return
            node, _ = document.read(file)
        for key, child in (node.mapping or {}).items():
            name = key.removesuffix("+")
            inner = f"{path}.{name}" if path else name
            if name in known:
                self.value(child, known[name], inner)
            elif not child.inherited:
                title = f"unknown key {key!r}" + (f" in {path!r}" if path else "")
                if owner is not None:
                    title = f"unknown key {key!r}: {owner.__name__} has no such argument"
                self.add(title, child.where, inner, self._instead(key, child, known, path, owner))
        if self.complete:
            self._missing(node, known, path, owner)

    def _missing(self, node: Node, known: Parameters, path: str, owner: type | None) -> None:
        given = {key.removesuffix("+") for key in node.mapping or {}}
        for key, parameter in known.items():
            if isinstance(parameter, Parameter) and parameter.required and key not in given:
                needs = f"{owner.__name__} needs it" if owner else "it has no default"
                where = self.tree.find(path.removesuffix(".init_args"))
                class_path = where.find("class_path") if where is not None else None
                place = (class_path or where or node).place
                self.add(f"missing key {key!r} in {path!r}", place, f"{path}.{key}", f"{needs}: {_says(parameter)}")

    def _instead(self, key: str, node: Node, known: Parameters, path: str, owner: type | None) -> str:
        if not path and key in COMMANDS:
            return f"a config has no commands in it: write what is under {key!r} at the top level"
        if not path and key == "config":
            return "give several files on the command line: --config A --config B; they are merged in order"
        source = node.where.source
        if source.startswith("command line: "):
            option = source.removeprefix("command line: ").split(" ")[0].split("=")[0]
            close = suggest(key, known if path else (*known, "config"))
            meant = close.removeprefix("did you mean '").removesuffix("'?")
            return f"did you mean '{option.replace(key, meant, 1)}'?" if meant != close else close
        if not known:
            return f"{owner.__name__} takes no arguments" if owner else "nothing is known here"
        return suggest(key, known)

    def value(self, node: Node, known: Parameter | Parameters, path: str) -> None:
        """Check one value, and what is inside it, against an argument."""
        if isinstance(known, dict):
            if node.content is not None:
                self.mapping(node, known, path)
            return
        if node.content is None and known.required and not allows_nothing(known.hint):
            self._unfit(node, known, path)  # to jsonargparse a null is an argument that was not given
            return
        beside = self.tree.beside.get(path, {})
        skip = LEFT_OUT.get(path, set())
        slots = bases(known.hint)
        plain = node.plain()
        elsewhere = beside or skip or (not self.complete and node.mapping is not None)
        if not (slots and elsewhere) and not refuses(known.hint, plain):  # else arguments may come from elsewhere
            return
        named = names_class(node) and ("." in node.content or not literals(known.hint))
        if slots and (node.mapping is not None or named or file_of(node)):
            self._class(node, slots, path, skip, beside)
        elif isinstance(node.content, list) and item_hint(known.hint) is not None:
            for index, item in enumerate(node.content):
                self.value(item, Parameter(item_hint(known.hint)), f"{path}[{index}]")
        elif not node.inherited and refuses(known.hint, plain):
            self._unfit(node, known, path)

    def _unfit(self, node: Node, known: Parameter, path: str) -> None:
        hint = ""
        text = node.text or str(node.content)
        names = literals(known.hint)
        if isinstance(node.content, (int, float, bool)) and describe(known.hint).startswith("a string"):
            hint = f'write it in quotes: "{text}"'
        elif names and isinstance(node.content, str) and suggest(text, names).startswith("did you mean"):
            hint = suggest(text, names)
        self.add(f"expected {describe(known.hint)}, got {shown(node)}", node.place, path, hint)

    def _class(
        self, node: Node, slots: tuple[type, ...], path: str, skip: set[str], beside: Mapping[str, Parameter]
    ) -> None:
        if file := file_of(node):
            node, _ = document.read(file)
        spec = node.mapping if node.mapping is not None else {"class_path": node}
        class_path = spec.get("class_path") or self._class_of(path)
        if class_path is None:
            hint = "write `class_path: package.module.Class`, and its arguments under `init_args:`"
            if node.where.source.startswith("command line"):
                hint = f"name the class first: --{path} {next(iter(known_classes(slots)), 'package.module.Class')}"
            self.add(f"missing key 'class_path' in {path!r}", node.where, f"{path}.class_path", hint)
            return
        if not names_class(class_path):
            title = f"expected a class path, got {shown(class_path)}"
            self.add(title, class_path.place, f"{path}.class_path", "like package.module.Class, or a short name")
            return
        try:
            cls = find_class(class_path.content, slots)
        except ClassProblem as problem:
            key = path if names_class(node) else f"{path}.class_path"
            hint = "\n".join(user_frames(problem.cause)) if problem.cause is not None else problem.hint
            self.add(problem.title, class_path.place, key, hint)
            return
        arguments = class_parameters(cls, skip)
        for key, child in spec.items():
            inner = f"{path}.{key}"
            if key in beside:
                self.value(child, beside[key], inner)
            elif key not in CLASS_KEYS:
                hint = suggest(key, (*CLASS_KEYS, *beside))
                if key in arguments:
                    hint = f"the arguments of {cls.__name__} go under 'init_args'"
                self.add(f"unknown key {key!r} in {path!r}", child.where, inner, hint)
        inits = spec.get("init_args")
        if inits is None or inits.content is None:
            inits = Node({}, class_path.place, class_path.key_place)
        if "dict_kwargs" not in spec:
            self.mapping(inits, arguments, f"{path}.init_args", cls)

    def _class_of(self, path: str) -> Node | None:
        """Return the class path that another file or option gives a slot."""
        node = self.tree.find(path)
        if node is None:
            return None
        return node if names_class(node) else node.find("class_path")


def _says(parameter: Parameter | Parameters) -> str:
    if not isinstance(parameter, Parameter):
        return "a mapping"
    return describe(parameter.hint)


def shown(node: Node) -> str:
    """Say what a value is, for "expected ..., got ...": its text, or its kind."""
    if isinstance(node.content, dict):
        return "a mapping"
    if isinstance(node.content, list):
        return "a list"
    if node.content is None:
        return "nothing" if not node.text else "null"
    if isinstance(node.content, str):
        return repr(node.content if len(node.content) <= 60 else f"{node.content[:57]}...")
    return node.text or str(node.content).lower()


def user_frames(error: BaseException, limit: int = 3) -> list[str]:
    """Return the last places in the user's own code that an error came through, innermost last."""
    own = [
        (frame.f_code, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in FOREIGN
    ]
    lines = []
    for code, line in own[-limit:]:
        text = linecache.getline(code.co_filename, line).strip()
        lines.append(f"{os.path.relpath(code.co_filename)}:{line} in {code.co_name}: {text}")
    if isinstance(error, SyntaxError) and error.filename:
        lines.append(f"{os.path.relpath(error.filename)}:{error.lineno}: {(error.text or '').strip()}")
    return lines


def translated(refusal: Exception, tree: Tree) -> Problem:
    """Return the parser's own words, shortened: for what the walk does not find."""
    text = str(refusal)
    key_found = re.search(r'Parser key "([^"]+)"', text)
    key = key_found.group(1) if key_found else ""
    lines = [line.strip(" -") for line in text.splitlines()]
    told = [line for line in lines if line and not line.startswith(DULL)]
    told = [line for line in told if not line.startswith("Expected type:")] or told
    return tree.problem(told[0] if told else text.splitlines()[0], key, "\n".join(told[1:3]))
