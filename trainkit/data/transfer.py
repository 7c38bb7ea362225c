"""Bring batches to the device, through the user's hooks where there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainkit.data.prefetch import SideStream
from trainkit.errors import MisconfigurationException, warn
from trainkit.hooks import is_overridden
from trainkit.strategies import Strategy
from trainkit.tree import tensors

if TYPE_CHECKING:
    import torch

    from trainkit.datamodule import DataModule
    from trainkit.module import Module

Transfer = Callable[[Any, int], Any]
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def transfer_of(strategy: Strategy, module: Module, datamodule: DataModule | None) -> Transfer | None:
    """Return what brings a batch to the device, None when there is nothing to do: batches are made on the host.

    A DataModule's hooks win over the module's, with a warning where both have one.
    """

    def owner(name: str) -> Any:
        owners = [o for o in (datamodule, module) if o is not None and is_overridden(o, name)]
        if len(owners) > 1:
            warn(f"{' and '.join(type(o).__name__ for o in owners)} both have {name}: the DataModule's is called.")
        return owners[0] if owners else None

    before, move, after = map(owner, TRANSFER_HOOKS)
    if strategy.device.type == "cpu" and not (before or move or after):
        return None
    to_device = mover(strategy)
    if not (before or move or after):
        return to_device

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if before is not None:
            batch = before.on_before_batch_transfer(batch, dataloader_idx)
        if move is not None:
            batch = move.transfer_batch_to_device(batch, strategy.device, dataloader_idx)
        elif strategy.device.type != "cpu":
            batch = to_device(batch, dataloader_idx)
        return after.on_after_batch_transfer(batch, dataloader_idx) if after is not None else batch

    return transfer


def mover(strategy: Strategy) -> Transfer:
    """Return what brings a batch to the strategy's device when no hook does; on CUDA while that computes."""
    if strategy.device.type == "cuda" and type(strategy).to_device is Strategy.to_device:
        return SideStream(strategy)
    return lambda batch, _: strategy.to_device(batch)


def check_device(batch: Any, device: torch.device) -> None:
    """Refuse a batch that is not where the module is; some of its tensors may stay on the host, lengths for example.

    Raises:
        MisconfigurationException: it names the first tensor that is elsewhere.
    """
    found = list(tensors(batch))
    arrived = any(tensor.device.type == device.type for _, tensor in found)
    for where, tensor in found:
        if tensor.device.type != device.type and not (arrived and tensor.device.type == "cpu"):
            raise MisconfigurationException(
                f"{where} is on {tensor.device}, the module on {device}. Let the data set give tensors on the cpu, "
                "trainkit brings them over; or fix transfer_batch_to_device / on_after_batch_transfer."
            )
