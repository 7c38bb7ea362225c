from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from benchmarks.job import Job


class Module(L.LightningModule):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer, self.names = job.net, job.loss, job.optimizer, job.names

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.net.parameters())


class LoggingModule(Module):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for name in self.names:
            self.log(name, loss)
        return loss


OFF: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def train(job: Job, ckpt_path: Any = None, processes: int = 1, **options: Any) -> None:
    module = LoggingModule(job) if job.log else Module(job)
    options = {"max_epochs": 1, "default_root_dir": job.folder, "accelerator": "cpu"} | options
    if processes > 1:
        options |= {"devices": processes, "strategy": "ddp"}
    trainer = L.Trainer(**options if job.defaults else OFF | options)
    job.clock.enter()
    trainer.fit(module, job.batches, ckpt_path=ckpt_path)
