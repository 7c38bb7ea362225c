"""Hyperparameters from a file never choose code: every way to name some, for every kind of annotation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import pytest
import torch
from torch import nn

from trainkit import Module
from trainkit.checkpoint import store

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


class Mode(Enum):
    FAST = "fast"


@dataclass
class Settings:
    name: str = ""
    layer: nn.Module | None = None


class Encoder(nn.Module):
    def __init__(self, depth: int = 1, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.depth, self.inner = depth, inner


class Model(Module):
    def __init__(  # type: ignore[no-untyped-def]
        self,
        function: Callable[..., Any] = torch.relu,
        maker: Callable[[Any], torch.optim.Optimizer] | None = None,
        text_or_function: str | Callable[..., Any] = "relu",
        functions: list[Callable[..., Any]] | None = None,
        layer: nn.Module | None = None,
        layers: list[nn.Module] | None = None,
        kind: type[nn.Module] = nn.ReLU,
        any_kind: type | None = None,
        anything: Any = None,
        by_name: dict[str, Any] | None = None,
        untyped=None,
        untyped_function=torch.relu,
        mode: Mode = Mode.FAST,
        settings: Settings | None = None,
        path: Path | None = None,
        choice: Literal["os.system", "x"] = "x",
        **more: Any,
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.given = {name: value for name, value in locals().items() if name != "self"}


def loaded(hparams: dict[str, Any], path: Path) -> dict[str, Any]:
    state = {"state_dict": Model().state_dict(), "global_step": 1, "epoch": 0}
    store.save(path / "it.ckpt", {**state, "hyper_parameters": {**hparams, "_instantiator": INSTANTIATOR}})
    given: dict[str, Any] = Model.load_from_checkpoint(path / "it.ckpt").given
    return given


RISKY = [
    *("function", "maker", "text_or_function", "functions", "layer", "layers", "kind"),
    *("any_kind", "anything", "by_name", "untyped", "untyped_function", "settings", "unknown"),
]


@pytest.mark.parametrize("argument", RISKY)
def test_no_way_to_name_code_in_a_file_runs_or_imports_any(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "evil_code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil:\n    pass\ndef run(): pass\n")
    (tmp_path / "evil.yaml").write_text("class_path: evil_code.Evil\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    touch = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}
    shell = {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}}
    evil = {"class_path": "evil_code.Evil"}
    inside = {"class_path": "torch.nn.Linear", "init_args": {"in_features": touch, "out_features": 1}}
    names = ["os.system", "builtins.eval", "subprocess.Popen", "evil_code.run", "evil_code.Evil"]
    texts = [*names, '{"class_path": "evil_code.Evil"}', '{"class\\u005fpath": "evil_code.Evil"}']
    for value in (*texts, str(tmp_path / "evil.yaml"), touch, shell, evil, inside):
        for given in (value, [value], {"a": value}, {"init_args": {"a": value}}):
            try:
                made = loaded({argument: given}, tmp_path)[argument]
            except (ValueError, TypeError, KeyError, jsonargparse.ArgumentError):
                pass
            else:
                assert not isinstance(made, subprocess.Popen)
                assert not callable(made)
            assert not marker.exists(), given
            assert "evil_code" not in sys.modules, given


def test_what_a_command_line_saves_comes_back(tmp_path: Path) -> None:
    encoder = {"class_path": f"{__name__}.Encoder", "init_args": {"depth": 3, "inner": {"class_path": "torch.nn.GELU"}}}
    made = loaded({"layer": encoder, "layers": [encoder], "kind": "torch.nn.Tanh"}, tmp_path)
    assert type(made["layer"]) is type(made["layers"][0]) is Encoder
    assert (made["layer"].depth, type(made["layer"].inner), made["kind"]) == (3, nn.GELU, nn.Tanh)
    made = loaded({"maker": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.5}}}, tmp_path)
    assert type(made["maker"]([nn.Parameter(torch.ones(1))])) is torch.optim.Adam
    made = loaded({"settings": {"name": "os.system", "layer": {"class_path": "torch.nn.Tanh"}}}, tmp_path)
    assert made["settings"].name == "os.system"
    plain = {"text_or_function": "data.csv", "untyped": "os.system", "anything": [1, "os.path"], "choice": "os.system"}
    made = loaded({**plain, "mode": "FAST", "path": str(tmp_path)}, tmp_path)
    assert {name: made[name] for name in plain} == plain
    assert (made["mode"], made["path"]) == (Mode.FAST, tmp_path)


def test_a_refusal_names_the_argument_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'function' names 'os.system'.*load_from_checkpoint\(path, function=...\)"):
        loaded({"function": "os.system"}, tmp_path)
    again = Model.load_from_checkpoint(tmp_path / "it.ckpt", function=torch.tanh)
    assert again.given["function"] is torch.tanh
