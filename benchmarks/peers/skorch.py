from __future__ import annotations

from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Checkpoint, TensorBoard
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.job import Job


class Loss(nn.Module):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets)


def train(job: Job) -> None:
    callbacks: Any = None if job.defaults else "disable"
    if job.log:
        callbacks = services(job)
    net = NeuralNet(
        job.net,
        criterion=Loss(job.loss),
        optimizer=job.optimizer.func,
        **{f"optimizer__{name}": value for name, value in job.optimizer.keywords.items()},
        max_epochs=1,
        train_split=None,
        iterator_train=lambda dataset, **ignored: job.batches,
        callbacks=callbacks,
        verbose=int(job.defaults),
    )
    job.clock.enter()
    net.fit(TensorDataset(torch.zeros(1), torch.zeros(1)), None)  # only asked for its length: see iterator_train


def services(job: Job) -> list[Any]:
    from torch.utils.tensorboard import SummaryWriter

    class Scalars(TensorBoard):
        def on_batch_end(self, net: Any, training: bool = False, **arguments: Any) -> None:
            step = len(net.history[-1]["batches"])
            if step % 50 == 0:
                for name in job.names:
                    self.writer.add_scalar(name, net.history[-1, "batches", -1, "train_loss"], step)

    return [Scalars(SummaryWriter(job.folder)), Checkpoint(dirname=str(job.folder), monitor=None)]
