"""ModelCheckpoint under SIGKILL: there is always a whole checkpoint, and in the end only what is to be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLING = r"""
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from trainkit import Module, Trainer
from trainkit.callbacks import ModelCheckpoint
from trainkit.checkpoint import store

torch.set_num_threads(1)
warnings.simplefilter("error")
root, kills_wanted, asynchronous = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
settings = eval(sys.argv[4])
STEPS = 40 + kills_wanted


class Net(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 200), torch.nn.Dropout(0.5), torch.nn.Linear(200, 200))

    def training_step(self, batch, batch_idx):
        self.log("score", torch.rand((), generator=torch.Generator().manual_seed(self.global_step)))
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def run(directory):
    checkpoint = ModelCheckpoint(directory, "{step}", every_n_train_steps=1, asynchronous=asynchronous, **settings)
    trainer = Trainer(accelerator="cpu", max_steps=STEPS, callbacks=[checkpoint], logger=False,
                      enable_progress_bar=False, enable_model_summary=False)
    there = list(Path(directory).glob("*.ckpt"))
    trainer.fit(Net(), DataLoader(torch.ones(100, 8), 2, shuffle=True), ckpt_path="last" if there else None)
    best = {os.path.basename(path): float(score) for path, score in checkpoint.best_k_models.items()}
    return checkpoint, best


whole, best = run(root / "whole")
assert not [name for name in os.listdir(root) if name.endswith(".lock")]
draw, kills, directory, acknowledged = random.Random(7), 0, root / "killed", 0
left_behind = 0
while kills < kills_wanted:
    child = os.fork()
    if child == 0:
        try:
            run(directory)
        finally:
            os._exit(0)
    time.sleep(draw.uniform(0.05, 0.35))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    names = [name for name in os.listdir(directory)] if directory.exists() else []
    left_behind += any(name.startswith(".") for name in names)
    files = [name for name in names if name.endswith(".ckpt")]
    for name in files:
        store.load(directory / name)  # every file is whole
    newest = store.newest(directory) if files else None
    step = store.step_of(newest) if newest else 0
    assert step >= acknowledged, (step, acknowledged)  # what was there once is not lost
    acknowledged = step
    kills += 1
    if status == 0:
        break
killed, found = run(directory)
assert found == best, (found, best)
assert sorted(os.listdir(directory)) == sorted(os.listdir(root / "whole")), (
    sorted(os.listdir(directory)), sorted(os.listdir(root / "whole")))
for name in os.listdir(directory):
    one, other = store.load(directory / name), store.load(root / "whole" / name)
    assert one["global_step"] == other["global_step"]
    assert all(torch.equal(one["state_dict"][key], other["state_dict"][key]) for key in one["state_dict"])
print("kills", kills, "left behind", left_behind)
"""

SETTINGS = [
    {"monitor": "score", "save_top_k": 2, "save_last": True},
    {"save_last": "link"},
    {"monitor": "score", "mode": "max", "keep_last": 3, "keep_every_n_steps": 10},
]


def killed(directory: Path, kills: int, asynchronous: bool, settings: dict[str, object], checkout: Path) -> int:
    """Kill a run over and over, and return how often it was killed."""
    command = [sys.executable, "-c", KILLING, str(directory), str(kills), str(asynchronous), repr(settings)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1000)
    assert run.returncode == 0, run.stderr[-3000:]
    return int(run.stdout.split()[1])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_whenever_a_run_is_killed_nothing_good_is_lost_and_nothing_stays_behind(
    asynchronous: bool, tmp_path: Path, checkout: Path
) -> None:
    assert killed(tmp_path, 6, asynchronous, SETTINGS[0], checkout) >= 1


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_after_a_hundred_kills_nothing_good_is_lost_and_nothing_stays_behind(
    settings: dict[str, object], asynchronous: bool, tmp_path: Path, checkout: Path
) -> None:
    assert killed(tmp_path, 100, asynchronous, settings, checkout) >= 20
