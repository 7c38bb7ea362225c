"""The loop that a careful person writes: what all others are compared with."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.job import Job


def train(job: Job, processes: int = 1) -> None:
    job.clock.enter()
    net, loss_of = job.net, job.loss
    if processes > 1:
        dist.init_process_group("gloo")
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = job.optimizer(net.parameters(), **({"fused": True} if job.best else {}))
    net.train()
    for inputs, targets in job.batches:
        optimizer.zero_grad()
        loss = loss_of(net(inputs), targets)
        loss.backward()
        optimizer.step()
    if processes > 1:
        dist.destroy_process_group()
