"""Checkpoints in stores that fsspec speaks to: on memory://, and on stores that can't rename or fail midway."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.checkpoint import remote, store
from trainkit.errors import CheckpointError, CheckpointExistsError, MisconfigurationException, NoCheckpointError

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

STATE = {"epoch": 0, "optimizer_states": [], "state_dict": {"w": torch.arange(4000.0)}}


def run_of(step: int) -> dict[str, Any]:
    return {**STATE, "global_step": step}


class NoRename(MemoryFileSystem):
    """A store that can't rename, can't be asked to keep what is there, and takes a file in pieces."""

    protocol = "norename"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    fail_after: int | None = None
    """How many bytes it takes before it fails; None: all."""
    silent = False
    """Whether it does so without an error."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("norename://", "memory://")))

    def mv(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create":
            raise NotImplementedError
        with self.open(path, "wb") as file:
            if NoRename.fail_after is None:
                file.write(value)
            else:
                file.write(value[: NoRename.fail_after])
        if NoRename.fail_after is not None and not NoRename.silent:
            raise ConnectionError("the line was cut")


fsspec.register_implementation("norename", NoRename, clobber=True)


@pytest.fixture(autouse=True)
def empty_stores() -> Iterator[None]:
    yield
    for kind in (MemoryFileSystem, NoRename):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    NoRename.fail_after, NoRename.silent = None, False


both = pytest.mark.parametrize("place", ["memory://run/checkpoints", "norename://run/checkpoints"])


class Line(Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("at", float(self.global_step))
        return self.line(batch).pow(2).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.line(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(*callbacks: Callback, ckpt_path: Any = None, **settings: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=list(callbacks), **{**quiet, "max_steps": 6, **settings})
    trainer.fit(Line(), DataLoader(torch.linspace(-1, 1, 12).reshape(6, 2)), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


def steps(place: str) -> dict[str, int]:
    return {name: store.step_of(f"{place}/{name}") for name in remote.names_in(place)}


# ---- files
@both
def test_what_is_saved_there_comes_back(place: str) -> None:
    store.save(f"{place}/x.ckpt", run_of(3))
    assert torch.equal(store.load(f"{place}/x.ckpt")["state_dict"]["w"], STATE["state_dict"]["w"])
    with pytest.raises(NoCheckpointError, match=rf"there is no checkpoint {place}/y\.ckpt"):
        store.load(f"{place}/y.ckpt")


@both
def test_a_name_that_is_taken_is_refused_or_replaced(place: str) -> None:
    store.save(f"{place}/x.ckpt", run_of(1), replace=False)
    with pytest.raises(CheckpointExistsError):
        store.save(f"{place}/x.ckpt", run_of(2), replace=False)
    assert steps(place) == {"x.ckpt": 1}
    store.save(f"{place}/x.ckpt", run_of(2))
    assert steps(place) == {"x.ckpt": 2}


@pytest.mark.parametrize("silent", [False, True])
def test_a_write_that_is_cut_off_is_an_error_and_leaves_nothing(silent: bool) -> None:
    place = "norename://run"
    store.save(f"{place}/1.ckpt", run_of(1))
    NoRename.fail_after, NoRename.silent = 3000, silent
    with pytest.raises(CheckpointError, match=r"norename://run/2\.ckpt was not written: .*(line was cut|3000 of its)"):
        store.save(f"{place}/2.ckpt", run_of(2))
    NoRename.fail_after = None
    assert steps(place) == {"1.ckpt": 1}


@both
def test_the_newest_is_the_highest_step_that_is_whole(place: str) -> None:
    for step in (1, 2, 3):
        store.save(f"{place}/{step}.ckpt", run_of(step))
    files, name = fsspec.core.url_to_fs(f"{place}/3.ckpt")
    content = files.cat_file(name)
    fsspec.core.url_to_fs(place)[0].store[name].seek(0)
    with files.open(name, "wb") as file:  # as after a process that died in the middle of a write
        file.write(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=rf"skipped a checkpoint: {place}/3\.ckpt is cut off"):
        assert store.newest(place) == f"{place}/2.ckpt"
    assert store.newest(f"{place}/nothing") is None


def test_nothing_of_it_is_loaded_before_it_is_asked_for(checkout: Path) -> None:
    code = (
        "import torch, sys; there = 'fsspec' in sys.modules; import trainkit.trainer, trainkit.callbacks.checkpoint\n"
    )
    code += "sys.exit('fsspec' in sys.modules and not there)"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is there")
def test_an_address_that_needs_more_says_what() -> None:
    with pytest.raises(MisconfigurationException, match=r"s3://bucket/x can't be used: .*s3fs"):
        fit(ModelCheckpoint("s3://bucket/x"))
    with pytest.raises(MisconfigurationException, match=r"nonsense://x can't be used"):
        fit(ModelCheckpoint("nonsense://x"))


# ---- runs
@both
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_keeps_the_best_and_the_last_there_and_goes_on_from_them(place: str, asynchronous: bool) -> None:
    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(
            place, "{step}", monitor="at", mode="max", save_top_k=2, save_last=True, every_n_train_steps=1,
            asynchronous=asynchronous,
        )  # fmt: skip

    checkpoint = callback()
    fit(checkpoint, max_steps=4)
    assert steps(place) == {"last.ckpt": 4, "step=3.ckpt": 3, "step=4.ckpt": 4}
    assert checkpoint.best_model_path == f"{place}/step=4.ckpt"
    again = callback()
    trainer = fit(again, ckpt_path="last")
    assert trainer.ckpt_path == f"{place}/last.ckpt"
    assert steps(place) == {"last.ckpt": 6, "step=5.ckpt": 5, "step=6.ckpt": 6}
    assert sorted(again.best_k_models) == [f"{place}/step=5.ckpt", f"{place}/step=6.ckpt"]
    results = trainer.validate(Line(), DataLoader(torch.ones(2, 2)), ckpt_path="best", verbose=False)  # type: ignore[arg-type]
    named = trainer.validate(Line(), DataLoader(torch.ones(2, 2)), ckpt_path=f"{place}/step=6.ckpt", verbose=False)  # type: ignore[arg-type]
    assert results == named
    trainer.save_checkpoint(f"{place}/by_hand.ckpt")
    assert store.step_of(f"{place}/by_hand.ckpt") == 6
    assert os.listdir(".") == []


def test_a_store_that_fails_for_a_while_costs_saves_and_nothing_else() -> None:
    class At(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Module, *rest: Any) -> None:
            NoRename.fail_after = 3000 if trainer.global_step in (2, 3) else None

    checkpoint = ModelCheckpoint("norename://run", "{step}", save_last=True, every_n_train_steps=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(At(), checkpoint)
    assert checkpoint.failed_saves == 2
    assert sum("the line was cut" in str(one.message) for one in told) == 2
    assert steps("norename://run") == {"last.ckpt": 6, "step=6.ckpt": 6}


def test_a_store_that_does_not_answer_ends_the_run_before_the_first_step() -> None:
    NoRename.fail_after = 3
    with pytest.raises(MisconfigurationException, match="checkpoints can't be saved: nothing can be written below"):
        fit(ModelCheckpoint("norename://run"))


def test_a_file_address_is_this_machine(tmp_path: Path) -> None:
    fit(ModelCheckpoint(f"file://{tmp_path}/here", "{step}"), max_epochs=1, max_steps=-1)
    assert os.listdir("here") == ["step=6.ckpt"]
