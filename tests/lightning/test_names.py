"""`import trainkit.lightning as L`: Lightning's modules are there, and their names mean trainkit's things."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import trainkit
import trainkit.lightning as L
from trainkit.lightning.names import MODULES

ROOT = "trainkit.lightning"


def homes() -> list[tuple[str, str]]:
    """Each of Lightning's modules with a module of trainkit's that it takes names from."""
    return [(name, home) for name, to in MODULES.items() for home in ([to] if isinstance(to, str) else to)]


def test_the_first_names_are_trainkits() -> None:
    assert (L.LightningModule, L.LightningDataModule) == (trainkit.Module, trainkit.DataModule)
    assert (L.Trainer, L.Callback, L.seed_everything) == (trainkit.Trainer, trainkit.Callback, trainkit.seed_everything)
    assert L.__version__ == L.pytorch.__version__ == "2.6.6"


@pytest.mark.parametrize(("name", "home"), homes())
def test_every_name_of_the_table_is_there(name: str, home: str) -> None:
    module = import_module(f"{ROOT}.{name}".strip("."))
    to = MODULES[name]
    if isinstance(to, str):
        assert module is import_module(to)
        return
    for word in to[home].split():
        theirs, _, ours = word.partition("=")
        if theirs == "*":
            public = import_module(home).__all__
            assert [getattr(module, one) for one in public] == [getattr(import_module(home), one) for one in public]
        else:
            assert getattr(module, theirs) is getattr(import_module(home), ours or theirs)


def test_packages_are_reached_without_importing_them() -> None:
    assert L.pytorch.callbacks.EarlyStopping is trainkit.callbacks.EarlyStopping
    assert L.pytorch.utilities.parsing.AttributeDict is L.fabric.utilities.AttributeDict
    from trainkit.lightning.pytorch import callbacks, loggers

    assert (callbacks.Timer, loggers.CSVLogger) == (trainkit.callbacks.Timer, trainkit.loggers.CSVLogger)


def test_a_star_imports_what_is_public() -> None:
    names: dict[str, object] = {}
    exec("from trainkit.lightning.pytorch.callbacks import *", names)
    assert {"EarlyStopping", "ModelCheckpoint", "Timer"} <= set(names)
    assert "early_stopping" not in names


def test_dir_knows_names_and_submodules() -> None:
    assert {"LightningModule", "Trainer", "pytorch", "fabric"} <= set(dir(L))
    assert {"LightningModule", "callbacks", "cli", "utilities"} <= set(dir(L.pytorch))


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no .LightningModul. in .*; did you mean 'LightningModule'"):
        _ = L.LightningModul
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec("from trainkit.lightning.pytorch.callbacks import Nothing")
    with pytest.raises(ModuleNotFoundError, match=r"trainkit\.lightning\.pytorch\.nothing"):
        import_module("trainkit.lightning.pytorch.nothing")


def test_importing_it_loads_nothing() -> None:
    program = """
import sys
import trainkit.lightning as L
import trainkit.lightning.pytorch as pl
import trainkit.lightning.pytorch.callbacks
print([name for name in ("torch", "jsonargparse", "yaml", "trainkit.trainer") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_command_line_does_not_load_it() -> None:
    program = "import sys, trainkit.cli; print([name for name in sys.modules if 'lightning' in name])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
