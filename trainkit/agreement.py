"""Agreement: what several processes do at the same step, though each decides by itself.

One may be told to stop by a signal, a clock or a user's callback that the others know nothing of. If it stopped alone,
the others would wait for it for ever. So what a process wants is sent along with the gradients of its next update, and
what anybody wants happens on all of them after that one: no message more is sent than without it. Where no gradients
are sent (between epochs, after a validation, with manual optimization at log points) they ask each other.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.errors import MisconfigurationException
from trainkit.signals import NOTED
from trainkit.strategies.ddp import Wishes

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
        self.wishes = Wishes(("stop", *map(str, NOTED)), self.device)
        self.stop = False
        """Whether somebody has set `should_stop`."""
        self.signal: int | None = None
        """A signal that somebody got."""
        self._lacking = self._by_hand = False
        self._share = 1.0
        self._told: tuple[bool, int | None] = (False, None)
        self._on_its_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    # ---- a batch
    def begin_batch(self, batch_idx: int, averages: bool) -> None:
        """Prepare for a batch; what this process wishes goes with its gradients.

        Args:
            batch_idx: which of the epoch.
            averages: whether gradients are averaged after it.
        """
        train, epoch = self.trainer.sources.train, self.trainer.progress.epoch
        self._lacking = train.lacking(epoch, batch_idx)
        self._by_hand = averages and self._lacking
        self._share = train.share(epoch, batch_idx)
        self.trainer.strategy.sync(averages and not self._lacking)
        wish = (self.trainer.should_stop, self.trainer.interruption.signal)
        if wish != self._told:
            self._told = wish
            self.wishes.own.copy_(self._wished())

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the loss as it counts among those of all processes: by its samples."""
        return loss if self._share == 1.0 else loss * self._share

    def end_batch(self, loss: Tensor | None, empty: bool) -> bool:
        """Average gradients where some process has no backward that does so; return whether there are some.

        Raises:
            MisconfigurationException: a process has left its batch out, and the others would wait for it.
        """
        if loss is None and not empty:
            raise MisconfigurationException(
                f"training_step returned None on rank {self.trainer.global_rank} (batch {self.trainer.batch_idx}): "
                "the other processes wait for its gradients. Return a loss that is zero, such as 0.0 * loss."
            )
        if self._by_hand:
            self.trainer.strategy.sync_by_hand()
        return self._by_hand

    # ---- decisions
    def step(self) -> None:
        """Hear what was wished with the gradients of this update."""
        heard = self.wishes.heard()
        if heard is not None and self.device.type == "cpu":
            self._take(heard)
        elif heard is not None:
            self._hear_later(heard)

    def now(self) -> None:
        """Ask each other now; all processes call it at the same place."""
        self._take(self.trainer.strategy.all_reduce(self._wished().to(self.device)))
        self._on_its_way.clear()

    def _wished(self) -> Tensor:
        signal = self.trainer.interruption.signal
        return torch.tensor([self.trainer.should_stop, *(signal == number for number in NOTED)], dtype=torch.float32)

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
        stop, *signals = heard.tolist()
        if stop > 0:
            self.stop = self.trainer.should_stop = True
        if any(signals) and self.signal is None:
            self.signal = next(number for number, wished in zip(NOTED, signals, strict=True) if wished > 0)
            self.trainer.interruption.signal = self.signal
