"""torch's fused optimizer kernels where nobody chose: one pass over weights, gradients and state instead of a dozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import SGD, Adam, AdamW, Optimizer

from trainkit.callback import Callback
from trainkit.hooks import is_overridden, overrides

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

CLASSES = (SGD, Adam, AdamW)
"""Optimizers with fused kernels on all of these devices. A subclass may do anything, and keeps its own step."""
DEVICES = ("cpu", "cuda", "mps")
BETWEEN = ("on_after_backward", "on_before_optimizer_step")
"""Hooks between backward and update: here, and in a module's own parts of an update, gradients may be replaced."""
OWN_PARTS = ("backward", "configure_gradient_clipping", "clip_gradients", "optimizer_step")


def choose_fused(trainer: Trainer) -> list[Watch]:
    """Let the run's optimizers use fused kernels in every group whose user left it open and whose tensors fit.

    On the cpu a fused kernel goes through memory without a look at strides, so it is right only as long as a gradient
    lies as its parameter does. autograd sees to that; where user code may replace gradients, each one is looked at.

    Returns:
        what looks at gradients, to be closed when the run ends.
    """
    watches = []
    module = trainer.module
    sparse = {id(p) for part in module.modules() if _is_sparse(part) for p in part.parameters(recurse=False)}
    replaced = not module.automatic_optimization or any(is_overridden(module, name) for name in (*BETWEEN, *OWN_PARTS))
    replaced = replaced or any(
        overrides(callback, name, Callback) for callback in trainer.callbacks for name in BETWEEN
    )
    for optimizer in trainer.optimizers:
        if type(optimizer) not in CLASSES:
            continue
        groups = optimizer.param_groups
        places = [at for at, g in enumerate(groups) if is_open(g) and wins(g) and fits(g["params"], sparse)]
        for at in places:
            groups[at]["fused"] = True
        if places:
            watches.append(Watch(optimizer, places, for_ever=replaced))
    return watches


def _is_sparse(part: nn.Module) -> bool:
    return getattr(part, "sparse", False) is True  # nn.Embedding and nn.EmbeddingBag


def is_open(group: dict[str, Any]) -> bool:
    """Whether the user left it to torch how to update a group."""
    open_ways = group.get("fused") is None and group.get("foreach") is None
    special = group.get("capturable") or group.get("differentiable")
    return open_ways and not special and not any(isinstance(n, Tensor) for n in (group["lr"], *group.get("betas", ())))


def wins(group: dict[str, Any]) -> bool:
    """Whether a fused kernel is the faster one: on the cpu not for SGD without momentum, which is one pass anyway."""
    return group.get("momentum") != 0 or any(p.device.type != "cpu" for p in group["params"])


def fits(parameters: Iterable[Tensor], sparse: set[int]) -> bool:
    """Whether fused kernels can update some parameters."""
    return all(
        type(p) in (nn.Parameter, Tensor)
        and p.is_floating_point()
        and p.device.type in DEVICES
        and (p.device.type != "cpu" or p.dtype.itemsize >= 4)  # torch 2.13's SGD is wrong there in 16 bits
        and id(p) not in sparse
        and lies_densely(p)
        for p in parameters
    )


def lies_densely(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in one block, in torch's order or in that of channels-last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.layout is not torch.strided:
        return False
    return tensor.is_contiguous() or (
        tensor.ndim in formats and tensor.is_contiguous(memory_format=formats[tensor.ndim])
    )


class Watch:
    """Look at gradients before an optimizer's first step, and leave those groups to torch whose gradients do not fit.

    Before each step, those of SGD's parameters whose first gradient comes later than others' get a momentum of zero:
    torch's kernel fails where some have one and others do not.

    Args:
        optimizer: which.
        places: which of its groups use fused kernels because nobody chose; loading a checkpoint makes new ones.
        for_ever: look at gradients before every step.
    """

    def __init__(self, optimizer: Optimizer, places: list[int], for_ever: bool) -> None:
        self.optimizer, self.places = optimizer, places
        self.for_ever, self.done = for_ever, False
        self.momentum = any(group.get("momentum") for group in optimizer.param_groups)
        self.handle = optimizer.register_step_pre_hook(self.look)
        self.alone = len(optimizer._optimizer_step_pre_hooks) == 1  # hooks of the user's may replace gradients, too

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups that use fused kernels because nobody chose."""
        groups = self.optimizer.param_groups
        return [groups[at] for at in self.places if at < len(groups) and groups[at].get("fused")]

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        """Look at the gradients that are there."""
        if not self.done:
            self.for_ever = self.for_ever or not self.alone or any(map(has_own_hook, parameters_of(self.groups)))
            self.done = not self.for_ever
            for group in self.groups:
                if not all(map(has_fitting_gradient, group["params"])):
                    group["fused"] = None
            lay_state(optimizer)  # a format that hooks gave the weights after a checkpoint was loaded
            if self.for_ever:  # a graph may outlive the step, and torch's kernels do not tell autograd what they change
                increment_version([p for p in parameters_of(self.groups) if p.grad is not None])
        if self.momentum:
            for group in self.groups:
                begin_momentum(optimizer, group)
        elif self.done:
            hooks = optimizer._optimizer_step_pre_hooks
            if next(reversed(hooks)) == self.handle.id:  # torch is going through them: others follow
                self.handle.remove()

    def close(self) -> None:
        """Look no more; whoever goes on with the optimizer has it as it was made."""
        self.handle.remove()
        for group in self.groups:
            group["fused"] = None


def parameters_of(groups: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """Go through the parameters of some groups."""
    return chain.from_iterable(group["params"] for group in groups)


def has_own_hook(parameter: Tensor) -> bool:
    """Whether user code is called when a gradient is there, and may exchange it."""
    return bool(parameter._post_accumulate_grad_hooks)


def lay_state(optimizer: Optimizer) -> None:
    """Lay an optimizer's state in memory as its parameters lie: fused kernels go through both in one order."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            alike = isinstance(value, Tensor) and value.shape == parameter.shape and value.layout == parameter.layout
            if alike and value.layout is torch.strided and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def begin_momentum(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Give a group's newcomers a momentum that makes their first step what it is in torch's plain update."""
    state = optimizer.state
    learning = [p for p in group["params"] if p.grad is not None]
    newcomers = [p for p in learning if state[p].get("momentum_buffer") is None]
    if not newcomers or len(newcomers) == len(learning):
        return
    if group["dampening"]:  # which would count for their first gradient, too
        group["fused"] = None
        return
    for parameter in newcomers:
        state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def has_fitting_gradient(parameter: Tensor) -> bool:
    """Whether a gradient lies in memory as its parameter does; or there is none."""
    grad = parameter.grad
    if grad is None:
        return True
    if grad.layout is not torch.strided or grad.dtype is not parameter.dtype:
        return False
    strides = zip(parameter.shape, parameter.stride(), grad.stride(), strict=True)
    return all(size == 1 or own == other for size, own, other in strides)
