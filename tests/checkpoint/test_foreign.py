"""Files that others made are read when somebody asks for it by name, and run nothing."""

from __future__ import annotations

import ast
import datetime
import os
import pickle
import sys
import types
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint import foreign, format
from trainkit.errors import CheckpointError


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    torch.save({"w": torch.rand(50)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(b"PK\x07\x08", 1000) - 5] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: Bad CRC-32 for file '.*'"):
        foreign.load(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_recognized(share: float, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.rand(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="is cut off: its end is missing after"):
        foreign.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am a text", "is not a checkpoint"),
        (pickle.dumps({"a": 1}), "is not a checkpoint"),
    ],
)
def test_another_kind_of_file_is_not_a_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        foreign.load(path)


def test_another_zip_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="is a zip file, but not a checkpoint"):
        foreign.load(tmp_path / "x.ckpt")


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it_ran"),)

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"was refused: it holds objects \(posix.mkdir\).*weights_only=False"):
        foreign.load(tmp_path / "x.ckpt")
    assert not (tmp_path / "it_ran").exists()


def test_the_environment_can_not_switch_the_refusal_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": datetime.date(2026, 1, 1)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="was refused"):
        foreign.load(tmp_path / "x.ckpt")


def test_a_file_that_holds_no_dict_says_what_it_holds(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="holds a Tensor, not the dict of a checkpoint"):
        foreign.load(tmp_path / "x.ckpt")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(2)}, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(foreign.load(tmp_path / "x.ckpt")["state_dict"]["w"], torch.ones(2))


def test_what_lightning_keeps_beside_plain_values_can_be_read(tmp_path: Path) -> None:
    hparams = {"args": Namespace(lr=0.5, sizes=[1, 2]), "folder": Path("data"), "every": datetime.timedelta(minutes=3)}
    torch.save({"hyper_parameters": hparams}, tmp_path / "theirs.ckpt")
    before = torch.serialization.get_safe_globals()
    assert foreign.load(tmp_path / "theirs.ckpt") == {"hyper_parameters": hparams}
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_an_attribute_dict_of_lightnings_becomes_a_dict_without_lightning(tmp_path: Path) -> None:
    module = types.ModuleType("lightning.fabric.utilities.data")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save({"hyper_parameters": module.AttributeDict(lr=0.5)}, tmp_path / "theirs.ckpt")
    found = foreign.load(tmp_path / "theirs.ckpt")["hyper_parameters"]
    assert (type(found), found) == (dict, {"lr": 0.5})


def test_an_address_is_refused_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: opened.append(args))
    for address in ("http://example.org/x.ckpt", "s3://bucket/x.ckpt"):
        with pytest.raises(CheckpointError, match="is not read from the network"):
            foreign.load(address)
    assert not opened


def test_what_it_holds_is_made_plain_and_can_be_saved(tmp_path: Path) -> None:
    hparams = {"args": Namespace(lr=0.5, sizes=(1, 2)), "folder": Path("data"), "every": datetime.timedelta(minutes=3)}
    torch.save({"hyper_parameters": hparams, "state_dict": torch.nn.BatchNorm1d(2).state_dict()}, tmp_path / "x.ckpt")
    plain = foreign.made_plain(foreign.load(tmp_path / "x.ckpt"))
    with open(tmp_path / "ours.ckpt", "wb") as file:
        format.write(file, plain)
    found = format.read(tmp_path / "ours.ckpt")
    assert found["hyper_parameters"] == {"args": {"lr": 0.5, "sizes": (1, 2)}, "folder": "data", "every": 180.0}
    assert found["hparams_namespaces"] == ["args"]
    assert found["state_dict"]._metadata[""] == {"version": 2}


def test_ours_is_told_from_theirs(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "theirs.pt")
    with open(tmp_path / "ours.ckpt", "wb") as file:
        format.write(file, {"w": torch.ones(1)})
    assert [foreign.is_ours(tmp_path / name) for name in ("theirs.pt", "ours.ckpt")] == [False, True]
    content = (tmp_path / "ours.ckpt").read_bytes()
    (tmp_path / "ours.ckpt").write_bytes(content[:-30] + b"x" + content[-29:])
    assert foreign.is_ours(tmp_path / "ours.ckpt")


def test_nothing_else_in_the_package_unpickles_or_runs_text(checkout: Path) -> None:
    forbidden = {
        "eval",
        "exec",
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "numpy.load",
        "marshal",
    }
    found = {}
    for path in [*checkout.glob("trainkit/**/*.py"), *checkout.glob("callbacks/*.py")]:
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        if calls & forbidden:
            found[str(path.relative_to(checkout))] = calls & forbidden
    assert found == {
        "trainkit/checkpoint/foreign.py": {"torch.load"},
        "trainkit/data/failure.py": {"pickle.loads"},  # an error that a worker process of this run hands over
        "trainkit/launch_call.py": {"pickle.loads"},  # what processes of one run leave for each other in a 0700 folder
        "trainkit/strategies/group.py": {"pickle.loads"},  # what rank 0 says, as torch's own object collectives do
    }
