"""accelerate is a loop by hand around prepared objects. It has no bar and no checkpoints that come by themselves."""

from __future__ import annotations

from accelerate import Accelerator
from torch.utils.data import DataLoader

from benchmarks.job import Job


def train(job: Job) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard" if job.log else None, project_dir=job.folder)
    net, optimizer = accelerator.prepare(job.net, job.optimizer(job.net.parameters()))
    batches = accelerator.prepare(job.batches) if isinstance(job.batches, DataLoader) else job.batches
    if job.log:
        accelerator.init_trackers("bench")
    net.train()
    loss_of = job.loss
    job.clock.enter()
    for step, (inputs, targets) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = loss_of(net(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        if job.log and step % 50 == 0:
            accelerator.log({name: loss.item() for name in job.names}, step=step)
    accelerator.end_training()
