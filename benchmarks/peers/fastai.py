from __future__ import annotations

from functools import partial
from typing import Any

from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder
from fastai.optimizer import OptimWrapper

from benchmarks.job import Job


def train(job: Job) -> None:
    keywords = dict(job.optimizer.keywords)
    lr = keywords.pop("lr")
    learner = Learner(
        DataLoaders(job.batches, [], device="cpu"),
        job.net,
        loss_func=job.loss,
        opt_func=partial(OptimWrapper, opt=partial(job.optimizer.func, **keywords)),
        cbs=services(job) if job.log else [],
        path=job.folder,
        default_cbs=True,
    )
    if not job.defaults:
        learner.remove_cbs([ProgressCallback, Recorder])
    job.clock.enter()
    learner.fit(1, lr=lr)


def services(job: Job) -> list[Any]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(job.folder)

    class Scalars(Callback):
        def after_batch(self) -> None:
            if self.train_iter % 50 == 0:
                for name in job.names:
                    writer.add_scalar(name, self.loss.item(), self.train_iter)

    return [Scalars()]
