"""(d) A small Transformer that predicts the next character of Python's manual."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.case import ALL, STEP, Case
from benchmarks.job import Clock, Job
from benchmarks.training import train

TITLE = "(d) Small Transformer"
ROUNDS = (5, 2)
CASES = [Case("steps", "everything off", ALL, (STEP,))]
BATCH, LENGTH, WARM_UP, STEPS = 32, 64, 5, 45


class Transformer(nn.Module):
    """Causal, three layers, over 128 characters."""

    def __init__(self, width: int = 96, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.scores = nn.Linear(width, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.blocks(self.characters(codes) + self.places, mask=self.mask, is_causal=True)
        return self.scores(x)


def loss(scores: Tensor, codes: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1), codes.flatten())


def make_job(folder: Path, steps: int) -> Job:
    torch.manual_seed(0)
    net = Transformer()
    text = torch.tensor(list("\n\n".join(topics.values()).encode("ascii", errors="replace")))
    passages = text.unfold(0, LENGTH + 1, 7)[: BATCH * steps]
    passages = passages[torch.randperm(len(passages))]
    loader = DataLoader(TensorDataset(passages[:, :-1], passages[:, 1:]), BATCH)
    adamw = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01)
    return Job(net, loss, adamw, loader, Clock(WARM_UP, steps), folder, best=True)


def measure(case: str, peer: str, quick: bool, folder: Path) -> dict[str, Any]:
    steps = 20 if quick else STEPS
    return train(peer, make_job(folder, steps))
