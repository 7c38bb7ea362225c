from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.job import Job

OFF: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
}


class Trainer(transformers.Trainer):
    job: Job

    def get_train_dataloader(self) -> Any:
        batches = self.job.batches
        return self.accelerator.prepare(batches) if isinstance(batches, DataLoader) else batches

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **ignored: Any) -> Tensor:
        features, targets = inputs
        loss = self.job.loss(model(features), targets)
        step = self.state.global_step
        if self.job.log and step % 50 == 0:
            value = loss.item()
            self.log(dict.fromkeys(self.job.names, value))
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:  # it wants dicts; pairs are moved as they are
        return self._prepare_input(inputs)


def train(job: Job) -> None:
    options = {} if job.defaults else OFF
    if job.log:
        options = {"report_to": "tensorboard"}
    arguments = transformers.TrainingArguments(
        output_dir=str(job.folder), num_train_epochs=1, max_grad_norm=0.0, use_cpu=True, **options
    )
    optimizer = job.optimizer(job.net.parameters())
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(
        job.net, arguments, train_dataset=range(math.ceil(len(job.batches))), optimizers=(optimizer, constant)
    )
    trainer.job = job
    job.clock.enter()
    trainer.train()
