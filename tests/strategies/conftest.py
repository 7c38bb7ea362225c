"""Small models in several processes, each compared with a loop by hand over whole batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

SPREAD = '''
import json, os, sys, warnings
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset
from trainkit import Callback, Module, Trainer, seed_everything
from trainkit.errors import MisconfigurationException
from trainkit.strategies import FSDPStrategy, ModelParallelStrategy

warnings.filterwarnings("error")
torch.set_num_threads(1)
BATCH, RANK, WORLD = 12, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
told = {}


class Block(nn.Module):
    ran = 0

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        Block.ran += 1
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def build():
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 1))


class Net(Module):
    def __init__(self):
        super().__init__()
        self.net = build()

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))
        self.log("sign", ((self.net(batch[0]) > 0) == (batch[1] > 0)).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def tensors(samples):
    g = torch.Generator().manual_seed(0)
    return torch.randn(samples, 8, generator=g), torch.randn(samples, 1, generator=g)


def data(samples, parts=WORLD, **settings):
    return DataLoader(TensorDataset(*tensors(samples)), BATCH // parts, **settings)


def trainer(strategy, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 2}
    return Trainer(strategy=strategy, **{**quiet, **settings})


def by_hand(samples=30, accumulate=1, freeze=None, times=1, clip=None, epochs=2):
    net = build()
    x, y = tensors(samples)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for epoch in range(epochs):
        if freeze is not None:
            freeze(net, epoch)
        begins = range(0, samples, BATCH)
        for index, k in enumerate(begins):
            for _ in range(times):
                if index % accumulate == 0:
                    optimizer.zero_grad()
                loss = nn.functional.mse_loss(net(x[k : k + BATCH]), y[k : k + BATCH])
                (loss / accumulate).backward()
                if (index + 1) % accumulate == 0 or k == begins[-1]:
                    if clip is not None:
                        nn.utils.clip_grad_norm_(net.parameters(), clip)
                    optimizer.step()
    return flat(net)


def flat(module):
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters())
    return torch.cat([p.detach().flatten() for p in whole])


def apart(module, reference):
    """How far a module's weights are from some others, beside their size."""
    return float((flat(module) - reference).norm() / reference.norm())


def fitted(strategy, module=None, samples=30, parts=WORLD, **settings):
    module = Net() if module is None else module
    trainer(strategy, **settings).fit(module, data(samples, parts), data(samples, parts))
    return module


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if RANK == 1 and trainer.global_step == 5:
            trainer.should_stop = True


def stopped(strategy, module, **settings):
    t = trainer(strategy, callbacks=[Stop()], max_epochs=50, **settings)
    t.fit(module, data(120), data(12))
    return t.global_step
'''

Spread = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def spread(processes: Callable[..., list[Any]]) -> Spread:
    """Run lines that fill `told` in so many processes, and return what each of them told, by rank."""

    def run(nproc: int, body: str, *args: str) -> list[dict[str, Any]]:
        ranks = processes(nproc, SPREAD + body + "\nprint('told ' + json.dumps(told), flush=True)\n", *args, timeout=90)
        lines = [[line for line in rank.out.splitlines() if line.startswith("told ")][-1] for rank in ranks]
        return [json.loads(line.removeprefix("told ")) for line in lines]

    return run
