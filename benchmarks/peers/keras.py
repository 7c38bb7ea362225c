"""Keras 3 over torch. It calls the net in a layer, and has optimizers of its own: the one of the same name is used."""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
from torch import Tensor

from benchmarks.job import Job


class Model(keras.Model):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.net, self.loss_of = keras.layers.TorchModuleWrapper(job.net), job.loss

    def call(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def compute_loss(self, x: Any, y: Tensor, y_pred: Tensor, *ignored: Any, **also_ignored: Any) -> Tensor:
        return self.loss_of(y_pred, y)


def optimizer_like(job: Job) -> keras.optimizers.Optimizer:
    given = dict(job.optimizer.keywords)
    renamed = {"learning_rate": given.pop("lr")} | {
        key: given[key] for key in ("weight_decay", "momentum") if key in given
    }
    return getattr(keras.optimizers, job.optimizer.func.__name__)(**renamed)


def train(job: Job) -> None:
    model = Model(job)
    model.compile(optimizer=optimizer_like(job), metrics=[scalar(name) for name in job.names])
    callbacks = []
    if job.log:
        callbacks = [keras.callbacks.CSVLogger(job.folder / "log.csv")]
        callbacks.append(keras.callbacks.ModelCheckpoint(job.folder / "last.weights.h5", save_weights_only=True))
    job.clock.enter()
    batches = (tuple(pair) for pair in job.batches)  # it knows generators of tuples, and no iterable of one's own
    verbose = "auto" if job.defaults else 0
    model.fit(batches, epochs=1, steps_per_epoch=len(job.batches), verbose=verbose, callbacks=callbacks)


def scalar(name: str) -> keras.metrics.Metric:
    """What Keras logs are metrics: this one is the mean of a number that is the loss in the other peers."""
    return keras.metrics.MeanMetricWrapper(lambda targets, outputs: outputs.mean(), name=name.replace("/", "_"))
