"""What `configure_optimizers` may return, and when schedules move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainkit.errors import MisconfigurationException, WrongTypeException, nearest, warn
from trainkit.hooks import accepts, is_overridden

if TYPE_CHECKING:
    from trainkit.module import Module
    from trainkit.trainer import Trainer

FORMS = """configure_optimizers may return
  an optimizer
  a list or tuple of optimizers
  two lists: optimizers, and lr schedulers (or dicts of their settings)
  a dict with "optimizer", and if wanted "lr_scheduler" and "monitor"
  a list or tuple of such dicts
  None, to train without an optimizer"""


@dataclass
class LRSchedulerConfig:
    """A learning-rate schedule and what moves it."""

    scheduler: Any
    """Anything with `step`, `state_dict` and `load_state_dict`."""
    name: str | None = None
    """What LearningRateMonitor calls it."""
    interval: str = "epoch"
    """"epoch" or "step": whether finished epochs or optimizer updates are counted."""
    frequency: int = 1
    """Move after every n-th of them."""
    reduce_on_plateau: bool = False
    """Whether it takes a metric."""
    monitor: str | None = None
    """The metric it takes."""
    strict: bool = True
    """Whether a metric that is not there is an error (True) or a warning (False)."""


def configure(module: Module) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Call the module's `configure_optimizers` and return what it means.

    Raises:
        MisconfigurationException: the module has none, or it returned something else than the forms above.
    """
    returned = module.configure_optimizers()
    if returned is None:
        warn("configure_optimizers returned None: the weights will not be updated.")
        return [], []
    optimizers: list[Any]
    schedulers: list[Any] = []
    if isinstance(returned, Optimizer):
        optimizers = [returned]
    elif isinstance(returned, Mapping):
        optimizers, schedulers = _from_dicts([returned])
    elif not isinstance(returned, (list, tuple)) or not returned:
        raise MisconfigurationException(f"{FORMS}. Received: {returned!r}.")
    elif len(returned) == 2 and isinstance(returned[0], (list, tuple)):
        optimizers = list(returned[0])
        schedulers = list(returned[1]) if isinstance(returned[1], (list, tuple)) else [returned[1]]
    elif all(isinstance(item, Mapping) for item in returned):
        optimizers, schedulers = _from_dicts(returned)
    else:
        optimizers = list(returned)
    if not optimizers:
        raise MisconfigurationException(f"{FORMS}. Received no optimizer: {returned!r}.")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise MisconfigurationException(f"{FORMS}. Received among the optimizers: {optimizer!r}.")
    configs = [scheduler_config(scheduler, module) for scheduler in schedulers]
    for config in configs:
        owner = getattr(config.scheduler, "optimizer", None)
        if owner is not None and all(owner is not optimizer for optimizer in optimizers):
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} moves an optimizer that configure_optimizers did not return."
            )
    return optimizers, configs


def _from_dicts(dicts: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    optimizers, schedulers = [], []
    for given in dicts:
        if "optimizer" not in given:
            raise MisconfigurationException(f"{FORMS}. Received a dict without 'optimizer': {sorted(given)}.")
        unknown = set(given) - {"optimizer", "lr_scheduler", "monitor"}
        if unknown:
            warn(
                f"configure_optimizers: {', '.join(map(repr, sorted(unknown)))} means nothing beside 'optimizer', "
                "'lr_scheduler' and 'monitor'.",
                RuntimeWarning,
            )
        optimizers.append(given["optimizer"])
        scheduler = given.get("lr_scheduler")
        if scheduler is not None:
            settings = dict(scheduler) if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
            if given.get("monitor") is not None:
                settings.setdefault("monitor", given["monitor"])
            schedulers.append(settings)
    return optimizers, schedulers


def scheduler_config(given: Any, module: Module) -> LRSchedulerConfig:
    """Return the settings of one schedule, given as itself, as a dict or as a finished config.

    With manual optimization the module moves its schedules itself, so there is less to say about them.
    """
    if isinstance(given, LRSchedulerConfig):
        return given
    settings = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    known = set(LRSchedulerConfig.__dataclass_fields__)
    for key in settings:
        if key not in known:
            warn(f"the lr scheduler's key {key!r} means nothing; {nearest(str(key), known)}", RuntimeWarning)
    if "scheduler" not in settings:
        raise MisconfigurationException(
            f"an lr scheduler's dict needs the key 'scheduler'. Received: {sorted(settings)}."
        )
    scheduler = settings["scheduler"]
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    if settings.get("monitor") is None:
        settings["monitor"] = getattr(scheduler, "monitor", None)
    config = LRSchedulerConfig(**{key: value for key, value in settings.items() if key in known})
    config.reduce_on_plateau = config.reduce_on_plateau or plateau
    if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
        missing = [name for name in ("step", "state_dict", "load_state_dict") if not hasattr(scheduler, name)]
        if missing:
            raise WrongTypeException(
                f"an lr scheduler needs {', '.join(missing)}, which {type(scheduler).__name__} has not."
            )
        if not accepts(scheduler.step, int(config.reduce_on_plateau)) and not is_overridden(
            module, "lr_scheduler_step"
        ):
            raise MisconfigurationException(
                f"{type(scheduler).__name__}.step can't be called as torch's schedules are: override "
                "lr_scheduler_step(self, scheduler, metric) and call it there as it wants to be."
            )
    if config.interval not in ("step", "epoch"):
        raise MisconfigurationException(
            f"an lr scheduler's interval is 'step' or 'epoch'. Received: {config.interval!r}."
        )
    if isinstance(config.frequency, bool) or not isinstance(config.frequency, int) or config.frequency < 1:
        raise MisconfigurationException(f"an lr scheduler's frequency is at least 1. Received: {config.frequency!r}.")
    if config.reduce_on_plateau and config.monitor is None and module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(scheduler).__name__} needs the name of the metric it watches: return "
            '{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}.'
        )
    if interval_looks_wrong(config):
        warn(f"{type(scheduler).__name__} is made for interval='step' but moves once an epoch here.", RuntimeWarning)
    return config


def interval_looks_wrong(config: LRSchedulerConfig) -> bool:
    """Whether a schedule that spans optimizer updates moves by epochs."""
    return config.interval == "epoch" and type(config.scheduler).__name__ in ("OneCycleLR", "CyclicLR")


class Schedules:
    """The learning-rate schedules of a run, sorted by what moves them."""

    def __init__(self, configs: Sequence[LRSchedulerConfig], trainer: Trainer) -> None:
        self.trainer = trainer
        self.sort(configs)

    def sort(self, configs: Sequence[LRSchedulerConfig]) -> None:
        """Take these schedules instead; a callback may change them between epochs."""
        self.by_step = tuple(c for c in configs if c.interval == "step" and not c.reduce_on_plateau)
        self.by_epoch = tuple(c for c in configs if c.interval == "epoch" and not c.reduce_on_plateau)
        self.plateau_by_step = tuple(c for c in configs if c.interval == "step" and c.reduce_on_plateau)
        self.plateau_by_epoch = tuple(c for c in configs if c.interval == "epoch" and c.reduce_on_plateau)

    def move(self, configs: Iterable[LRSchedulerConfig], count: int) -> None:
        """Move those schedules whose turn it is after `count` updates or epochs."""
        for config in configs:
            if count % config.frequency:
                continue
            metric = self._metric(config) if config.reduce_on_plateau else None
            if metric is not None or not config.reduce_on_plateau:
                metrics = self.trainer.metrics
                before, metrics.hook = metrics.hook, "lr_scheduler_step"
                self.trainer.module.lr_scheduler_step(config.scheduler, metric)
                metrics.hook = before

    def _metric(self, config: LRSchedulerConfig) -> Tensor | None:
        """Return the newest value of what a schedule watches, of several processes the first one's."""
        several = self.trainer.world_size > 1
        if several:
            self.trainer.metrics.catch_up()
        metrics = self.trainer.callback_metrics
        value = metrics.get(config.monitor or "")
        if several:
            value = self.trainer.strategy.broadcast(value if value is None else value.detach().cpu())
        if value is not None:
            return value
        message = (
            f"{type(config.scheduler).__name__} watches {config.monitor!r}, which was not logged so far; there is: "
            f"{', '.join(sorted(metrics)) or 'nothing'}. If it is logged later or more rarely, give the schedule a "
            "larger frequency, or strict=False to pass over it until then."
        )
        if config.strict:
            raise MisconfigurationException(message)
        warn(message, RuntimeWarning)
        return None
