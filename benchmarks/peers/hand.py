"""The loop that a careful person writes: what all others are compared with."""

from __future__ import annotations

from benchmarks.job import Job


def train(job: Job) -> None:
    job.clock.enter()
    net, loss_of = job.net, job.loss
    optimizer = job.optimizer(net.parameters(), **({"fused": True} if job.best else {}))
    net.train()
    for inputs, targets in job.batches:
        optimizer.zero_grad()
        loss = loss_of(net(inputs), targets)
        loss.backward()
        optimizer.step()
