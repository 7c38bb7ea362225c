"""ignite attaches what is asked for: with scalars to log, a TensorBoard logger, a bar and a checkpoint an epoch."""

from __future__ import annotations

from ignite.engine import Engine, Events, create_supervised_trainer

from benchmarks.job import Job


def train(job: Job) -> None:
    trainer = create_supervised_trainer(job.net, job.optimizer(job.net.parameters()), job.loss)
    if job.log:
        attach_services(trainer, job)
    job.clock.enter()
    trainer.run(job.batches, max_epochs=1)


def attach_services(trainer: Engine, job: Job) -> None:
    from ignite.handlers import ModelCheckpoint, ProgressBar, TensorboardLogger

    def scalars(loss: float) -> dict[str, float]:
        return dict.fromkeys(job.names, loss)

    ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
    logger = TensorboardLogger(log_dir=job.folder)
    event = Events.ITERATION_COMPLETED(every=50)
    logger.attach_output_handler(trainer, event, tag="train", output_transform=scalars)
    checkpoint = ModelCheckpoint(job.folder / "checkpoints", require_empty=False)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint, {"net": job.net})
