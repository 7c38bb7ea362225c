"""Imports point down: the floors of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("components", "callbacks"): "a Trainer brings callbacks of its own: checkpoint, progress bar, summary, timer",
    ("status", "callbacks"): "`trainer.early_stopping_callback` and its like find a callback by its class",
}
"""(importing module, imported module) -> the reason; inside a function only."""

CLI_ONLY = {"yaml", "jsonargparse"}
"""What the command line's own modules may import at the top, because they are imported late themselves."""

LINES = 600
"""A file that wants more is two ideas."""


class Import(NamedTuple):
    """One imported module, where it is imported, and whether a function is around the import."""

    target: str
    line: int
    late: bool


def module_name(path: Path) -> str:
    """Give the name under `trainkit.`: data/loader.py -> data.loader, callbacks/timer.py -> callbacks.timer."""
    relative = path.relative_to(CHECKOUT).with_suffix("")
    parts = relative.parts[1:] if relative.parts[0] == "trainkit" else relative.parts
    return ".".join(part for part in parts if part != "__init__")


def sources() -> dict[str, Path]:
    trainkit = [
        path for path in CHECKOUT.glob("trainkit/**/*.py") if "callbacks" not in path.parts[len(CHECKOUT.parts) :]
    ]
    return {module_name(path): path for path in sorted([*trainkit, *CHECKOUT.glob("callbacks/**/*.py")])}


SOURCES = sources()


def floors() -> dict[int, list[str]]:
    """Read the table of docs/architecture.md: floor -> the modules under `trainkit.` on it, as patterns."""
    table = {}
    for line in (CHECKOUT / "docs" / "architecture.md").read_text().splitlines():
        if row := re.match(r"\| (\d) \|.*\| *(`.*`) *\|$", line):
            names = [name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([^`]+)`", row[2])]
            table[int(row[1])] = [*names, *(name.removesuffix(".*") for name in names)]
    return table


FLOORS = floors()


def floor(module: str) -> int:
    if module == "__main__":  # the door from outside, as trainkit/__init__.py is
        return 5
    found = [number for number, names in FLOORS.items() if any(fnmatchcase(module, name) for name in names)]
    assert len(found) == 1, f"trainkit.{module} is on {len(found)} floors; give it one in docs/architecture.md"
    return found[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(
    nodes: list[ast.stmt] | list[ast.AST], late: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Walk a module's imports, but for those that only a type checker reads."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, late
        elif is_type_checking(node):
            yield from import_statements(node.orelse, late)  # type: ignore[attr-defined]
        else:
            inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from import_statements(list(ast.iter_child_nodes(node)), inside)


def homes() -> dict[str, str]:
    """Map each name of the public surface to the module it comes from: Trainer -> trainkit.trainer."""
    surface = ast.parse((CHECKOUT / "trainkit" / "__init__.py").read_text())
    typed = next(node for node in surface.body if is_type_checking(node))
    return {
        alias.asname or alias.name: node.module if alias.name not in SOURCES else f"{node.module}.{alias.name}"
        for node in ast.walk(typed)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


HOMES = homes()


def imports(path: Path) -> Iterator[Import]:
    package = ["trainkit", *module_name(path).split(".")]
    if path.name != "__init__.py":
        package.pop()
    for node, late in import_statements(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, late)
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            if origin == "trainkit" and alias.name in HOMES:
                yield Import(HOMES[alias.name], node.lineno, late)
            elif f"{origin}.{alias.name}".removeprefix("trainkit.") in SOURCES and origin.startswith("trainkit"):
                yield Import(f"{origin}.{alias.name}", node.lineno, late)
            else:
                yield Import(origin, node.lineno, late)


def inner(found: Import) -> str | None:
    """Give the imported module's name under `trainkit.`, or None for one of somebody else."""
    top, _, name = found.target.partition(".")
    return name if top == "trainkit" else None


every_module = pytest.mark.parametrize("module", [name for name in SOURCES if name])


@every_module
def test_a_module_has_a_floor_and_imports_from_it_or_from_below(module: str) -> None:
    wrong = []
    for found in imports(SOURCES[module]):
        name = inner(found)
        if not name or (found.late and (module, name) in EXCEPTIONS):  # no name: trainkit itself, for its version
            continue
        assert name in SOURCES, f"{SOURCES[module]}:{found.line} imports trainkit.{name}, which is not there"
        if floor(name) > floor(module):
            wrong.append(f"{SOURCES[module]}:{found.line} (floor {floor(module)}) imports {name} (floor {floor(name)})")
    assert floor(module) in range(6)
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_still_needed() -> None:
    used = {(module, inner(found)) for module in SOURCES for found in imports(SOURCES[module]) if found.late}
    assert set(EXCEPTIONS) <= used


@every_module
def test_a_module_imports_other_peoples_packages_late(module: str) -> None:
    ours = {"trainkit", "torch", *sys.stdlib_module_names}
    commands = ("cli*", "config*", "lightning.cli", "lightning.parser", "lightning.stand_in")
    may = CLI_ONLY if any(fnmatchcase(module, name) for name in commands) else set()
    wrong = [
        f"{SOURCES[module]}:{found.line} imports {found.target} at the top; import it where it is used"
        for found in imports(SOURCES[module])
        if not found.late and found.target.partition(".")[0] not in ours | may
    ]
    assert not wrong, "\n".join(wrong)


@every_module
def test_the_lowest_floor_needs_torch_and_the_standard_library_only(module: str) -> None:
    if floor(module):
        return
    wrong = [
        f"{SOURCES[module]}:{found.line} imports {found.target}"
        for found in imports(SOURCES[module])
        if found.target.partition(".")[0] not in {"torch", "trainkit", "numpy", *sys.stdlib_module_names}
    ]  # numpy: torch itself imports it where it is installed, and its random state is one of those to keep
    assert not wrong, "\n".join(wrong)


def test_the_public_surface_imports_nothing_before_it_is_asked() -> None:
    early = {found.target.partition(".")[0] for found in imports(SOURCES[""]) if not found.late}
    assert early <= set(sys.stdlib_module_names)


def test_callbacks_import_absolutely() -> None:
    relative = [
        f"{path}:{node.lineno}"
        for path in CHECKOUT.glob("callbacks/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, f"write `from trainkit...` in {relative}"


@every_module
def test_a_file_is_one_idea_of_at_most_600_lines(module: str) -> None:
    lines = len(SOURCES[module].read_text().splitlines())
    assert lines <= LINES
