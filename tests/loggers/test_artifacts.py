"""Uploads: which checkpoints a logger uploads, when, and under what name."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit import Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import Logger
from trainkit.loggers.artifacts import Artifact, Uploads


class Uploader(Logger):
    """Upload to a list, as WandbLogger and MLFlowLogger do to their servers."""

    def __init__(self, log_model: Any) -> None:
        self.uploads = Uploads(log_model)
        self.found: list[tuple[str, Artifact]] = []

    def upload(self, when: str, artifacts: list[Artifact]) -> None:
        for artifact in artifacts:
            self.found.append((when, artifact))
            self.uploads.uploaded[artifact.path] = artifact.time

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.upload("saved", self.uploads.after_save(checkpoint_callback))

    def finalize(self, status: str) -> None:
        self.upload("end", self.uploads.at_end())


@pytest.mark.parametrize(
    ("log_model", "save_top_k", "expected"),
    [
        (False, 1, []),
        (True, 1, [("end", "epoch=2-step=6.ckpt")]),
        (True, -1, [("saved", f"epoch={epoch}-step={2 * epoch + 2}.ckpt") for epoch in range(3)]),
        ("all", 1, [("saved", f"epoch={epoch}-step={2 * epoch + 2}.ckpt") for epoch in range(3)]),
    ],
)
def test_log_model_says_when(
    TinyModule: Any, TinyData: Any, tmp_path: Path, log_model: Any, save_top_k: int, expected: list[tuple[str, str]]
) -> None:
    logger = Uploader(log_model)
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, limit_train_batches=2, limit_val_batches=0, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, logger=logger,
        callbacks=ModelCheckpoint(tmp_path, save_top_k=save_top_k),
    )  # fmt: skip
    trainer.fit(TinyModule(), TinyData())
    assert [(when, os.path.basename(artifact.path)) for when, artifact in logger.found] == expected


def test_a_checkpoint_comes_with_its_score_and_what_made_it(TinyModule: Any, TinyData: Any, tmp_path: Path) -> None:
    logger = Uploader(True)
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True)
    Trainer(
        accelerator="cpu", max_epochs=3, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        logger=logger, callbacks=callback,
    ).fit(TinyModule(), TinyData())  # fmt: skip
    best = [artifact for _, artifact in logger.found if "best" in artifact.aliases]
    assert [artifact.path for artifact in best] == [callback.best_model_path]
    assert best[0].aliases == ["latest", "best"]
    assert best[0].metadata["score"] == callback.best_model_score.item()  # type: ignore[union-attr]
    assert best[0].metadata["original_filename"] == os.path.basename(callback.best_model_path)
    assert best[0].metadata["ModelCheckpoint"]["monitor"] == "val_loss"
    assert {os.path.basename(artifact.path) for _, artifact in logger.found} == {
        path.name for path in tmp_path.glob("*.ckpt")
    }


def test_a_file_is_uploaded_again_only_when_it_was_written_again(tmp_path: Path) -> None:
    class Saver:
        best_model_path = str(tmp_path / "a.ckpt")
        best_model_score = torch.tensor(1.0)

    path = Path(Saver.best_model_path)
    path.write_bytes(b"1")
    uploads = Uploads("all")
    (first,) = uploads.after_save(Saver())
    uploads.uploaded[first.path] = first.time
    assert uploads.after_save(Saver()) == []
    os.utime(path, (first.time + 5, first.time + 5))
    assert [artifact.path for artifact in uploads.after_save(Saver())] == [str(path)]
    assert copy.deepcopy(uploads).uploaded == uploads.uploaded


@pytest.mark.parametrize("log_model", ["best", 2, None])
def test_another_log_model_is_refused(log_model: Any) -> None:
    with pytest.raises(ValueError, match="log_model must be True, False or 'all'"):
        Uploads(log_model)
