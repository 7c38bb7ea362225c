"""Strategy: how a run is spread over devices. The base class is one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.empty_init import EmptyInit
from trainkit.moving import move_data_to_device
from trainkit.strategies.materialise import is_on_meta, materialise
from trainkit.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from trainkit.precision import Precision


class Strategy:
    """What the loop asks of a strategy. This one is a single device.

    Args:
        device: where the module and its batches live.
    """

    parallel = False
    """Whether it is one of several processes, or acts as if: then `sync` and its like are called."""
    sharded = False
    """Whether parameters are spread over processes, as torch's DTensor, of which each has a part."""
    sharded_checkpoints = False
    """Whether a checkpoint is a directory that all processes write together."""
    device_mesh: DeviceMesh | None = None
    """How the processes are arranged, where parameters are spread over them."""
    precision_plugin: Precision | None = None
    """The run's; the Trainer says so."""
    patience = 0
    """How often a wait for the others was made long again (`be_patient`)."""
    world = World()
    """The processes of the run, and which of them this is."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @property
    def world_size(self) -> int:
        """How many processes there are, on all nodes."""
        return self.world.size

    @property
    def global_rank(self) -> int:
        """Which of them this is."""
        return self.world.rank

    @property
    def local_rank(self) -> int:
        """Which of the processes on this node this is."""
        return self.world.local_rank

    @property
    def node_rank(self) -> int:
        """Which node this is."""
        return self.world.node_rank

    @property
    def shard(self) -> tuple[int, int]:
        """Which part of the data this process has, and of how many: all that share one part compute one thing."""
        return self.global_rank, self.world_size

    @property
    def averages_by_hand(self) -> bool:
        """Whether `sync_by_hand` is to be called behind each backward that averages gradients."""
        return False

    def setup_environment(self) -> None:
        """Join the other processes; called before anything of a run."""

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

    @property
    def root_device(self) -> torch.device:
        """Where this process's module and batches live, as Lightning calls it."""
        return self.device

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int] | None:
        """What a sampler needs to know to give each process its part; None when every process has data of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank} if self.world_size > 1 else None

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return self.global_rank == 0

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float, algorithm: str | None) -> None:
        """Clip gradients in place: their common norm ("norm", or None) or each element ("value")."""
        if algorithm == "value":
            nn.utils.clip_grad_value_(parameters, limit)
        else:
            nn.utils.clip_grad_norm_(parameters, limit)

    def optimizers_made(self, optimizers: Iterable[Optimizer]) -> None:
        """Get to know the run's optimizers, and refuse those that can't work."""

    def optimizers_to_device(self, optimizers: Iterable[Optimizer]) -> None:
        """Bring restored optimizer state to where its parameters are."""
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and name != "step" and value.device != parameter.device:
                        state[name] = value.to(parameter.device)

    def same_everywhere(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values that rank 0 has."""

    def on_exception(self, exception: BaseException) -> None:
        """Give up what would keep other processes waiting, when a run fails."""

    # ---- between processes; one process is all of them
    def be_patient(self) -> None:
        """Wait long for the others from here on: one of them may have something to do that is no training step."""

    def be_quick(self, timeout: timedelta, patience: int) -> None:
        """Wait only so long for the others, while nothing but steps is done."""

    def barrier(self, name: str | None = None, timeout: float | timedelta | None = None) -> None:
        """Wait for all processes."""

    def on_rank_zero(self, what: str, function: Callable[[], Any]) -> Any:
        """Run a function on rank 0 while the others wait, and return what it returned on all."""
        return function()

    def on_each_node(self, what: str, function: Callable[[], Any]) -> None:
        """Run a function on the first process of each node while the others wait."""
        function()

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return the value that one process has."""
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        return [value]

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Put the sum, the minimum or the maximum of every process's tensor in its place."""
        return tensor

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return every process's tensors, stacked in a new first dimension; of one process, its own."""
        return data

    def reduce(self, tensor: Any, group: Any = None, reduce_op: str | None = "mean") -> Any:
        """Return the mean (or sum) of every process's tensor."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all processes, or any of them, say so."""
        return decision

    def teardown(self, module: nn.Module) -> None:
        """Give an accelerator's memory back: the module returns to the host."""
        if self.device.type != "cpu":
            module.cpu()


class SingleDeviceStrategy(Strategy):
    """One device, under Lightning's name: what `strategy="auto"` and "single_device" make."""
