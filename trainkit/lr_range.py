"""The learning-rate range test: raise the rate with every update, and see where the loss falls fastest.

Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit import loop
from trainkit.attributes import has_attribute, set_attribute
from trainkit.errors import MisconfigurationException, warn
from trainkit.rehearsal import Updates, agreed, rehearsal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainkit.module import Module
    from trainkit.signals import Interruption
    from trainkit.trainer import Trainer

MODES = ("linear", "exponential")
NAMES = ("lr", "learning_rate")
"""Where a learning rate is looked for when no name is given."""

_log = logging.getLogger(__name__)


class LRFinder:
    """What a range test saw, and what follows from it.

    Args:
        mode: how the rate was raised: "exponential" or "linear".
        lr_min: the first rate.
        lr_max: the last rate.
        num_training: how many rates in all.
    """

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, list[float]] = {"lr": [], "loss": []}
        """For each update its learning rate, and the smoothed loss; NaN where the module gave none."""

    def rate(self, update: int) -> float:
        """Return the learning rate of an update, from 0; `lr_max` is reached with the last one."""
        if update == 0:
            return self.lr_min
        part = (update + 1) / self.num_training
        if self.mode == "linear":
            return self.lr_min + part * (self.lr_max - self.lr_min)
        return float(self.lr_min * (self.lr_max / self.lr_min) ** part)

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """Return the learning rate at which the loss fell fastest, None when too few losses are left to tell.

        Args:
            skip_begin: how many of the first updates to leave out; their losses are mostly noise.
            skip_end: how many of the last ones to leave out.
        """
        index = self._steepest(skip_begin, skip_end)
        if index is None:
            _log.error(
                "no learning rate can be suggested: fewer than two finite losses are left of %d, without the first %d "
                "and the last %d. Give lr_find a larger num_training.",
                len(self.results["loss"]), skip_begin, skip_end,
            )  # fmt: skip
            return None
        return self.results["lr"][index]

    def _steepest(self, skip_begin: int, skip_end: int) -> int | None:
        losses = self.results["loss"]
        indices = [i for i in range(skip_begin, len(losses) - skip_end) if math.isfinite(losses[i])]
        if len(indices) < 2:
            return None
        rates = torch.tensor([float(self.results["lr"][i]) for i in indices])
        slopes = torch.gradient(torch.tensor([float(losses[i]) for i in indices]), spacing=(rates,))[0]
        return indices[int(slopes.argmin())]

    def plot(self, suggest: bool = False, show: bool = False, ax: Axes | None = None) -> Figure | None:
        """Draw the loss over the learning rate, and return the figure.

        Args:
            suggest: mark the suggestion with a red point.
            show: open a window with it.
            ax: where to draw (default: a new figure).

        Raises:
            MisconfigurationException: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise MisconfigurationException("plot needs matplotlib: pip install matplotlib.") from error
        figure: Any
        if ax is None:
            figure, ax = plt.subplots()
        else:
            figure = ax.figure
        ax.plot(self.results["lr"], self.results["loss"])
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        index = self._steepest(10, 1) if suggest else None
        if index is not None:
            ax.plot(self.results["lr"][index], self.results["loss"][index], marker="o", markersize=10, color="red")
        if show:
            plt.show()
        return figure  # type: ignore[no-any-return]


class Ramp(Updates):
    """Raise the learning rate after every update, and write down the loss that each one gave."""

    BETA = 0.98
    """How much of the running mean of the loss is kept at each update."""

    def __init__(
        self, finder: LRFinder, optimizer: Optimizer, threshold: float | None, interruption: Interruption
    ) -> None:
        super().__init__(finder.num_training, interruption)
        self.finder, self.optimizer, self.threshold = finder, optimizer, threshold
        self.mean, self.best = 0.0, math.inf

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        set_rate(self.optimizer, self.finder.rate(0))

    def updated(self, trainer: Trainer, outputs: Mapping[str, Any]) -> None:
        results, loss = self.finder.results, outputs.get("loss")
        results["lr"].append(self.finder.rate(self.count - 1))
        loss = loss.item() if isinstance(loss, Tensor) else loss
        results["loss"].append(self._smoothed(loss) if loss is not None else math.nan)
        smoothed = results["loss"][-1]
        if self.threshold is not None and self.count > 1 and smoothed > self.threshold * self.best:
            trainer.should_stop = True
        trainer.should_stop = agreed(trainer, trainer.should_stop)
        self.best = min(self.best, smoothed) if not math.isnan(smoothed) else self.best
        set_rate(self.optimizer, self.finder.rate(self.count))

    def _smoothed(self, loss: float) -> float:
        self.mean = self.BETA * self.mean + (1 - self.BETA) * loss
        return self.mean / (1 - self.BETA ** (self.count + 1))  # Lightning's: suggestions are the same as there


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all groups of an optimizer one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate


def find_lr(
    trainer: Trainer,
    module: Module,
    min_lr: float = 1e-8,
    max_lr: float = 1,
    num_training: int = 100,
    mode: str = "exponential",
    early_stop_threshold: float | None = 4.0,
    update_attr: bool = False,
    attr_name: str = "",
) -> LRFinder | None:
    """Run a range test inside a fit, and return what it saw; but for the rate to train with, nothing is changed.

    Called between epochs or before the first one, by `LearningRateFinder`. For the arguments see there.
    """
    if trainer.fast_dev_run:
        warn("the learning-rate finder is left out: in a fast_dev_run there are too few batches for it.")
        return None
    name = rate_name(module, attr_name) if update_attr else ""
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"the learning-rate finder needs one optimizer. {type(module).__name__}.configure_optimizers returned "
            f"{len(trainer.optimizers)}."
        )
    finder = LRFinder(mode, min_lr, max_lr, num_training)
    ramp = Ramp(finder, trainer.optimizers[0], early_stop_threshold, trainer.interruption)
    with rehearsal(trainer, [ramp]):
        trainer.max_steps = trainer.global_step + num_training
        trainer.sources.load_train()
        if trainer.num_training_batches == 0:
            raise MisconfigurationException("the learning-rate finder needs training batches; limit_train_batches=0.")
        loop.fit(trainer)
    finder.results = agreed(trainer, finder.results)
    rate = finder.suggestion() if update_attr else None
    if rate is not None:
        set_attribute(module, name, rate)
        set_rate(trainer.optimizers[0], rate)
        for scheduler in _all_schedulers(trainer):  # or their next move would bring the old rate back
            scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
        for group in trainer.optimizers[0].param_groups:
            if "initial_lr" in group:
                group["initial_lr"] = rate
        if trainer.is_global_zero:
            trainer.print(f"{name} = {rate:.4g}, where the loss fell fastest in {len(finder.results['lr'])} updates")
    return finder


def _all_schedulers(trainer: Trainer) -> Iterator[Any]:
    waiting = [config.scheduler for config in trainer.lr_scheduler_configs]
    while waiting:
        scheduler = waiting.pop()
        waiting += vars(scheduler).get("_schedulers", [])  # of a SequentialLR or a ChainedScheduler
        if hasattr(scheduler, "base_lrs"):
            yield scheduler


def rate_name(module: Module, name: str = "") -> str:
    """Return the name of the attribute that holds the learning rate: the given one, `lr` or `learning_rate`.

    Raises:
        AttributeError: neither the module nor the data module has it, as an attribute or in hparams.
    """
    for candidate in [name] if name else NAMES:
        if has_attribute(module, candidate):
            return candidate
    wanted = f"attr_name={name!r}" if name else f"{NAMES[0]!r} or {NAMES[1]!r}"
    raise AttributeError(
        f"the learning-rate finder sets an attribute to what it found, but {type(module).__name__} and its hparams "
        f"have no {wanted}. Name the attribute with attr_name, or use update_attr=False."
    )
