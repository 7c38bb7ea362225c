"""ModelParallelStrategy: a module's own `configure_model` spreads its parameters over a mesh of processes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainkit.errors import MisconfigurationException
from trainkit.hooks import is_overridden
from trainkit.pieces import by_kind, local
from trainkit.strategies.ddp import Wishes
from trainkit.strategies.materialise import is_on_meta, materialise
from trainkit.strategies.sharded import ShardedStrategy, fsdp_parameters, fsdp_roots, through
from trainkit.world import World

DATA, TENSOR = "data_parallel", "tensor_parallel"


class ModelParallelStrategy(ShardedStrategy):
    """Tensor parallel training, by itself or together with FSDP, as the module's `configure_model` lays it out.

    The processes are a mesh of two dimensions, `self.device_mesh["data_parallel"]` and `["tensor_parallel"]`. Those
    that differ in the second alone get the same batches. In `configure_model` the module calls torch's
    `parallelize_module` with the one, and `fully_shard` with the other; where it does not call the latter, gradients
    are averaged here.

    Reference: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models", 2019.

    Args:
        data_parallel_size: how many parts the data have; "auto" is the number of nodes.
        tensor_parallel_size: how many processes share one part; "auto" is the number of processes on a node.
        save_distributed_checkpoint: save a directory that all processes write together; False saves one file.
        process_group_backend: torch's name of it; None takes nccl for cuda beside gloo for the host, gloo elsewhere.
        timeout: how long a process waits for the others before that is an error.
        step_timeout: the same inside of training steps; or 20 times as long as they take, if that is more. None:
            `timeout`.
        start_method: how a Trainer that has to start processes itself does so, as with DDPStrategy.
        device: where this process's module and batches live; the Trainer says so.
        world: the processes; the Trainer says so.

    Example:
        >>> def configure_model(self):
        ...     plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        ...     parallelize_module(self.mlp, self.device_mesh["tensor_parallel"], plan)
        ...     fully_shard(self.mlp, mesh=self.device_mesh["data_parallel"])
    """

    def __init__(
        self,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        *,
        step_timeout: timedelta | None = timedelta(minutes=5),
        start_method: str | None = None,
        device: torch.device | str = "cpu",
        world: World | None = None,
    ) -> None:
        super().__init__(device, world, process_group_backend, timeout, step_timeout, start_method)
        self.data_parallel_size = checked_size("data_parallel_size", data_parallel_size)
        self.tensor_parallel_size = checked_size("tensor_parallel_size", tensor_parallel_size)
        self.sharded_checkpoints = save_distributed_checkpoint
        self._by_hand: list[nn.Parameter] = []
        self._wishes: Wishes | None = None

    # ---- the processes
    @property
    def sizes(self) -> tuple[int, int]:
        """How many parts the data have, and how many processes share one."""
        data, tensor = self.data_parallel_size, self.tensor_parallel_size
        nodes = self.world.num_nodes
        return nodes if data == "auto" else int(data), self.world_size // nodes if tensor == "auto" else int(tensor)

    def make_mesh(self) -> DeviceMesh:
        """Return the mesh.

        Raises:
            RuntimeError: it is of another number of processes than there are.
        """
        data, tensor = self.sizes
        if data * tensor != self.world_size:
            raise RuntimeError(
                f"data_parallel_size={data} times tensor_parallel_size={tensor} is {data * tensor}, and there are "
                f"{self.world_size} processes. Choose sizes whose product is that."
            )
        return init_device_mesh(self.device.type, (data, tensor), mesh_dim_names=(DATA, TENSOR))

    @property
    def shard(self) -> tuple[int, int]:
        """Which part of the data this process has, and of how many: all that share one part compute one thing."""
        data, tensor = self.sizes
        return self.global_rank // tensor, data

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int] | None:
        """What a sampler needs to know to give each process its part."""
        part, parts = self.shard
        return {"num_replicas": parts, "rank": part}

    # ---- the module
    def setup(self, module: nn.Module) -> None:
        """Give memory to what has none, bring the rest to the device, and find out who averages which gradients.

        Raises:
            TypeError: the module has no `configure_model`, or it wraps parts in FSDP's earlier form.
        """
        from torch.distributed.fsdp import FullyShardedDataParallel

        if not is_overridden(module, "configure_model"):
            raise TypeError(
                f"{type(self).__name__} needs a configure_model(self) in {type(module).__name__}, which spreads the "
                "parameters over self.device_mesh by torch's parallelize_module and fully_shard."
            )
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            raise TypeError(
                f"{type(self).__name__} takes torch's fully_shard, and configure_model wraps parts in "
                "FullyShardedDataParallel. Call fully_shard(part, mesh=self.device_mesh['data_parallel'])."
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.sync_batchnorm:
            self._sync_batchnorm(module)
        if is_on_meta(module):
            materialise(module, self.device, self.same_everywhere)
        module.to(self.device)
        self._roots = fsdp_roots(module)
        self.manual = not getattr(module, "automatic_optimization", True)
        self._synced = True
        own_root = self._roots == [module] and not self.manual
        self._call = through(module) if own_root else None
        self._same_pieces(module)
        kinds = by_kind(p for p in module.parameters() if p.requires_grad)
        if len(kinds) > 1 and getattr(self.precision_plugin, "precision", "") == "16-mixed":
            raise MisconfigurationException(
                "precision='16-mixed': the gradient scaler takes gradients that are all spread over one mesh, and here "
                f"there are {len(kinds)} kinds of them. Use 'bf16-mixed', which needs no scaler."
            )

    def _same_pieces(self, module: nn.Module) -> None:
        """Give all parts of the data the same values of what is spread over the processes of one part alone."""
        assert self.device_mesh is not None
        data = self.device_mesh[DATA]
        if data.size() == 1:
            return
        for parameter in self._not_sharded(module):
            group = data.get_group()
            dist.broadcast(local(parameter.detach()), dist.get_global_rank(group, 0), group=group)

    def _not_sharded(self, module: nn.Module) -> list[nn.Parameter]:
        sharded = {id(p.sharded_param) for root in self._roots for p in fsdp_parameters(root)}
        return [parameter for parameter in module.parameters() if id(parameter) not in sharded]

    # ---- the step
    def wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step after which each process has its piece alone."""
        step = self._through(step)
        return super().wrap(step) if self._roots else step

    def wrap_training(
        self, module: nn.Module, step: Callable[..., Any], wishes: Wishes | None = None
    ) -> Callable[..., Any]:
        """Return the training step as the loop calls it; find the gradients that FSDP does not average."""
        self._module = module
        self._wishes = wishes
        self.epoch_starts()
        if wishes is not None:
            wishes.carried = bool(self._by_hand) and self.world_size == self.shard[1]  # else not all hear of them
        return self._through(step)

    def epoch_starts(self) -> None:
        """Find the parameters that learn and whose gradients FSDP does not average."""
        super().epoch_starts()
        _, parts = self.shard
        self._by_hand = [p for p in self._not_sharded(self._module) if p.requires_grad] if parts > 1 else []

    @property
    def averages_by_hand(self) -> bool:
        """Whether there are gradients that nothing averages in backward."""
        return bool(self._by_hand)

    def sync_by_hand(self) -> None:
        """Average over the parts of the data what FSDP does not, with what is wished beside it, in one message."""
        if not self._by_hand or self.device_mesh is None:
            return
        group = self.device_mesh[DATA].get_group()
        grads = [torch.zeros_like(local(p.detach())) if p.grad is None else local(p.grad) for p in self._by_hand]
        wished = [self._wishes.own] if self._wishes is not None and self._wishes.carried else []
        sent = torch.cat([tensor.reshape(-1) for tensor in (*grads, *wished)])
        dist.all_reduce(sent, group=group)
        sent /= group.size()
        means = torch.split(sent, [tensor.numel() for tensor in (*grads, *wished)])
        for parameter, grad, mean in zip(self._by_hand, grads, means, strict=False):
            if parameter.grad is not None:
                grad.copy_(mean.view_as(grad))
        if wished and self._wishes is not None:
            self._wishes.carrier.grad = means[-1].float()

    def prepare_backward(self, loss: Tensor) -> None:
        """Have the gradients of a backward averaged at its end that the step itself runs."""
        if self._by_hand and loss.requires_grad:
            loss.register_hook(  # type: ignore[no-untyped-call]
                lambda _: torch.autograd.Variable._execution_engine.queue_callback(self.sync_by_hand)
            )


def checked_size(argument: str, given: Any) -> int | str:
    """Return a size of the mesh.

    Raises:
        MisconfigurationException: it is no number above 0, and not "auto".
    """
    if given == "auto" or (isinstance(given, int) and not isinstance(given, bool) and given > 0):
        return given  # type: ignore[no-any-return]
    raise MisconfigurationException(f"{argument} must be 'auto' or a number above 0. Received: {given!r}.")
