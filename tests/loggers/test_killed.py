"""Runs that are killed and resumed log each step once, whatever the logger: no row is lost, none is there twice."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = r"""
import os, sys
import torch
from torch.utils.data import DataLoader
from trainkit import Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.loggers import CSVLogger, JSONLinesLogger, TensorBoardLogger

torch.set_num_threads(1)
root, epochs, asynchronous, die_at = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", int(sys.argv[4])


class Net(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).pow(2).mean() + torch.rand(()) * 0.01
        self.log("loss", loss)
        if self.global_step == die_at:
            os.kill(os.getpid(), 9)
        if batch_idx == 3:
            self.log("rare", float(self.global_step))  # another column
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


loggers = [CSVLogger(root), JSONLinesLogger(root), TensorBoardLogger(root)]
checkpoint = ModelCheckpoint(every_n_train_steps=3, save_last=True, asynchronous=asynchronous)
trainer = Trainer(accelerator="cpu", max_epochs=epochs, log_every_n_steps=1, logger=loggers, callbacks=[checkpoint],
                  num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, default_root_dir=root)
data = torch.rand(40, 4, generator=torch.Generator().manual_seed(3))
there = list(__import__("pathlib").Path(root).rglob("*.ckpt"))
print("ready", flush=True)
trainer.fit(Net(), DataLoader(data, 4, shuffle=True), DataLoader(data[:8], 4), ckpt_path="last" if there else None)
"""

Rows = dict[tuple[str, int], list[float]]


def of_csv(run: Path) -> Rows:
    rows: Rows = {}
    for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()):
        for name, value in row.items():
            if name != "step" and value != "":
                rows.setdefault((name, int(row["step"])), []).append(float(value))
    return rows


def of_json(run: Path) -> Rows:
    rows: Rows = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "step":
                rows.setdefault((name, row["step"]), []).append(float(value))
    return rows


def of_tensorboard(run: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    rows: Rows = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            rows.setdefault((name, event.step), []).append(event.value)
    return rows


READ = {"csv": of_csv, "json lines": of_json, "tensorboard": of_tensorboard}


def start(root: Path, epochs: int, asynchronous: bool, checkout: Path, die_at: int = -1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(root), str(epochs), str(asynchronous), str(die_at)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def compared(whole: Path, killed: Path) -> None:
    runs = [path for path in (killed / "lightning_logs").iterdir() if list(path.glob("checkpoints/*.ckpt"))]
    (run,) = runs
    for logger, read in READ.items():
        expected, found = (
            {key: values for key, values in read(path).items() if not key[0].startswith("time/")}
            for path in (whole / "lightning_logs" / "version_0", run)
        )
        twice = {key for key, values in found.items() if len(values) > 1 and key[0] != "epoch"}
        assert not twice, (logger, sorted(twice)[:5])
        assert found.keys() == expected.keys(), (logger, sorted(found.keys() ^ expected.keys())[:5])
        assert found == expected, logger


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_each_step_is_there_once_after_kills_at_chosen_steps(
    asynchronous: bool, tmp_path: Path, checkout: Path
) -> None:
    whole = start(tmp_path / "whole", 2, asynchronous, checkout)
    for die_at in (4, 7, 11, 18):
        run = start(tmp_path / "killed", 2, asynchronous, checkout, die_at)
        assert run.communicate(timeout=100)
        assert run.returncode == -signal.SIGKILL
        if die_at == 11:  # in the middle of a write
            (metrics,) = [path.parents[1] / "metrics.csv" for path in (tmp_path / "killed").rglob("last.ckpt")]
            with open(metrics, "a") as file:
                file.write("11,0.")
            with open(metrics.with_name("metrics.jsonl"), "a") as file:
                file.write('{"step": 11, "lo')
    for run in (whole, start(tmp_path / "killed", 2, asynchronous, checkout)):
        errors = run.communicate(timeout=100)[1]
        assert run.returncode == 0, errors
    compared(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_step_is_there_once_after_kills_at_any_moment(asynchronous: bool, tmp_path: Path, checkout: Path) -> None:
    draw, kills = random.Random(5), 0
    whole = start(tmp_path / "whole", 12, asynchronous, checkout)
    assert whole.communicate(timeout=100)
    while True:  # until one lives to its end
        run = start(tmp_path / "killed", 12, asynchronous, checkout)
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.5))
        run.kill()
        errors = run.communicate(timeout=100)[1]
        assert run.returncode in (0, -signal.SIGKILL), errors
        if run.returncode == 0 or kills > 60:
            break
        kills += 1
    if run.returncode:
        assert start(tmp_path / "killed", 12, asynchronous, checkout).wait(100) == 0
    assert kills >= 3
    compared(tmp_path / "whole", tmp_path / "killed")
