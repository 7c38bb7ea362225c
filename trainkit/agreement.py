"""Agreement: what several processes do at the same step, though each decides by itself.

One may be told to stop by a signal, a clock or a user's callback that the others know nothing of. If it stopped alone,
the others would wait for it for ever. So what a process wants is sent along with the gradients of its next update, and
what anybody wants happens on all of them after that one: no message more is sent than without it. What is done after
some time is done when it is over on rank 0's clock. Where no gradients that carry it are sent (between epochs, after a
validation, and at log points with manual optimization or with a strategy that has no place for it) they ask each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.checkpoint.outcome import overdue
from trainkit.errors import MisconfigurationException
from trainkit.signals import NOTED
from trainkit.strategies.ddp import Wishes
from trainkit.strategies.group import leave_after_rank_zero
from trainkit.taking_part import go_along, train_along

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

LAG = 8
"""So many updates later a wish is heard on an accelerator, which by then has long computed it: nobody waits for it."""


class Agreement:
    """What the processes of a run have agreed on.

    Args:
        trainer: whose `should_stop` and signals are this process's wishes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.device = trainer, trainer.strategy.device
        self._timed = _timed(trainer)
        self._due: set[str] = set()
        self._deaf: dict[str, int] = {}  # to so many wishes that were made before their fulfilment was known
        self.wishes = Wishes(("stop", *map(str, NOTED), *self._timed), self.device)
        self.should_stop = False
        """Whether somebody has set `should_stop`."""
        self.signal: int | None = None
        """A signal that somebody got."""
        self._lacking = self._by_hand = False
        self._share = 1.0
        self._told: tuple[Any, ...] = (False, None, *[False] * len(self._timed))
        self._on_its_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    # ---- a batch
    def begin_batch(self, batch_idx: int, averages: bool) -> None:
        """Prepare for a batch; what this process wishes goes with its gradients.

        Args:
            batch_idx: which of the epoch.
            averages: whether gradients are averaged after it.
        """
        train, epoch = self.trainer.sources.train, self.trainer.progress.epoch
        strategy = self.trainer.strategy
        # with manual optimization one without a sample takes part, since training_step alone knows what is averaged
        self._lacking = train.lacking(epoch, batch_idx) and self.trainer.module.automatic_optimization
        self._by_hand = averages and (strategy.averages_by_hand or (self._lacking and not strategy.sharded))
        self._share = train.share(epoch, batch_idx)
        strategy.sync(averages and (strategy.sharded or not self._by_hand), self._lacking)
        wish = (self.trainer.should_stop, self.trainer.interruption.signal, *(self._over() if self._timed else ()))
        if wish != self._told:
            self._told = wish
            self.wishes.own.copy_(self._wished())

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the loss as it counts among those of all processes: by its samples."""
        return loss if self._share == 1.0 else loss * self._share

    def end_batch(self, loss: Tensor | None, empty: bool, training_step: Callable[..., Any]) -> bool:
        """Average gradients where some process has no backward that does so; return whether the loop has some to use.

        Args:
            loss: of this process's samples.
            empty: it has none.
            training_step: as the loop calls it.

        Raises:
            MisconfigurationException: a process has left its batch out, and the others would wait for it.
        """
        if not self.trainer.module.automatic_optimization:
            if empty:
                go_along(self.trainer, training_step, self.trainer.batch_idx)
            self._share = 1.0  # for a backward outside of the step
            return False
        if loss is None and not empty:
            raise MisconfigurationException(
                f"training_step returned None on rank {self.trainer.global_rank} (batch {self.trainer.batch_idx}): "
                "the other processes wait for its gradients. Return a loss that is zero, such as 0.0 * loss."
            )
        takes_part = empty and self.trainer.strategy.sharded
        if takes_part:
            self.trainer.update.backward(train_along(self.trainer, training_step, self.trainer.batch_idx))
        if self._by_hand:
            self.trainer.strategy.sync_by_hand()
        return self._by_hand or takes_part

    # ---- decisions
    @property
    def carried(self) -> bool:
        """Whether gradients carry what is wished; else the processes ask each other at log points."""
        return self.wishes.carried and self.trainer.module.automatic_optimization

    def step(self) -> None:
        """Hear what was wished with the gradients of this update."""
        heard = self.wishes.heard()
        if heard is not None and self.device.type == "cpu":
            self._take(heard)
        elif heard is not None:
            self._hear_later(heard)

    def now(self) -> None:
        """Ask each other now; all processes call it at the same place."""
        self._on_its_way.clear()
        self._deaf.clear()
        self._take(self.trainer.strategy.all_reduce(self._wished().to(self.device)))

    def due(self, name: str) -> bool:
        """Return once, on all processes after the same update, that the time of something timed is over.

        Args:
            name: "validation", or a callback's `state_key`.
        """
        if name not in self._due:
            return False
        self._due.remove(name)
        self._deaf[name] = len(self._on_its_way)
        return True

    def _wished(self) -> Tensor:
        signal = self.trainer.interruption.signal
        wished = [self.trainer.should_stop, *(signal == number for number in NOTED), *self._over()]
        return torch.tensor(wished, dtype=torch.float32)

    def _over(self) -> list[bool]:
        return [self.trainer.is_global_zero and over() for over in self._timed.values()]

    def _hear_later(self, heard: Tensor) -> None:
        host = torch.empty_like(heard, device="cpu", pin_memory=True).copy_(heard, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._on_its_way.append((host, event))
        if len(self._on_its_way) > LAG:
            host, event = self._on_its_way.popleft()
            event.synchronize()
            self._take(host)

    def _take(self, heard: Tensor) -> None:
        stop, *others = heard.tolist()
        signals, timed = others[: len(NOTED)], others[len(NOTED) :]
        for name, wished in zip(self._timed, timed, strict=True):
            if deaf := self._deaf.get(name, 0):
                self._deaf[name] = deaf - 1
            elif wished > 0:
                self._due.add(name)
        if stop > 0:
            self.should_stop = self.trainer.should_stop = True
        if any(signals) and self.signal is None:
            self.signal = next(number for number, wished in zip(NOTED, signals, strict=True) if wished > 0)
            leave_after_rank_zero()
            if self.trainer.interruption.signal is None:
                self.trainer.interruption.hear(self.signal)
            self.trainer.interruption.signal = self.signal


def _timed(trainer: Trainer) -> dict[str, Callable[[], bool]]:
    """Return what is done after some time, each with what says whether that is over."""
    interval, timed = trainer.val_check_interval, {}
    if isinstance(interval, timedelta):
        timed["validation"] = lambda: trainer._since_validation.passed(interval)
    for callback in trainer.callbacks:
        if getattr(callback, "train_time_interval", None) is not None:
            timed[callback.state_key] = partial(overdue, callback)  # type: ignore[arg-type]
    return timed
