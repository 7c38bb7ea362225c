"""The pages say what is true: every fenced block on them is executed, in the order of the page.

    ```python    runs, all blocks of a page in one namespace
    ```yaml      is parsed; a config is also validated by `trainkit fit --config FILE --print_config`
    ```console   lines that start with `$ ` run; the others are output
    ```sh        every line runs
    ```toml, ```json    are parsed
    ```text, ```diff    are not looked at

A block with `title="name.py"` after its language is also written to that file, for the blocks below it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = [
    Path("README.md"),
    Path("CONTRIBUTING.md"),
    *sorted(p.relative_to(CHECKOUT) for p in CHECKOUT.glob("docs/**/*.md")),
]

FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>.*)$")
SHELLS = {"console", "sh", "bash", "shell"}
UNREAD = {"text", "diff"}

TOO_LONG = {"configs/fashion_mnist.yaml": "minutes, and a download where the data is not there"}
"""Configs whose `trainkit fit` is validated with --print_config instead of run, and why."""

CHECKS = {"ruff", "mypy", ".ci/run"}
"""Commands that CI runs anyway, or that run these tests: only looked for."""

SECONDS = 300
"""How long one command of a page may take, on a machine that is busy with other things."""


class Block(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    """The line of the page that the block's first line is on, from 1."""
    language: str
    title: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, source: str) -> Iterator[Block]:
    """Find the fenced blocks of a page, as CommonMark has them."""
    lines = iter(enumerate(source.splitlines(), start=1))
    for number, line in lines:
        fence = FENCE.match(line)
        if not fence:
            continue
        language, _, rest = fence["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        body = []
        for _, inside in lines:
            if inside.strip().startswith(fence["marks"]) and not inside.strip().strip(fence["marks"][0]):
                break
            body.append(inside.removeprefix(fence["indent"]))
        else:
            raise AssertionError(f"{page}:{number}: this block is never closed")
        yield Block(page, number + 1, language, title and title[1], "\n".join(body) + "\n")


class Reader:
    """Do what a page says, as somebody would who has cloned the project and installed it.

    Args:
        home: a copy of the checkout; every block runs in it.
        environment: variables for commands.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = home
        self.environment = environment
        self.module = types.ModuleType("__main__")
        with open(home / "pyproject.toml", "rb") as file:
            self.project: dict[str, Any] = tomllib.load(file)

    def read(self, page: Path, source: str) -> None:
        for block in blocks(page, source):
            try:
                self.do(block)
            except Exception as error:
                error.add_note(f"in the {block.language} block at {block}")
                raise

    def do(self, block: Block) -> None:
        assert block.language, f"{block}: say the block's language after the backticks; ```text if it has none"
        if block.title:
            (self.home / block.title).write_text(block.text)
        if block.language == "python":
            self.python(block)
        elif block.language in ("yaml", "yml"):
            self.yaml(block)
        elif block.language in SHELLS:
            for line, command in commands(block):
                self.command(f"{block.page}:{line}", command)
        elif block.language in ("toml", "json"):
            {"toml": tomllib.loads, "json": json.loads}[block.language](block.text)
        else:
            assert block.language in UNREAD, f"{block}: no test can run {block.language!r}; known: see {__file__}"

    def python(self, block: Block) -> None:
        padded = "\n" * (block.line - 1) + block.text  # so that a traceback shows the line of the page
        exec(compile(padded, str(block.page), "exec"), self.module.__dict__)

    def yaml(self, block: Block) -> None:
        config = yaml.safe_load(block.text)
        if isinstance(config, dict) and {"trainer", "model", "data"} & set(config):
            (self.home / "block.yaml").write_text(block.text)
            rest = [] if "model" in config else ["--config", "configs/digits.yaml"]
            self.run(str(block), ["trainkit", "fit", *rest, "--config", "block.yaml", "--print_config"])

    def command(self, place: str, line: str) -> None:
        """Run one line; what would install, clone, test or never end is checked instead."""
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            check = {"pip": self.check_pip, "git": self.check_git, "cd": self.check_folder, "pytest": self.check_pytest}
            if words[:3] == ["python", "-m", "venv"] or words[0] in ("source", "."):
                continue
            if words[0] in check:
                check[words[0]](place, words[1:])
            elif words[0] in CHECKS:
                found = shutil.which(words[0], path=self.environment["PATH"]) or (self.home / words[0]).exists()
                assert found, f"{place}: there is no {words[0]}"
            elif words[0] == "tensorboard":
                assert "--logdir" in words, f"{place}: tensorboard needs --logdir"
            elif words[:2] == ["trainkit", "fit"] and TOO_LONG.keys() & set(words):
                self.run(place, [*words, "--print_config"])
            else:
                self.run(place, ["bash", "-c", command])

    def run(self, place: str, words: list[str]) -> None:
        done = subprocess.run(
            words,
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{place}: `{shlex.join(words)}` exited {done.returncode}\n{done.stdout}"

    def check_pip(self, place: str, words: list[str]) -> None:
        assert words[0] == "install", f"{place}: `pip {words[0]}` is not something the pages should ask for"
        targets = [word for word in words[1:] if word not in ("-e", "--editable", "-U", "--upgrade", "-q")]
        assert targets, f"{place}: `pip install` of nothing"
        extras = self.project["project"].get("optional-dependencies", {})
        for target in targets:
            name, _, wanted = target.rstrip("]").partition("[")
            assert name in (".", "trainkit"), f"{place}: {name} is not this project; a dependency belongs into an extra"
            assert "-e" not in words or name == ".", f"{place}: only the checkout, `.`, can be installed editable"
            assert set(filter(None, wanted.split(","))) <= set(extras), f"{place}: the extras are {sorted(extras)}"

    def check_git(self, place: str, words: list[str]) -> None:
        assert words[0] == "clone", f"{place}: `git {words[0]}` is not something the pages should ask for"

    def check_folder(self, place: str, words: list[str]) -> None:
        inside = words == [self.project["project"]["name"]] or (self.home / words[0]).is_dir()
        assert inside, f"{place}: there is no folder {words[0]}"

    def check_pytest(self, place: str, words: list[str]) -> None:
        options = self.project["tool"]["pytest"]["ini_options"]
        markers = {marker.partition(":")[0] for marker in options["markers"]}
        for before, word in zip(["", *words], words, strict=False):
            if before == "-m":
                assert set(word.split()) - {"and", "or", "not"} <= markers, (
                    f"{place}: the markers are {sorted(markers)}"
                )
            elif not word.startswith("-"):
                assert (self.home / word).exists(), f"{place}: there is no {word}"


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """Give each command of a block with its line, with lines joined that end in a backslash."""
    prompt = "$ " if block.language == "console" else ""
    start, pending = 0, ""
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        if not pending:
            if not line.startswith(prompt) or not line.strip() or line.startswith("#"):
                continue
            start, line = number, line.removeprefix(prompt)
        pending += line.removeprefix("> ").removesuffix("\\")
        if not line.endswith("\\"):
            yield start, pending
            pending = ""


@pytest.fixture
def reader(copy_checkout: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Stand in a copy of the checkout with `trainkit` on the PATH."""
    home = copy_checkout(tmp_path / "trainkit")
    scripts = Path(sysconfig.get_path("scripts"))
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    if not (scripts / "trainkit").exists():  # tested without being installed
        (tmp_path / "bin").mkdir()
        script = tmp_path / "bin" / "trainkit"
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m trainkit "$@"\n')
        script.chmod(0o755)
        environment["PATH"] = f"{script.parent}{os.pathsep}{environment['PATH']}"
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)  # as for a script: pages may import from examples/
    reader = Reader(home, environment)
    monkeypatch.setitem(sys.modules, "__main__", reader.module)  # where a script's classes live
    yield reader
    for name, module in list(sys.modules.items()):  # what the page imported from its folder goes with the folder
        if (getattr(module, "__file__", None) or "").startswith(str(home)):
            del sys.modules[name]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_block_of_a_page_runs(page: Path, reader: Reader) -> None:
    reader.read(page, (CHECKOUT / page).read_text())


def test_the_readme_is_at_most_150_lines() -> None:
    assert len((CHECKOUT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_to_a_file_leads_there(page: Path) -> None:
    source = re.sub(r"^( *)(`{3,}).*?^\1\2\s*$", "", (CHECKOUT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", source)
    missing = [target for target in targets if "://" not in target and not (CHECKOUT / page.parent / target).exists()]
    assert not missing


# ---- the collector itself: a mistake on a page must fail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nx\n```", "say the block's language"),
        ("```ruby\nx\n```", "no test can run 'ruby'"),
        ("```python\nx\n", "never closed"),
        ("```python\nassert 1 == 2, 'wrong sum'\n```", "wrong sum"),
        ("```sh\nfalse\n```", "exited 1"),
        ("text\n```console\n$ true\n$ exit 3\n```", r"page\.md:4: .* exited 3"),
        ('```sh\npip install -e ".[nothing]"\n```', "the extras are"),
        ("```sh\npip install sister && true\n```", "not this project"),
        ("```sh\npytest -m quick\n```", "the markers are"),
        ("```sh\npytest tests/test_missing.py\n```", "there is no"),
    ],
)
def test_a_wrong_block_fails_with_its_reason(text: str, message: str, reader: Reader) -> None:
    with pytest.raises(AssertionError, match=message):
        reader.read(Path("page.md"), text)


def test_the_python_blocks_of_a_page_share_one_namespace(reader: Reader) -> None:
    page = "```python\nimport os\n\nx = 2\n```\nand\n```python\nassert x == 2\nassert os.path.isdir('trainkit')\n```\n"
    reader.read(Path("page.md"), page)


def test_a_block_with_a_title_is_a_file_for_the_blocks_below(reader: Reader) -> None:
    page = (
        '```python title="mine.py"\nx = 2\n```\n```console\n$ python -c "import mine; \\\n> assert mine.x == 2"\n```\n'
    )
    reader.read(Path("page.md"), page)
