"""All files and options of a command as one tree: what was asked for, and where each part of it was written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainkit.config.document import CLASS_KEYS, Node, append, empty, file_of, from_option, merge, names_class, read
from trainkit.config.parser import LEFT_OUT, SCHEDULE_KEYS
from trainkit.config.problems import Place, Problem
from trainkit.config.signatures import Parameter, Parameters, bases, class_parameters, find_class


def top_level(parameters: Parameters) -> Parameters:
    """Return the keys of a config as a file has them, without the parser's own."""
    return {key: value for key, value in parameters.items() if not key.startswith("lr_scheduler_")}


class Tree:
    """All files and options of a command as one tree, with the parser's arguments beside it."""

    def __init__(self, files: Sequence[Node], options: Sequence[tuple[str, str]], parameters: Parameters) -> None:
        self.parameters = top_level(parameters)
        self.beside = {
            "lr_scheduler": {
                key: value
                for key in SCHEDULE_KEYS
                if isinstance(value := parameters.get(f"lr_scheduler_{key}"), Parameter)
            }
        }
        self.files = list(files)
        self.root = empty()
        for file in files:
            self.root = merge(self.root, file)
        for option, text in options:
            place = Place(f"command line: --{option}{'=' if option.endswith('+') else ' '}{text}".rstrip())
            self.root = self._put(self.root, self.parameters, option.split("."), from_option(text, place), "")

    def find(self, key: str) -> Node | None:
        """Return the node of a dotted key like `trainer.callbacks[0].init_args.monitor`."""
        node: Node | None = self.root
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key):
            if node is None:
                return None
            if index:
                items = node.content if isinstance(node.content, list) else [node]
                node = items[int(index)] if int(index) < len(items) else None
            else:
                node = node.find(name)
        return node

    def place(self, key: str) -> Place | None:
        """Return where a dotted key was written, or None for one that was not."""
        node = self.find(key)
        return node.where if node is not None else None

    def problem(self, title: str, key: str, hint: str = "") -> Problem:
        """Return a problem at the place of a key, or of the nearest key above it that was written."""
        above = key
        while self.find(above) is None and above:
            above = re.sub(r"(\[\d+\]|(^|\.)[^.\[\]]+)$", "", above)
        place = self.place(above) if above else None
        if place is None and self.files:
            place = Place(self.files[0].place.source)
        return Problem(title, place, key, hint)

    # ------------------------------------------------------------ options onto the tree
    def _put(self, node: Node | None, known: Any, keys: list[str], value: Node, path: str) -> Node:
        """Return the node with an option's value put under its keys, as jsonargparse would."""
        if not keys:
            return merge(node, value)
        key, rest = keys[0], keys[1:]
        if isinstance(known, Mapping):
            return self._child(node, known.get(key.removesuffix("+")), key, rest, value, path)
        hint = known.hint if isinstance(known, Parameter) else None
        slots = bases(hint) if hint is not None else ()
        if not slots:
            return self._child(node, None, key, rest, value, path)
        if node is not None and isinstance(node.content, list) and node.content:
            last = self._put(node.content[-1], known, keys, value, path)
            return Node([*node.content[:-1], last], node.place, node.key_place)
        if node is not None and (file := file_of(node)):
            node = read(file)[0]
        elif node is not None and names_class(node):
            node = Node({"class_path": node}, node.place, node.key_place)
        if key in CLASS_KEYS and key != "init_args":
            return self._child(node, None, key, rest, value, path)
        if key in self.beside.get(path, {}):
            return self._child(node, self.beside[path][key], key, rest, value, path)
        if key != "init_args":
            keys = ["init_args", *keys]
        elif not rest:
            return self._child(node, None, key, rest, value, path)
        arguments = node.find("init_args") if node is not None else None
        inner = self._put(arguments, self._arguments(node, slots, path), keys[1:], value, f"{path}.init_args")
        content = dict(node.mapping or {}) if node is not None else {}
        return Node({**content, "init_args": inner}, *_places(node, value))

    def _child(self, node: Node | None, known: Any, key: str, rest: list[str], value: Node, path: str) -> Node:
        content = dict(node.mapping or {}) if node is not None else {}
        name = key.removesuffix("+")
        inner = f"{path}.{name}" if path else name
        if key.endswith("+") and not rest:
            content[name] = append(content.get(name), value)
        else:
            content[name] = self._put(content.get(name), known, rest, value, inner)
        return Node(content, *_places(node, value))

    @staticmethod
    def _arguments(node: Node | None, slots: tuple[type, ...], path: str) -> Parameters:
        class_path = node.find("class_path") if node is not None else None
        try:
            if class_path is not None and names_class(class_path):
                return class_parameters(find_class(class_path.content, slots), LEFT_OUT.get(path, ()))
        except Exception:  # told where the class path is checked
            pass
        return {}


def _places(node: Node | None, value: Node) -> tuple[Place, Place | None]:
    return (node.place, node.key_place) if node is not None else (value.place, None)
