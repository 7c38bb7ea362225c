"""YAML files and dotted options as one tree, whose nodes know where they were written.

jsonargparse reads the same files to run them. This tree is for what it can't tell: duplicate keys before anything is
parsed, and the file, line and column of whatever it refuses.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from trainkit.config.problems import FEW, ConfigError, Place, Problem, suggest

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
"""The keys of a value that names a class."""

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Node:
    """A value and its places.

    Args:
        content: a dict of nodes, a list of nodes, or a plain value.
        place: where the value stands.
        key_place: where its key stands, if it has one.
        text: how a plain value was written.
        inherited: an argument written for a class that a later file or option replaced; kept where it still fits.
    """

    content: Any
    place: Place
    key_place: Place | None = None
    text: str = ""
    inherited: bool = False

    @property
    def mapping(self) -> dict[str, Node] | None:
        """The mapping, or None for anything else."""
        content: Any = self.content
        return content if isinstance(content, dict) else None

    @property
    def where(self) -> Place:
        """Where its key stands, else the value."""
        return self.key_place or self.place

    def plain(self) -> Any:
        """Return the value as plain Python objects."""
        if isinstance(self.content, dict):
            return {key: node.plain() for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain() for node in self.content]
        return self.content

    def find(self, *keys: str) -> Node | None:
        """Return the node under these keys, one below the other, or None."""
        node: Node | None = self
        for key in keys:
            node = node.mapping.get(key) if node is not None and node.mapping is not None else None
        return node


def empty() -> Node:
    """Return a tree with nothing in it."""
    return Node({}, Place("command line"))


def read(path: str) -> tuple[Node, list[Problem]]:
    """Read a config file; return its tree, and what is wrong with it although it can be read, like duplicate keys.

    Raises:
        ConfigError: it is missing, unreadable, empty, not YAML, not a mapping, or has tags or an endless alias.
    """
    text = _text(path)
    lines = text.splitlines()
    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax(error, path, lines)) from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(Problem(f"not YAML: {error}".splitlines()[0], Place(path))) from None
    if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
        raise ConfigError(Problem("the config file is empty", Place(path), hint=_needs()))
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(Problem("the config file is not a mapping of keys", Place(path), hint=_needs()))
    reader = _Reader(path, lines)
    tree = reader.node(root, "")
    if reader.refused:
        raise ConfigError(reader.refused + reader.duplicates)
    return tree, reader.duplicates


def from_plain(value: Any, place: Place) -> Node:
    """Return a tree of plain Python objects that all stand at one place."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(item, place) for key, item in value.items()}, place, place)
    if isinstance(value, list):
        return Node([from_plain(item, place) for item in value], place, place)
    return Node(value, place, place, text=value if isinstance(value, str) else "")


def from_option(value: str, place: Place) -> Node:
    """Return what an option's value means, as jsonargparse reads it."""
    node = from_plain(meaning(value), place)
    node.text = value
    return node


def meaning(text: str) -> Any:
    """Return what a value means that is written as this text, without quotes: "3" is 3, "a: 1" a mapping."""
    try:
        return jsonargparse.get_loader("yaml")(text) if text.strip() else text
    except (yaml.YAMLError, TypeError):  # TypeError: jsonargparse looks for flow mappings in a text like "1:"
        return text


def merge(below: Node | None, above: Node) -> Node:
    """Lay one tree over another: mappings are merged, everything else is replaced."""
    if below is None:
        return above
    if names_class(below) and above.mapping is not None and set(above.mapping) & set(CLASS_KEYS):
        below = Node({"class_path": below}, below.place, below.key_place)
    if names_class(above) and below.find("class_path") is not None:
        above = Node({"class_path": above}, above.place, above.key_place)
    if below.mapping is None or above.mapping is None:
        return above
    merged = dict(below.mapping)
    before, after = below.find("class_path"), above.find("class_path")
    if before is not None and after is not None and before.content != after.content:
        arguments = below.find("init_args")
        if arguments is not None and arguments.mapping is not None:
            kept = {
                key: Node(node.content, node.place, node.key_place, node.text, inherited=True)
                for key, node in arguments.mapping.items()
            }
            merged["init_args"] = Node(kept, arguments.place, arguments.key_place)
    for key, node in above.mapping.items():
        if key.endswith("+"):
            name = key[:-1]
            merged[name] = append(merged.get(name), node)
        else:
            merged[key] = merge(merged.get(key), node)
    return Node(merged, above.place, above.key_place or below.key_place)


def append(below: Node | None, node: Node) -> Node:
    """Return the list with one item, or another list's items, added."""
    items = list(below.content) if below is not None and isinstance(below.content, list) else []
    added = node.content if isinstance(node.content, list) else [node]
    return Node([*items, *added], node.place, node.key_place)


def names_class(node: Node) -> bool:
    """Whether a value may be a class path or a short name."""
    return isinstance(node.content, str) and file_of(node) is None


def file_of(node: Node) -> str | None:
    """Return the file that stands for its contents here; its path is relative to the file that names it."""
    if not isinstance(node.content, str):
        return None
    folder = os.path.dirname(node.place.source) if node.place.line else ""
    path = os.path.join(folder, node.content)
    return path if os.path.isfile(path) else None


def _needs() -> str:
    return "it needs at least `model:` with a class_path; see docs/configuration.md"


def _text(path: str) -> str:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(Problem(f"no config file {path!r}", hint=_looked(path))) from None
    except IsADirectoryError:
        raise ConfigError(Problem(f"{path!r} is a directory, not a config file", hint=_candidates(path))) from None
    except OSError as error:
        raise ConfigError(Problem(f"the config file can't be read: {error.strerror}", Place(path))) from None
    except UnicodeDecodeError as error:
        message = f"the config file is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ConfigError(Problem(message, Place(path))) from None
    return text


def _looked(path: str) -> str:
    folder = os.path.dirname(path) or "."
    here = _files(folder)
    looked = f"looked in {os.path.abspath(folder)}"
    return f"{suggest(os.path.basename(path), here)}\n{looked}" if here else looked


def _candidates(folder: str) -> str:
    here = _files(folder)
    return f"it has: {', '.join(here[:FEW])}{', ...' if len(here) > FEW else ''}" if here else ""


def _files(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith((".yaml", ".yml")))
    except OSError:
        return []


def _syntax(error: yaml.MarkedYAMLError, path: str, lines: list[str]) -> Problem:
    what = error.problem or error.context or "it can't be read"
    mark, hint = error.problem_mark or error.context_mark, ""
    if error.context_mark is not None and error.context is not None and "flow" in error.context:
        line = mark.line + 1 if mark is not None else 0
        mark, hint = error.context_mark, f"what begins here is not closed; noticed in line {line}"
    elif "mapping values are not allowed" in what:
        hint = "check the indentation, and the quotes around ':', in this line and the one above"
    if mark is None:
        return Problem(f"not YAML: {what}", Place(path), hint=hint)
    line = min(mark.line, max(len(lines) - 1, 0))
    text = lines[line] if lines else ""
    column = mark.column if line == mark.line else len(text)
    if text[column : column + 1] == "\t":
        hint = "indent with spaces: YAML allows no tabs there"
    return Problem(f"not YAML: {what}", Place(path, line + 1, column + 1, 1, text), hint=hint)


class _Reader:
    """Turn yaml's nodes into ours and note what no config may have: duplicate keys, tags, loops."""

    def __init__(self, path: str, lines: list[str]) -> None:
        self.path, self.lines = path, lines
        self.refused: list[Problem] = []
        self.duplicates: list[Problem] = []
        self._open: list[int] = []

    def place(self, node: yaml.Node) -> Place:
        start, end = node.start_mark, node.end_mark
        text = self.lines[start.line] if start.line < len(self.lines) else ""
        length = end.column - start.column if end.line == start.line else len(text.rstrip()) - start.column
        return Place(self.path, start.line + 1, start.column + 1, max(length, 1), text)

    def node(self, node: yaml.Node, key: str) -> Node:
        place = self.place(node)
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.refused.append(Problem(f"a config has no tags like {tag!r}", place, key))
            return Node(None, place)
        if id(node) in self._open:
            self.refused.append(Problem("this alias stands inside the value it means", place, key))
            return Node(None, place)
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node), place, text=node.value)
        self._open.append(id(node))
        if isinstance(node, yaml.SequenceNode):
            items = [self.node(item, f"{key}[{index}]") for index, item in enumerate(node.value)]
            result = Node(items, place)
        else:
            result = Node(self._mapping(node, key), place)
        self._open.pop()
        return result

    def _mapping(self, mapping: yaml.Node, key: str) -> dict[str, Node]:
        own: dict[str, Node] = {}
        shared: dict[str, Node] = {}
        for name_node, value_node in mapping.value:
            if name_node.tag == "tag:yaml.org,2002:merge":
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    content = self.node(source, key).mapping or {}
                    shared.update({name: node for name, node in content.items() if name not in shared})
                continue
            name = str(name_node.value)
            path = f"{key}.{name}" if key else name
            place = self.place(name_node)
            if name in own:
                first = own[name].where.line
                hint = f"it stands in line {first} already, and that value would be lost"
                self.duplicates.append(Problem(f"duplicate key {name!r}", place, path, hint))
            own[name] = self.node(value_node, path)
            own[name].key_place = place
        return {**shared, **own}

    @staticmethod
    def _scalar(node: yaml.ScalarNode) -> Any:
        if node.style:  # quoted, or a block
            return node.value
        return meaning(node.value) if node.value else None
