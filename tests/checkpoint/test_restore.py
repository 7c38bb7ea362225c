"""A run that goes on: in which directory its loggers write, and what of an ended one is still to be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit import Trainer
from trainkit.callbacks import LambdaCallback, ModelCheckpoint
from trainkit.checkpoint.restore import load_weights
from trainkit.errors import CheckpointError
from trainkit.loggers import CSVLogger


def fit(tmp_path: Path, TinyModule: Any, TinyData: Any, ckpt_path: Any = None, **settings: Any) -> Trainer:
    checkpoint = ModelCheckpoint(tmp_path / "elsewhere", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="rows"),
        callbacks=[checkpoint, *settings.pop("callbacks", ())],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(TinyModule(), datamodule=TinyData(), ckpt_path=ckpt_path)
    return trainer


def test_loggers_go_on_where_they_wrote_although_the_checkpoints_lie_elsewhere(
    tmp_path: Path, TinyModule: Any, TinyData: Any
) -> None:
    fit(tmp_path, TinyModule, TinyData, max_steps=2)
    run = tmp_path / "rows" / "version_0"
    before = (run / "metrics.csv").read_text()
    fit(tmp_path, TinyModule, TinyData, "last", max_steps=4)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["version_0"]
    assert (run / "metrics.csv").read_text().splitlines()[1:3] == before.splitlines()[1:3]


def test_a_branch_from_an_older_checkpoint_writes_beside_what_came_after_it(
    tmp_path: Path, TinyModule: Any, TinyData: Any
) -> None:
    fit(tmp_path, TinyModule, TinyData, max_steps=3)
    kept = (tmp_path / "rows" / "version_0" / "metrics.csv").read_text()
    fit(tmp_path, TinyModule, TinyData, next((tmp_path / "elsewhere").glob("*step=2.ckpt")), max_steps=4)
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["version_0", "version_1"]
    assert (tmp_path / "rows" / "version_0" / "metrics.csv").read_text() == kept


@pytest.mark.parametrize("resumed", [True, False])
def test_a_run_that_was_killed_after_its_last_save_is_told_of_its_end(
    resumed: bool, tmp_path: Path, TinyModule: Any, TinyData: Any
) -> None:
    called: list[str] = []
    trainer = fit(tmp_path, TinyModule, TinyData, max_steps=2)
    told = LambdaCallback(
        on_train_start=lambda *_: called.append("start"),
        on_train_batch_start=lambda *_: called.append("batch"),
        on_train_end=lambda *_: called.append("end"),
    )
    if resumed:
        fit(tmp_path, TinyModule, TinyData, "last", max_steps=2, callbacks=[told])
    else:  # the same Trainer has done it already
        trainer.callbacks.append(told)
        trainer.fit(TinyModule(), datamodule=TinyData())
    assert called == (["start", "end"] if resumed else [])


def test_a_weight_that_is_no_tensor_is_refused_before_any_weight_is_changed(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    weights = {"weight": torch.ones(1, 2), "bias": "not a tensor"}
    for saved in (weights, "not a dict"):
        with pytest.raises(CheckpointError, match=r"bias \(str\)|is a str"):
            load_weights(module, {"state_dict": saved}, "it.ckpt", strict=False)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
