"""What an install gives: the wheel, the sdist, the editable install, and what importing costs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import trainkit

LAZY = ("torchvision", "tensorboard", "rich")
"""Packages that `import trainkit` must leave alone."""


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the caller's PYTHONPATH and fail with everything it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


def shipped_files(checkout: Path) -> set[str]:
    """List what a wheel must hold: every file of trainkit/ and, under trainkit/callbacks/, of callbacks/."""
    found = set()
    for top, name in (("trainkit", "trainkit"), ("callbacks", "trainkit/callbacks")):
        for folder, _, files in os.walk(checkout / top):  # does not follow the link
            inside = PurePosixPath(name, Path(folder).relative_to(checkout / top).as_posix())
            found |= {str(inside / file) for file in files if inside.name != "__pycache__"}
    return found


@pytest.fixture(scope="module")
def settings(checkout: Path) -> dict[str, Any]:
    with open(checkout / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


@pytest.fixture(scope="module")
def dist(copy_checkout: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from that sdist, as a release does."""
    folder = tmp_path_factory.mktemp("dist")
    source = copy_checkout(folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own, without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


# ---- what is in the packages


def test_the_package_list_names_every_folder_with_code(checkout: Path, settings: dict[str, Any]) -> None:
    folders = {PurePosixPath(file).parent for file in shipped_files(checkout) if file.endswith(".py")}
    assert settings["tool"]["setuptools"]["packages"] == sorted(".".join(folder.parts) for folder in folders)


def test_the_link_to_the_callbacks_is_relative(checkout: Path) -> None:
    link = checkout / "trainkit" / "callbacks"
    if not link.is_symlink():
        pytest.skip("this checkout was copied without its links")
    assert os.readlink(link) == "../callbacks"


def test_git_stores_the_link_as_a_link(checkout: Path) -> None:
    if not (checkout / ".git").exists():
        pytest.skip("not a git checkout")
    stage = run("git", "ls-files", "--stage", "--", "trainkit/callbacks", cwd=checkout).stdout.split()
    assert stage[:1] == ["120000"]


def test_the_wheel_holds_exactly_the_two_source_trees(checkout: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped_files(checkout)
    assert "trainkit/py.typed" in names


def test_the_wheel_says_its_licence_python_and_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode().splitlines()
        assert info.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert f"Version: {trainkit.__version__}" in metadata
    required = {line.removeprefix("Requires-Dist: ") for line in metadata if line.startswith("Requires-Dist: ")}
    assert {requirement for requirement in required if "extra ==" not in requirement} == {
        "torch>=2.10",
        "torchvision",
        "pyyaml",
        "tensorboard",
        "rich",
        "jsonargparse<6,>=4.53",
        "safetensors",
    }


def test_the_sdist_holds_the_callbacks_where_they_are_in_the_checkout(checkout: Path, dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        members = {member.name.partition("/")[2]: member for member in archive if not member.isdir()}
    assert not [name for name, member in members.items() if not member.isfile()]
    assert not [name for name in members if name.startswith("trainkit/callbacks/")]
    moved = {name.removeprefix("trainkit/") if "/callbacks/" in name else name for name in shipped_files(checkout)}
    assert moved | {"LICENSE", "README.md", "pyproject.toml"} <= set(members)


def test_the_sdist_holds_what_the_readme_runs(checkout: Path, dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(checkout))
        for folder in ("configs", "docs", "examples", "tests")
        for path in checkout.glob(f"{folder}/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted
    assert not wanted - members


# ---- what an install gives


def test_the_wheel_gives_the_callbacks_in_any_folder(installed: Path, tmp_path: Path) -> None:
    code = "import trainkit.callbacks; print(trainkit.callbacks.__file__)"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    assert Path(printed.strip()) == installed / "trainkit" / "callbacks" / "__init__.py"


def test_the_wheel_brings_the_command(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "trainkit"
    printed = run(sys.executable, script, "--version", cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    assert trainkit.__version__ in printed


@pytest.mark.parametrize("link", ["kept", "a text file, as git writes it where links are not possible", "lost"])
def test_an_editable_install_gives_the_callbacks_in_any_folder(
    link: str, copy_checkout: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = copy_checkout(tmp_path / "source")
    if link != "kept":
        (source / "trainkit" / "callbacks").unlink(missing_ok=True)
    if link.startswith("a text file"):
        (source / "trainkit" / "callbacks").write_text("../callbacks")

    home = tmp_path / "home"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    own, outer = (sysconfig.get_path("purelib", vars=vars_) for vars_ in ({"base": str(home)}, None))
    Path(own, "outer.pth").write_text(outer + "\n")  # lends torch and setuptools, not the editable installs there
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", source, cwd=tmp_path)

    printed = run(python, "-c", "import trainkit.callbacks as c; print(c.__file__)", cwd=home).stdout
    assert Path(printed.strip()).resolve() == source.resolve() / "callbacks" / "__init__.py"


# ---- what an import costs


def import_trainkit(checkout: Path, cwd: Path, code: str) -> list[str]:
    return run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=str(checkout)).stdout.split()


def test_importing_costs_under_a_tenth_of_a_second_over_torch(checkout: Path, tmp_path: Path) -> None:
    code = (
        "import time, torch; start = time.process_time(); import trainkit;"
        "trainkit.Trainer, trainkit.Module, trainkit.DataModule, trainkit.Callback; print(time.process_time() - start)"
    )
    seconds: list[float] = []
    while len(seconds) < 5 and min(seconds, default=1.0) >= 0.1:  # the least of five; more runs only lower it
        seconds.append(float(import_trainkit(checkout, tmp_path, code)[0]))
    assert min(seconds) < 0.1, f"CPU seconds of each run: {seconds}"


def test_importing_loads_nothing_that_torch_did_not_load(checkout: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import trainkit;"
        "trainkit.Trainer, trainkit.Module, trainkit.DataModule, trainkit.Callback, trainkit.seed_everything;"
        "print(*sorted(set(sys.modules) - before))"
    )
    new = import_trainkit(checkout, tmp_path, code)
    assert not {name.partition(".")[0] for name in new} & set(LAZY)
    foreign = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names) - {"trainkit", "torch"}
    assert not foreign
    assert not [name for name in new if name.startswith("torch.distributed")]


def test_importing_the_bare_package_loads_no_torch(checkout: Path, tmp_path: Path) -> None:
    code = "import sys, trainkit; print('torch' in sys.modules)"
    assert import_trainkit(checkout, tmp_path, code) == ["False"]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_answers_without_torch_in_under_four_tenths_of_a_second(
    option: str, checkout: Path, tmp_path: Path
) -> None:
    code = f"""
import sys, time
sys.argv = ["trainkit", {option!r}]
from trainkit.cli import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
sys.stderr.write(f"{{code or 0}} {{'torch' in sys.modules}} {{time.process_time()}}")
"""
    seconds: list[float] = []
    while len(seconds) < 5 and min(seconds, default=1.0) >= 0.4:
        done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(checkout))
        exit_code, loaded_torch, spent = done.stderr.split()
        assert (exit_code, loaded_torch) == ("0", "False")
        assert done.stdout.strip()
        seconds.append(float(spent))
    assert min(seconds) < 0.4, f"CPU seconds of each run: {seconds}"


def test_the_public_surface_is_five_names() -> None:
    assert trainkit.__all__ == ["Callback", "DataModule", "Module", "Trainer", "seed_everything"]
    assert all(getattr(trainkit, name).__name__ == name for name in trainkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trianer'"):
        trainkit.Trianer  # noqa: B018
