"""One Transformer under DDP, FSDP and tensor parallelism: what changes is one flag.

    torchrun --nproc-per-node 2 -m examples.spread_transformer --strategy ddp    (or fsdp, or tp)
    torchrun --nproc-per-node 2 -m trainkit fit --config configs/spread_transformer.yaml --trainer.strategy fsdp
                                                           (or --trainer.strategy.class_path ModelParallelStrategy)

`python -m examples.spread_transformer` trains it in one process. `configure_model` makes the blocks and says how they
are spread; without a mesh, under DDP and alone, they stay whole. The text is that of char_transformer.py.
All ways come to 3.5 bits a character after 300 updates (with Python 3.11's text).
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from examples.char_transformer import CHARACTERS, Manual
from trainkit import Module, Trainer, seed_everything
from trainkit.strategies import ModelParallelStrategy

PLAN = {
    **{name: ColwiseParallel() for name in ("query", "key", "value", "up")},
    **{name: RowwiseParallel() for name in ("out", "down")},
}
"""How tensor parallelism cuts a block: each process has some of the heads, and a part of the perceptron."""


class Block(nn.Module):
    """Causal attention, then a perceptron, each added to what came in.

    Args:
        width: of the embeddings.
        head: numbers in each head; `width` is a multiple of it.
    """

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def heads(self, x: Tensor) -> Tensor:
        """Return (batch, heads, length, head): as many heads as this process has."""
        return x.unflatten(-1, (-1, self.head)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before_attention(x)
        query, key, value = (self.heads(part(normed)) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_perceptron(x))))


class SpreadTransformer(Module):
    """A causal Transformer whose blocks are spread over the run's mesh of processes, if it has one.

    Args:
        length: how many characters it looks back.
        width: of its embeddings; a multiple of `head`.
        layers: how many blocks.
        head: numbers in each head; tensor parallelism deals the heads out.
    """

    def __init__(self, length: int = 64, width: int = 64, layers: int = 2, head: int = 16, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.characters, self.places = nn.Embedding(CHARACTERS, width), nn.Embedding(length, width)
        self.scores = nn.Linear(width, CHARACTERS)
        self.blocks: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        width, head = self.hparams.width, self.hparams.head
        self.blocks = nn.Sequential(*(Block(width, head) for _ in range(self.hparams.layers)))
        if self.device_mesh is None:
            return
        for block in self.blocks:
            if "tensor_parallel" in self.device_mesh.mesh_dim_names:
                parallelize_module(block, self.device_mesh["tensor_parallel"], PLAN)
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            else:
                fully_shard(block, mesh=self.device_mesh)

    def loss(self, passages: Tensor) -> Tensor:
        codes, following = passages[:, :-1], passages[:, 1:]
        x = self.characters(codes) + self.places(torch.arange(codes.shape[1], device=codes.device))
        return F.cross_entropy(self.scores(self.blocks(x)).flatten(0, 1), following.flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/bits", self.loss(batch) / math.log(2), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="auto", choices=["auto", "ddp", "fsdp", "tp"])
    chosen = parser.parse_known_args()[0].strategy
    strategy = ModelParallelStrategy(save_distributed_checkpoint=False) if chosen == "tp" else chosen
    seed_everything(42)
    settings = {"max_steps": 300, "val_check_interval": 150, "gradient_clip_val": 1.0}
    trainer = Trainer(strategy=strategy, default_root_dir="runs/spread_transformer", **settings)
    trainer.fit(SpreadTransformer(), Manual(batch_size=32 // trainer.strategy.shard[1]))
