"""Runs that are killed and go on with another number of processes: no sample is lost or repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainkit import Module, Trainer, seed_everything
from trainkit.callbacks import ModelCheckpoint

torch.set_num_threads(1)
settings = json.loads(sys.argv[1])
RANK = int(os.environ.get("RANK", 0))
ids = open(f"{settings['name']}-{RANK}.jsonl", "w", buffering=1)


class Net(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        if self.global_step == settings.get("kill") and RANK == settings.get("victim", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        ids.write(json.dumps([self.current_epoch, self.global_step, index.tolist()]) + "\\n")
        prediction = self.net(x)
        self.log("loss", nn.functional.mse_loss(prediction, y), on_step=False, on_epoch=True)
        self.log("above", (prediction > 0).double().sum(), reduce_fx="sum", on_step=False, on_epoch=True)
        return nn.functional.mse_loss(prediction, y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


g = torch.Generator().manual_seed(0)
data = TensorDataset(torch.arange(103), torch.randn(103, 8, generator=g), torch.randn(103, 1, generator=g))
loader = DataLoader(data, settings.get("batch_size", 3), shuffle=True)
seed_everything(5)
quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
keep = ModelCheckpoint(settings.get("kept", "kept"), every_n_train_steps=settings.get("every", 1), save_top_k=1)
trainer = Trainer(callbacks=[keep], max_epochs=2, **quiet, **settings.get("trainer", {}))
module = Net()
trainer.fit(module, loader, ckpt_path="last" if settings.get("resume") else None)
if RANK == 0:
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    counters = {parameter.data_ptr(): s["step"].data_ptr() for parameter, s in trainer.optimizers[0].state.items()}
    told = {"metrics": seen, "weights": torch.cat([p.detach().flatten() for p in module.parameters()]).tolist(),
            "step": trainer.global_step, "counters": len(set(counters.values())), "parameters": len(counters)}
    open(f"{settings['name']}.json", "w").write(json.dumps(told))
"""


class Runs:
    """Run the script so often as is needed, each time with another number of processes."""

    def __init__(self, processes: Callable[..., Any], folder: Path) -> None:
        self.processes, self.folder = processes, folder
        self.said: dict[str, str] = {}

    def __call__(self, name: str, nproc: int, **settings: Any) -> dict[str, Any] | None:
        """Return what rank 0 told at the end, None for a run that was killed."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        asked = json.dumps({"name": name, **settings})
        results = self.processes(nproc, SCRIPT, asked, timeout=90, folder=self.folder, check="kill" not in settings)
        self.said[name] = results[0].err
        told = self.folder / f"{name}.json"
        return json.loads(told.read_text()) if told.exists() else None

    def steps(self, name: str) -> dict[tuple[int, int], list[int]]:
        """Return the samples of each (epoch, step) of a run, of all its processes."""
        found: dict[tuple[int, int], list[int]] = {}
        for path in sorted(self.folder.glob(f"{name}-*.jsonl")):
            for line in path.read_text().splitlines():
                epoch, step, index = json.loads(line)
                found.setdefault((epoch, step), []).extend(index)
        return {step: sorted(samples) for step, samples in found.items()}


@pytest.fixture
def runs(processes: Callable[..., Any], tmp_path: Path) -> Runs:
    return Runs(processes, tmp_path)


@pytest.mark.parametrize("trainer", [{"accumulate_grad_batches": 2}, pytest.param({}, marks=pytest.mark.slow)])
def test_a_run_killed_on_4_goes_on_with_2_1_and_3_and_sees_what_one_process_sees(
    runs: Runs, trainer: dict[str, Any]
) -> None:
    whole = runs("whole", 1, batch_size=12, kept="other", trainer=trainer)
    assert whole is not None
    more = {"trainer": trainer}
    last = whole["step"]
    assert runs("a", 4, kill=3, victim=2, **more) is None
    assert runs("b", 2, kill=last // 2 - 1, victim=1, resume=True, **more) is None
    assert runs("c", 1, kill=last // 2 + 2, resume=True, **more) is None
    end = runs("d", 3, resume=True, batch_size=4, **more)  # a script that divides the batch by itself
    assert end is not None

    expected, seen = runs.steps("whole"), {}
    for name in "abcd":  # what was done behind the last checkpoint is done again
        steps = runs.steps(name)
        begins = min(steps)
        seen = {step: samples for step, samples in seen.items() if step < begins} | steps
    assert seen == expected
    assert end["step"] == last
    assert end["metrics"]["above"] == whole["metrics"]["above"]
    assert end["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-6)
    assert end["weights"] == pytest.approx(whole["weights"], rel=1e-5, abs=1e-6)
    assert end["counters"] == end["parameters"]  # each parameter has an update counter of its own
    assert "2 processes go on where 4 were" in runs.said["b"]
    assert "A batch has 12 samples in all, 6 for each process; it had 12, 3 for each." in runs.said["b"]


def test_the_batch_of_each_process_stays_if_that_is_asked_for(runs: Runs) -> None:
    assert runs("a", 4, kill=3) is None
    end = runs("b", 2, resume=True, trainer={"keep_batch": "each"})
    assert end is not None
    assert "A batch has 6 samples in all, 3 for each process; it had 12, 3 for each." in runs.said["b"]
    before = [sample for step, samples in runs.steps("a").items() if step < (0, 3) for sample in samples]
    after = [sample for (epoch, _), samples in runs.steps("b").items() if epoch == 0 for sample in samples]
    assert sorted(before + after) == list(range(103))


@pytest.mark.slow
def test_the_same_number_of_processes_ends_bit_for_bit_where_it_would_have(runs: Runs) -> None:
    whole = runs("whole", 2, kept="other")
    assert runs("a", 2, kill=7, victim=1, every=2) is None
    end = runs("b", 2, resume=True, every=2)
    assert end == whole
    rest = runs.steps("b")
    assert rest == {step: samples for step, samples in runs.steps("whole").items() if step >= min(rest)}
