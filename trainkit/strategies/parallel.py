"""ParallelStrategy: several processes, however they share the work."""

from __future__ import annotations

import itertools
from datetime import timedelta

import torch
from torch import nn

from trainkit.errors import MisconfigurationException
from trainkit.strategies.base import Strategy
from trainkit.strategies.group import Group
from trainkit.world import World


class ParallelStrategy(Group, Strategy):
    """What several processes have in common, however they share the work.

    Args:
        device: where this process's module and batches live.
        world: the processes.
        process_group_backend: torch's name of it; None takes nccl for cuda beside gloo for the host, gloo elsewhere.
        timeout: how long a process waits for the others before that is an error, where nobody knows better: up to
            the first training step's end, and in all that is no training step.
        step_timeout: how long in a training step, once it is known how long these take; or 20 times as long as they
            do, if that is more. It is the Trainer's watchdog that knows. None: `timeout`, always.
        start_method: how a Trainer that has to start processes itself does so, as with `DDPStrategy`.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        world: World | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        step_timeout: timedelta | None = timedelta(minutes=5),
        start_method: str | None = None,
    ) -> None:
        super().__init__(device, world, process_group_backend, timeout, step_timeout)
        self.start_method = None if start_method == "popen" else start_method
        self.devices: list[torch.device] = []
        """The devices of all processes on this node; the Trainer says so."""
        self.sync_batchnorm = False
        """Whether batch norms use the batches of all processes; the Trainer says so."""
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def setup(self, module: nn.Module) -> None:
        """Bring the module to its device, the same one on all processes."""
        super().setup(module)
        self.same_everywhere(itertools.chain(module.parameters(), module.buffers()))
        if self.sync_batchnorm:
            self._sync_batchnorm(module)

    def _sync_batchnorm(self, module: nn.Module) -> None:
        if self.device.type == "cpu":
            raise MisconfigurationException(
                "sync_batchnorm=True: torch's SyncBatchNorm runs on accelerators only, and this run's device is the "
                "cpu. Leave it out, or use GroupNorm or LayerNorm, which do not look at other samples."
            )
        for parent in list(module.modules()):
            for name, part in list(parent.named_children()):
                if isinstance(part, nn.modules.batchnorm._BatchNorm) and not isinstance(part, nn.SyncBatchNorm):
                    setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(part))  # type: ignore[no-untyped-call]
                    self._replaced.append((parent, name, part))

    def teardown(self, module: nn.Module) -> None:
        """Put back what was replaced, and give an accelerator's memory back."""
        while self._replaced:
            parent, name, part = self._replaced.pop()
            vars(part)["_buffers"] = vars(getattr(parent, name))["_buffers"]
            setattr(parent, name, part)
        super().teardown(module)
