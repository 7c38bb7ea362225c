"""Strategy: how a run is spread over devices. The base class is one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.empty_init import EmptyInit
from trainkit.moving import move_data_to_device
from trainkit.strategies.materialise import is_on_meta, materialise
from trainkit.strategies.processes import Processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from trainkit.precision import Precision


class Strategy(Processes):
    """What the loop asks of a strategy; what processes tell each other is in `Processes`. This one is a single device.

    Args:
        device: where the module and its batches live.
    """

    sharded = False
    """Whether parameters are spread over processes, as torch's DTensor, of which each has a part."""
    sharded_checkpoints = False
    """Whether a checkpoint is a directory that all processes write together."""
    device_mesh: DeviceMesh | None = None
    """How the processes are arranged, where parameters are spread over them."""
    precision_plugin: Precision | None = None
    """The run's; the Trainer says so."""
    unsaved: str | None = None
    """What of its state is in no checkpoint, in words: a resumed run is told that it is not exact."""

    @property
    def averages_by_hand(self) -> bool:
        """Whether `sync_by_hand` is to be called behind each backward that averages gradients."""
        return False

    @contextmanager
    def init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make modules on the run's device.

        Args:
            empty_init: leave parameters as their memory was; where parameters are spread over processes: without
                memory, on the meta device.
        """
        with self.device, EmptyInit() if empty_init else nullcontext():
            yield

    def begin(self, module: nn.Module) -> None:
        """Get to know the module, before its `configure_model`."""

    def setup(self, module: nn.Module) -> None:
        """Bring the module to its device; parameters on the meta device get memory and their first values."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if is_on_meta(module):
            materialise(module, self.device)
        module.to(self.device)

    def wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step as the loop calls it; on one device the method itself."""
        return step

    def wrap_training(self, module: nn.Module, step: Callable[..., Any], wishes: Any = None) -> Callable[..., Any]:
        """Return the training step as the loop calls it.

        Args:
            module: whose parameters it trains.
            step: what runs it.
            wishes: what processes tell each other along with the gradients; None where nobody listens.
        """
        return self.wrap(step)

    def epoch_starts(self) -> None:
        """Prepare for an epoch; with several processes."""

    def sync(self, wanted: bool, lacking: bool = False) -> None:
        """Say before a step's forward whether its gradients are averaged; with several processes.

        Args:
            wanted: whether they are.
            lacking: some process has no sample, and so no forward in which it could hear of anything.
        """

    def sync_by_hand(self) -> None:
        """Average the gradients after a step in which some process had no sample; with several processes."""

    def prepare_backward(self, loss: Tensor) -> None:
        """Prepare for a backward inside of the step (manual optimization); with several processes."""

    def to_device(self, batch: Any) -> Any:
        """Return the batch on the device; copies from pinned memory overlap with what the device does."""
        return move_data_to_device(batch, self.device)

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float, algorithm: str | None) -> None:
        """Clip gradients in place: their common norm ("norm", or None) or each element ("value")."""
        if algorithm == "value":
            nn.utils.clip_grad_value_(parameters, limit)
        else:
            nn.utils.clip_grad_norm_(parameters, limit)

    def optimizers_made(self, optimizers: Iterable[Optimizer]) -> None:
        """Get to know the run's optimizers, and refuse those that can't work."""

    def on_exception(self, exception: BaseException) -> None:
        """Give up what would keep other processes waiting, when a run fails."""

    def teardown(self, module: nn.Module) -> None:
        """Give an accelerator's memory back: the module returns to the host."""
        if self.device.type != "cpu":
            module.cpu()


class SingleDeviceStrategy(Strategy):
    """One device, under Lightning's name: what `strategy="auto"` and "single_device" make."""
