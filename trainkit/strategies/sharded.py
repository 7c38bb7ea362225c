"""ShardedStrategy: what strategies have in common that spread parameters over processes by torch's FSDP2 and DTensor.

The values of parameters are rank 0's. All processes take part in each forward and backward, as each has a piece that
the others need: one that has no sample goes through the step with a sample of another one, which counts nothing
(`taking_part.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import LBFGS, Adafactor, Muon, Optimizer, Rprop, SparseAdam

from trainkit.errors import MisconfigurationException
from trainkit.pieces import clip_norm, clip_value, is_spread
from trainkit.strategies.parallel import ParallelStrategy

WHOLE_ONLY = (LBFGS, Adafactor, Muon, Rprop, SparseAdam)
"""Optimizers of torch that fail on pieces of parameters."""


class ShardedStrategy(ParallelStrategy):
    """Several processes of which each has a piece of the parameters."""

    sharded = True

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._roots: list[Any] = []
        self._call: Callable[..., Any] | None = None  # what runs a step with parameters whole; None: the step does

    # ---- before the module's parts are spread
    def setup_environment(self) -> None:
        """Join the other processes, and arrange them as a mesh."""
        super().setup_environment()
        if self.device_mesh is None:
            self.device_mesh = self.make_mesh()

    def make_mesh(self) -> DeviceMesh:
        """Return how the processes are arranged."""
        raise NotImplementedError

    @contextmanager
    def init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make modules on the host, or with `empty_init=True` without memory: a device may have too little."""
        with torch.device("meta") if empty_init else nullcontext():
            yield

    def begin(self, module: nn.Module) -> None:
        """Give `configure_model` the mesh, and all processes the same values and the same random state as rank 0."""
        vars(module)["device_mesh"] = self.device_mesh
        self.same_everywhere([*module.parameters(), *module.buffers()])
        state = torch.get_rng_state().to(self.device)
        dist.broadcast(state, 0)
        torch.set_rng_state(state.cpu())

    def same_everywhere(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values that rank 0 has of what is not spread over them."""
        super().same_everywhere(t for t in tensors if not t.is_meta and not is_spread(t))

    def optimizers_made(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuse optimizers that can't work on pieces.

        Raises:
            MisconfigurationException: it names one.
        """
        for optimizer in optimizers:
            if isinstance(optimizer, WHOLE_ONLY):
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} needs whole parameters, and with {type(self).__name__} each process "
                    "has a piece of them. Use another optimizer, AdamW for example, or strategy='ddp'."
                )

    # ---- the step
    @property
    def roots(self) -> list[Any]:
        """The modules with which FSDP begins: none of them is a part of another one."""
        return self._roots

    def _through(self, step: Callable[..., Any]) -> Callable[..., Any]:
        call = self._call
        return step if call is None else lambda *args: call(step, *args)

    def wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step that ends with each process having its piece alone, so that everybody else sees pieces."""

        def run(*args: Any) -> Any:
            output = step(*args)
            for root in self.roots:
                root.reshard()
            return output

        return run

    def sync(self, wanted: bool, lacking: bool = False) -> None:
        """Say before a step's forward whether its gradients are averaged: not inside an accumulation window.

        With manual optimization they are averaged in each backward.
        """
        if wanted != self._synced and not self.manual:
            self._synced = wanted
            for root in self.roots:
                root.set_requires_gradient_sync(wanted)

    _synced = True
    manual = False
    """Whether the module's training_step optimizes by itself."""

    def epoch_starts(self) -> None:
        """Let parameters learn that learn from now on, and forget gradients of a window that was left in its middle."""
        for root in self.roots:
            for parameter in fsdp_parameters(root):
                parameter.unsharded_accumulated_grad = None
                of_all = getattr(parameter, "_unsharded_param", None)
                if of_all is not None:
                    of_all.grad = None
                    of_all.requires_grad_(parameter.sharded_param.requires_grad)

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float, algorithm: str | None) -> None:
        """Clip gradients in place: the norm of all processes' pieces together ("norm", or None), or each element."""
        if algorithm == "value":
            clip_value(parameters, limit)
        else:
            clip_norm(parameters, limit)

    def teardown(self, module: nn.Module) -> None:
        """Leave the module as it is spread: a later run goes on with it."""


def fsdp_parameters(root: nn.Module) -> Iterator[Any]:
    """Go through what FSDP keeps of each parameter of a module and its parts."""
    from torch.distributed.fsdp import FSDPModule

    for part in root.modules():
        if isinstance(part, FSDPModule):
            state = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # before torch 2.12 there is at most one
                groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
            for group in groups:
                yield from group.fsdp_params


def fsdp_roots(module: nn.Module) -> list[Any]:
    """Return the outermost parts of a module that FSDP knows."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in fsdp_roots(child)]


def through(module: Any) -> Callable[..., Any]:
    """Return what calls `step(*args)` with a module's parameters whole, as FSDP does around its forward."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    vars(module)["_call_step"] = _call
    register_fsdp_forward_method(module, "_call_step")
    return vars(module).pop("_call_step")  # type: ignore[no-any-return]


def _call(step: Callable[..., Any], *args: Any) -> Any:
    return step(*args)


def checkpointed(part: nn.Module) -> None:
    """Let a part compute its activations again in backward, instead of keeping them; its names stay as they are.

    Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    from torch.utils.checkpoint import checkpoint

    vars(part)["forward"] = partial(checkpoint, part.forward, use_reentrant=False)
