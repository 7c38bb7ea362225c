"""FSDPStrategy: parameters, gradients and optimizer state are spread over the processes by torch's FSDP2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainkit.errors import MisconfigurationException, warn
from trainkit.pieces import local
from trainkit.strategies.ddp import Carry, Wishes
from trainkit.strategies.materialise import is_on_meta, materialise, parts_before_owners
from trainkit.strategies.sharded import ShardedStrategy, checkpointed, fsdp_roots, through
from trainkit.strategies.wrapping import Policy, check_policy, chosen
from trainkit.tree import map_tensors
from trainkit.world import World

SHARDING = {
    "FULL_SHARD": (False, None),
    "SHARD_GRAD_OP": (False, False),
    "NO_SHARD": (False, False),
    "HYBRID_SHARD": (True, None),
    "_HYBRID_SHARD_ZERO2": (True, False),
}
"""For each sharding strategy, whether it has replicas, and whether parameters are given up after forward."""
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WIDTH = 32
"""So many wishes have a place beside the gradients."""


class FSDPStrategy(ShardedStrategy):
    """Fully sharded data parallel training: each process keeps a piece of all parameters, and gathers them as it needs.

    Reference: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023.

    What is gathered at once is what `auto_wrap_policy` chooses, and the rest of the module together; without one it is
    the whole module. A module's own `configure_model` may call `fully_shard` instead, with `self.device_mesh`: then
    only what it left is spread here.

    Args:
        cpu_offload: parameters, gradients and optimizer state live on the host, and go to the accelerator for a moment.
        mixed_precision: torch's MixedPrecisionPolicy (or FSDP's earlier MixedPrecision); None takes what the Trainer's
            precision says: with "bf16-mixed" and "16-mixed" parameters are gathered in 16 bits, and gradients are
            averaged in float32.
        auto_wrap_policy: which parts are gathered by themselves: a set of their classes, or a function of a part.
        activation_checkpointing_policy: which parts compute their activations again in backward: a set of their
            classes, or a function of a part.
        sharding_strategy: "FULL_SHARD"; "SHARD_GRAD_OP" keeps gathered parameters until backward is over; "NO_SHARD"
            keeps all of them in each process; "HYBRID_SHARD" spreads them over a node and repeats that on each.
        state_dict_type: "full" saves one file, "sharded" a directory that all processes write together.
        device_mesh: how many replicas there are and over how many processes each is spread; or a DeviceMesh.
        reshard_after_forward: torch's argument of that name, which says more exactly what `sharding_strategy` does.
        limit_all_gathers: kept for Lightning's signature; FSDP2 gathers at most one part ahead in any case.
        use_orig_params: kept for Lightning's signature; parameters are always the module's own.
        process_group_backend: torch's name of it; None takes nccl for cuda beside gloo for the host, gloo elsewhere.
        timeout: how long a process waits for the others before that is an error.
        step_timeout: the same inside of training steps; or 20 times as long as they take, if that is more. None:
            `timeout`.
        start_method: how a Trainer that has to start processes itself does so, as with DDPStrategy.
        device: where this process's module and batches live; the Trainer says so.
        world: the processes; the Trainer says so.

    Raises:
        MisconfigurationException, ValueError: an argument that can't work.
        RuntimeError: "HYBRID_SHARD" with nothing that says over which processes.

    Example:
        >>> strategy = FSDPStrategy(auto_wrap_policy={nn.TransformerEncoderLayer})
    """

    def __init__(
        self,
        *,
        cpu_offload: Any = None,
        mixed_precision: Any = None,
        auto_wrap_policy: Policy | None = None,
        activation_checkpointing: type[nn.Module] | list[type[nn.Module]] | None = None,
        activation_checkpointing_policy: Policy | None = None,
        sharding_strategy: Any = "FULL_SHARD",
        state_dict_type: str = "full",
        device_mesh: tuple[int, int] | DeviceMesh | None = None,
        reshard_after_forward: bool | int | None = None,
        limit_all_gathers: bool = True,
        use_orig_params: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        step_timeout: timedelta | None = timedelta(minutes=5),
        start_method: str | None = None,
        device: torch.device | str = "cpu",
        world: World | None = None,
    ) -> None:
        super().__init__(device, world, process_group_backend, timeout, step_timeout, start_method)
        self.cpu_offload = bool(getattr(cpu_offload, "offload_params", cpu_offload))
        self.mixed_precision = mixed_precision
        if activation_checkpointing is not None and activation_checkpointing_policy is not None:
            raise ValueError(
                "activation_checkpointing and activation_checkpointing_policy say the same thing. Give the latter."
            )
        self.auto_wrap_policy = auto_wrap_policy
        self.activation_checkpointing_policy = activation_checkpointing_policy or activation_checkpointing
        for argument in ("auto_wrap_policy", "activation_checkpointing_policy"):
            if getattr(self, argument) is not None:
                check_policy(argument, getattr(self, argument))
        self.sharding_strategy = str(getattr(sharding_strategy, "name", sharding_strategy)).upper()
        if self.sharding_strategy not in SHARDING:
            raise ValueError(
                f"sharding_strategy must be one of {', '.join(map(repr, SHARDING))}. Received: {sharding_strategy!r}."
            )
        self.hybrid, keeps = SHARDING[self.sharding_strategy]
        self.reshard_after_forward = keeps if reshard_after_forward is None else reshard_after_forward
        if self.hybrid and auto_wrap_policy is None and device_mesh is None:
            raise RuntimeError(
                f"sharding_strategy={self.sharding_strategy!r} needs device_mesh=(replicas, processes of each), or an "
                "auto_wrap_policy: then each node is a replica."
            )
        if state_dict_type not in ("full", "sharded"):
            raise ValueError(f"state_dict_type must be 'full' or 'sharded'. Received: {state_dict_type!r}.")
        self.state_dict_type = state_dict_type
        self.sharded_checkpoints = state_dict_type == "sharded"
        self._mesh_given = device_mesh
        self._checkpointed: list[nn.Module] = []

    # ---- the processes
    def make_mesh(self) -> DeviceMesh:
        """Return how the processes are arranged: in a row, or as replicas that each are one.

        Raises:
            MisconfigurationException: the mesh is of another number of processes; parameters can't be offloaded.
        """
        if self.cpu_offload and self.device.type == "cpu":
            raise MisconfigurationException(
                "cpu_offload=True keeps parameters on the host while an accelerator computes, and this run's device is "
                "the cpu: there is nothing to offload from. Leave it out, or choose an accelerator."
            )
        given, size = self._mesh_given, self.world_size
        if isinstance(given, DeviceMesh):
            shape = tuple(given.shape)
        elif given is not None:
            shape = tuple(given)
        elif self.hybrid:
            shape = (self.world.num_nodes, size // self.world.num_nodes)
        else:
            shape = (size, 1) if self.sharding_strategy == "NO_SHARD" else (size,)
        if len(shape) not in (1, 2) or torch.Size(shape).numel() != size:
            raise MisconfigurationException(
                f"device_mesh must be (replicas, processes of each), whose product is the number of processes, {size}. "
                f"Received: {shape}."
            )
        if isinstance(given, DeviceMesh):
            return given
        names = ("data_parallel",) if len(shape) == 1 else ("replicate", "shard")
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    # ---- the module
    def setup(self, module: nn.Module) -> None:
        """Spread the module's parameters over the processes, part by part; one that is spread already stays so."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.sync_batchnorm:
            self._sync_batchnorm(module)
        self._checkpoint_activations(module)
        root = vars(module).get("_fsdp_root")
        self.manual = not getattr(module, "automatic_optimization", True)
        self._synced = True
        if root is None:
            self._spread(module)
            root = vars(module).get("_fsdp_root")
        self._roots = fsdp_roots(module) if root is None else [root]
        own_root = len(self._roots) == 1 and self._roots[0] is module
        self._call = through(module) if own_root and not self.manual else root
        for tensor in module.buffers():
            tensor.data = tensor.data.to(self.device)

    def _spread(self, module: nn.Module) -> None:
        """Spread what is not spread yet. With manual optimization each part that is called is a root of its own.

        A root's parameters are whole from its forward to the end of its backward, which lies inside of the step there.
        """
        users = fsdp_roots(module)
        if users and self.auto_wrap_policy is not None:
            warn("configure_model has called fully_shard already: auto_wrap_policy is not used.")
        by_policy = [] if users or self.auto_wrap_policy is None else chosen(module, self.auto_wrap_policy)
        parts = dict.fromkeys(by_policy)
        root: Root | None = None
        outermost: list[nn.Module] = []
        if self.manual:
            outermost = called_parts(module)
            _check_no_own_parameters(module)
        elif users != [module]:
            shards = self.device_mesh.shape[-1] if self.device_mesh is not None else 1
            root = Root(module, shards)
        again = self.reshard_after_forward is not False if self.manual else self.reshard_after_forward

        def finished(part: nn.Module) -> None:
            if part in parts:
                self._shard(part, self.reshard_after_forward)
            elif part in outermost and not is_known(part):
                self._shard(part, again)

        if is_on_meta(module):
            materialise(module, self.device, self.same_everywhere, finished)
        else:
            for part in parts_before_owners(module):
                finished(part)
        if root is not None:
            self._shard(root, self.reshard_after_forward, output_dtype=torch.float32)
            vars(module)["_fsdp_root"] = root
            root.lead_forward()

    def _shard(self, part: nn.Module, reshard: bool | int | None, output_dtype: torch.dtype | None = None) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        fully_shard(
            part,
            mesh=self.device_mesh,
            reshard_after_forward=reshard,
            mp_policy=self._policy(output_dtype),
            offload_policy=CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
        )

    def _policy(self, output_dtype: torch.dtype | None) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        given = self.mixed_precision
        if isinstance(given, MixedPrecisionPolicy):
            return given
        if given is not None:  # FSDP's earlier one
            return MixedPrecisionPolicy(given.param_dtype, given.reduce_dtype, output_dtype)
        dtype = MIXED.get(getattr(self.precision_plugin, "precision", ""))
        return MixedPrecisionPolicy() if dtype is None else MixedPrecisionPolicy(dtype, torch.float32, output_dtype)

    def _checkpoint_activations(self, module: nn.Module) -> None:
        if self.activation_checkpointing_policy is None or self._checkpointed:
            return
        self._checkpointed = chosen(module, self.activation_checkpointing_policy)
        for part in self._checkpointed:
            checkpointed(part)

    # ---- the step
    def wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step through FSDP, after which each process has its piece alone."""
        return super().wrap(self._through(step))

    def wrap_training(
        self, module: nn.Module, step: Callable[..., Any], wishes: Wishes | None = None
    ) -> Callable[..., Any]:
        """Return the training step as the loop calls it: with FSDP around it, which averages its gradients in backward.

        With manual optimization FSDP is around the parts that it calls.
        """
        if isinstance(self._call, Root):
            self._call.listen(step, wishes)
        return self._through(step)

    def teardown(self, module: nn.Module) -> None:
        """Leave the module as it is spread, and let its parts keep their activations again."""
        while self._checkpointed:
            vars(self._checkpointed.pop()).pop("forward", None)
        if isinstance(self._call, Root):
            self._call.listen(None, None)


class Root(nn.Module):
    """What FSDP begins with: a module whose forward is a step of another one, and with its parameters what is wished.

    Args:
        module: whose steps.
        shards: over how many processes parameters are spread.
    """

    def __init__(self, module: nn.Module, shards: int) -> None:
        super().__init__()
        self.module = module
        own = next((p for p in module.parameters() if p.is_floating_point() and p.requires_grad), None)
        dtype = torch.float32 if own is None else own.dtype
        # each process gets a row of its gradient: the mean of what all have put there
        self.carrier = nn.Parameter(torch.zeros(shards, WIDTH, dtype=dtype))
        self.inside = False
        """Whether its parameters are whole, as a step of it runs."""
        self.sent: Tensor | None = None
        self.wishes: Wishes | None = None
        self.trains: Callable[..., Any] | None = None

    def listen(self, step: Callable[..., Any] | None, wishes: Wishes | None) -> None:
        """Send along with the gradients of a step what processes tell each other."""
        self.trains = step
        self.wishes = self.sent = None
        if wishes is not None and len(wishes.names) <= WIDTH:
            self.wishes, wishes.carried, wishes.heard = wishes, True, self.heard  # type: ignore[method-assign]
            self.sent = torch.zeros(self.carrier.shape, dtype=wishes.own.dtype, device=wishes.own.device)
            wishes.own = self.sent[:, : len(wishes.names)]

    def heard(self) -> Tensor | None:
        """Return the mean of what was wished since the last time; None where no gradient was sent."""
        grad, self.carrier.grad = self.carrier.grad, None
        if grad is None or self.wishes is None:
            return None
        return local(grad)[0, : len(self.wishes.names)]

    def forward(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step."""
        self.inside = True
        try:
            output = map_tensors(without_view, step(*args, **kwargs))
        finally:
            self.inside = False
        if self.sent is None or step is not self.trains:
            return output
        if isinstance(output, Tensor):
            return Carry.apply(output, self.carrier, self.sent)
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": Carry.apply(output["loss"], self.carrier, self.sent)}
        return output

    def lead_forward(self) -> None:
        """Let the module be called outside of its steps, too: in a hook, or when the run is over."""
        forward = self.module.forward
        if getattr(forward, "__func__", None) is nn.Module.forward:
            return

        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return forward(*args, **kwargs)
            output = self(forward, *args, **kwargs)
            if not torch.is_grad_enabled():  # else backward does
                self.reshard()  # type: ignore[operator]
            return output

        vars(self.module)["forward"] = called


def without_view(tensor: Tensor) -> Tensor:
    """Return a tensor that is no view of another one: FSDP warns of those where a gradient may pass."""
    is_view = isinstance(tensor, Tensor) and tensor.requires_grad and tensor._is_view()
    return tensor.clone() if is_view else tensor


def is_known(part: nn.Module) -> bool:
    """Whether FSDP knows a part already."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(part, FSDPModule)


def called_parts(module: nn.Module) -> list[nn.Module]:
    """Return the outermost parts with parameters that can be called: lists and dicts of modules can't."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found.extend(called_parts(child))
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found


def _check_no_own_parameters(module: nn.Module) -> None:
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise MisconfigurationException(
            f"{type(module).__name__} has parameters of its own ({', '.join(own)}), and with manual optimization FSDP "
            "gathers those of the parts that training_step calls. Put them into a part with a forward of its own."
        )
