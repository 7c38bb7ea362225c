"""LearningRateMonitor: write the learning rates to the loggers as training goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainkit import Callback
from trainkit.errors import MisconfigurationException, warn

if TYPE_CHECKING:
    from trainkit import Module, Trainer


MOMENTUM = {"momentum", "betas"}
"""Where optimizers have it."""


class LearningRateMonitor(Callback):
    """Log each parameter group's learning rate, and if wanted its momentum and weight decay.

    A rate is named after its optimizer, `lr-Adam`; a second optimizer of that class is `lr-Adam-1`; several groups are
    `lr-Adam/pg1`, `lr-Adam/pg2`, or `lr-Adam/encoder` where a group has a "name". A scheduler configuration's "name"
    stands in for `lr-Adam`. Momentum and weight decay add `-momentum` and `-weight_decay`. A group that is added while
    training goes on is logged from then on; the one that was alone becomes `lr-Adam/pg1`.

    The values are also in `trainer.callback_metrics`. `lrs` keeps every logged rate; `last_momentum_values` and
    `last_weight_decay_values` the latest of theirs.

    Args:
        logging_interval: "step" logs at every `log_every_n_steps`-th step, "epoch" when an epoch begins. None takes
            each scheduler's own interval; an optimizer without a scheduler is then logged at both.
        log_momentum: log "momentum", or the first of "betas"; 0 where there is neither.
        log_weight_decay: log "weight_decay".

    Raises:
        MisconfigurationException: `logging_interval` is none of the three; when training starts, the Trainer has no
            logger, or two groups of one optimizer have the same name.
    """

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                'LearningRateMonitor(logging_interval=...) must be "step", "epoch" or None. '
                f"Received: {logging_interval!r}."
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        self._logged_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.loggers and not trainer.fast_dev_run:  # which has taken them away
            raise MisconfigurationException(
                "LearningRateMonitor needs a logger, and this Trainer has none. "
                "Leave out logger=False or take LearningRateMonitor out of the callbacks."
            )
        self.lrs = {name: [] for name, _, _ in _groups(trainer)}
        self.last_momentum_values = dict.fromkeys(f"{name}-momentum" for name in self.lrs)
        self.last_weight_decay_values = dict.fromkeys(f"{name}-weight_decay" for name in self.lrs)
        self._logged_step = -1
        without = {
            type(o).__name__ for o in trainer.optimizers if not any(MOMENTUM & group.keys() for group in o.param_groups)
        }
        if self.log_momentum and without:
            warn(
                f"LearningRateMonitor(log_momentum=True): {', '.join(sorted(without))} has no momentum; 0 is logged.",
                RuntimeWarning,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps
        # the windows of an accumulation have several batches and one step
        if every and (step + 1) % every == 0 and step != self._logged_step and self.logging_interval != "epoch":
            self._logged_step = step
            self._log(trainer, "step")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch")

    def _log(self, trainer: Trainer, interval: str) -> None:
        values: dict[str, float] = {}
        for name, own_interval, group in _groups(trainer):  # found anew: a callback may have added some
            self._follow(name)
            if self.logging_interval is None and own_interval not in (None, interval):
                continue
            values[name] = float(group["lr"])
            self.lrs[name].append(values[name])
            if self.log_momentum:
                momentum = float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))
                values[f"{name}-momentum"] = self.last_momentum_values[f"{name}-momentum"] = momentum
            if self.log_weight_decay and "weight_decay" in group:
                decay = float(group["weight_decay"])
                values[f"{name}-weight_decay"] = self.last_weight_decay_values[f"{name}-weight_decay"] = decay
        if values:
            trainer.metrics.publish(values)
            for logger in trainer.loggers:
                # the update these rates are about to make: the step its loss will be logged at
                logger.log_metrics(metrics=values, step=trainer.global_step)

    def _follow(self, name: str) -> None:
        """Keep the rates of a group that was alone until now, and so had no number."""
        alone = name.removesuffix("/pg1")
        if alone != name and alone in self.lrs:
            self.lrs[name] = self.lrs.pop(alone)
        self.lrs.setdefault(name, [])


def _groups(trainer: Trainer) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Yield each parameter group with its name and its scheduler's interval."""
    scheduled = [(config.scheduler.optimizer, config.name, config.interval) for config in trainer.lr_scheduler_configs]
    with_scheduler = {id(optimizer) for optimizer, _, _ in scheduled}
    alone = [(optimizer, None, None) for optimizer in trainer.optimizers if id(optimizer) not in with_scheduler]
    seen: Counter[type] = Counter()
    for optimizer, given_name, interval in [*scheduled, *alone]:
        name = given_name
        if name is None:
            kind = type(optimizer)
            name = f"lr-{kind.__name__}" + (f"-{seen[kind]}" if seen[kind] else "")
            seen[kind] += 1
        groups = optimizer.param_groups
        names = [str(group.get("name") or f"pg{number}") for number, group in enumerate(groups, 1)]
        twice = [given for given, count in Counter(names).items() if count > 1]
        if twice:
            raise MisconfigurationException(
                f"LearningRateMonitor can't tell the parameter groups of {type(optimizer).__name__} apart: "
                f"several have the name {', '.join(map(repr, twice))}."
            )
        for group, group_name in zip(groups, names, strict=True):
            numbered = len(groups) > 1 or group.get("name")
            yield f"{name}/{group_name}" if numbered else name, interval, group
