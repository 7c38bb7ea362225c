"""Settings drawn at random: N processes see the samples, log the values and learn the weights that one process does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

BODY = """
import json, os, random, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from trainkit import Module, Trainer, seed_everything

torch.set_num_threads(1)
WORLD = int(os.environ.get("WORLD_SIZE", 1))


class Samples(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):  # with a random augmentation
        return torch.randn(4, generator=torch.Generator().manual_seed(index)) + 0.1 * torch.rand(4), index


class Net(Module):
    def __init__(self, drawn):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.drawn, self.trained, self.validated = drawn, [], []
        self.automatic_optimization = not drawn["manual"]

    def training_step(self, batch, batch_idx):
        x, index = batch
        self.trained += index.tolist()
        loss = self.head(torch.tanh(self.body(x))).square().mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("samples", float(len(x)), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("most", index.max().float(), reduce_fx="max", on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, index = batch
        self.validated += [(dataloader_idx, one) for one in index.tolist()]
        self.log("sum", index.float().sum(), reduce_fx="sum")
        self.log("third", (index % 3 == 0).float().mean())
        self.log("mean", x.mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.05)
        if not self.drawn["schedule"]:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def draw(number):
    of = random.Random(number)
    manual = of.random() < 0.2
    drop = of.random() < 0.2
    return {
        "manual": manual,
        "schedule": not manual and of.random() < 0.5,
        "shuffle": of.random() < 0.6,
        "samples": of.randint(24 if drop else 1, 60),
        "to_validate": of.choice([1, 2, 3, 7, 20, 31]),
        "drop": drop,
        "accumulate": 1 if manual else of.choice([1, 1, 2, 3]),
        "clip": None if manual else of.choice([None, 0.1]),
        "loaders": of.choice([1, 1, 2]),
        "limit": of.choice([1.0, 1.0, 0.5, 2]),
        "interval": of.choice([1.0, 1.0, 0.5]),
        "workers": of.choice([0, 0, 2]),
    }


for number in range(int(sys.argv[1]), int(sys.argv[2])):
    drawn = draw(number)
    seed_everything(number, verbose=False)
    module, problem = Net(drawn), None

    def loader(length, **more):
        return DataLoader(Samples(length), 12 // WORLD, num_workers=drawn["workers"], **more)

    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, accumulate_grad_batches=drawn["accumulate"],
        gradient_clip_val=drawn["clip"], limit_train_batches=drawn["limit"], val_check_interval=drawn["interval"],
    )
    try:
        trainer.fit(
            module,
            loader(drawn["samples"], shuffle=drawn["shuffle"], drop_last=drawn["drop"]),
            [loader(drawn["to_validate"]) for _ in range(drawn["loaders"])],
        )
    except Exception as error:  # a limit of less than a batch, for example: on any number of processes
        problem = type(error).__name__
    print("told " + json.dumps({
        "drawn": drawn, "problem": problem, "step": trainer.global_step,
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "weights": [parameter.double().sum().item() for parameter in module.parameters()],
        "trained": module.trained, "validated": module.validated,
    }))
"""
EXACT = ("samples", "most", "sum")


def told(results: list[Any]) -> list[list[dict[str, Any]]]:
    """Return what each process told of each run."""
    lines = [[line for line in rank.out.splitlines() if line.startswith("told ")] for rank in results]
    return [[json.loads(line.removeprefix("told ")) for line in rank] for rank in lines]


@pytest.mark.parametrize(
    ("first", "last"), [(0, 4), pytest.param(4, 90, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_drawn_settings_come_to_the_same_on_any_number_of_processes(
    first: int, last: int, processes: Callable[..., Any]
) -> None:
    (alone,) = told(processes(1, BODY, first, last, timeout=300))
    assert len(alone) == last - first
    assert any(run["problem"] is None and len(run["trained"]) > 30 for run in alone)
    for number in (2, 3, 4):
        ranks = told(processes(number, BODY, first, last, timeout=300))
        for one, *runs in zip(alone, *ranks, strict=True):
            drawn = one["drawn"]
            assert [run["problem"] for run in runs] == [one["problem"]] * number, drawn
            if one["problem"] is not None:
                continue
            assert {run["step"] for run in runs} == {one["step"]}, drawn
            assert Counter(tuple(seen) for run in runs for seen in run["validated"]) == Counter(
                map(tuple, one["validated"])
            ), drawn
            trained = Counter(seen for run in runs for seen in run["trained"])
            if drawn["manual"]:  # who lacks a sample goes along with one of another process, which weighs nothing
                assert trained >= Counter(one["trained"]), drawn
            else:
                assert trained == Counter(one["trained"]), drawn
            for run in runs:
                assert run["metrics"].keys() == one["metrics"].keys(), drawn
                for name, value in one["metrics"].items():
                    tolerance = 0 if name.split("/")[0] in EXACT else 1e-6
                    assert run["metrics"][name] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, drawn)
                assert run["weights"] == pytest.approx(one["weights"], abs=1e-4), drawn
                assert run["weights"] == runs[0]["weights"], drawn
