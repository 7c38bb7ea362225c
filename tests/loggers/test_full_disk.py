"""A disk that is full for a while costs a run no row, and a run directory is for its owner only."""

from __future__ import annotations

import csv
import json
import os
import stat
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainkit import Callback, Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import CSVLogger, FileLogger, JSONLinesLogger, TensorBoardLogger

LOGGERS = [CSVLogger, JSONLinesLogger, TensorBoardLogger]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("can't mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class At(Callback):
    def __init__(self, act: dict[int, Callable[[], Any]]) -> None:
        self.act = act

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.act.get(trainer.global_step, int)()


def fill(directory: Path) -> None:
    with open(directory / "fill", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_training_goes_on_while_the_disk_is_full_and_the_rows_come_later(
    small_disk: Path, TinyModule: type[Module], TinyData: Any
) -> None:
    class Talkative(TinyModule):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log_dict({f"metric_{number}": float(number) for number in range(200)})  # more than a page
            return super().training_step(batch, batch_idx)

    loggers = [kind(small_disk) for kind in LOGGERS]
    checkpoint = ModelCheckpoint(every_n_train_steps=1, save_last=True)
    at = At({4: lambda: fill(small_disk), 7: lambda: os.unlink(small_disk / "fill")})
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=loggers, log_every_n_steps=1, callbacks=[at, checkpoint],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(Talkative(), TinyData())
    texts = [str(one.message) for one in told]
    assert any("metrics.csv could not be written: No space left on device" in text for text in texts)
    assert any("metrics.jsonl could not be written: No space left on device" in text for text in texts)
    assert checkpoint.failed_saves >= 2
    run = Path(loggers[0].log_dir)
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    steps = [int(row["step"]) for row in rows if row["train_loss"]]
    assert steps == list(range(16))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(16))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == list(range(16))
    assert sorted(os.listdir(run / "checkpoints"))[-1] == "last.ckpt"


@pytest.mark.parametrize("kind", LOGGERS)
@pytest.mark.parametrize("mask", [0, 0o022])
def test_a_run_directory_is_for_its_owner_only(kind: type[FileLogger], mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        logger = kind(tmp_path)
        logger.check_writable()
        logger.log_hyperparams({"a": 1})
        logger.log_metrics({"x": torch.tensor(1.0)}, 0)
        logger.save()
        logger.close()
    finally:
        os.umask(before)
    run = Path(logger.log_dir)
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    for path in run.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    (tmp_path / "there").mkdir(mode=0o755)
    there = kind(tmp_path, name="", version="there")
    there.check_writable()
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o755 & ~before  # what is there is left alone
