"""DDPStrategy: each process has the whole model and its part of the batch; gradients are averaged by torch's DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _find_tensors
from torch.optim import Optimizer

from trainkit.strategies.parallel import ParallelStrategy
from trainkit.world import World

HOOKS = "torch.distributed.algorithms.ddp_comm_hooks"
COMPLETE = (f"{HOOKS}.default_hooks", f"{HOOKS}.powerSGD_hook")
"""Where hooks of torch's are that average over all processes."""


class DDPStrategy(ParallelStrategy):
    """Distributed data parallel training.

    Reference: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.

    Args:
        find_unused_parameters: some parameters have no gradient in some steps.
        static_graph: the same parameters have one in all steps.
        gradient_as_bucket_view: gradients are views of what is sent, which saves a copy of them.
        bucket_cap_mb: how much is sent at once, in MiB; None is torch's choice.
        ddp_comm_state: what the hook is called with first.
        ddp_comm_hook: replaces the averaging, as `DistributedDataParallel.register_comm_hook` says.
        ddp_comm_wrapper: takes the hook and returns one, for example to compress what it sends.
        model_averaging_period: with torch's `PostLocalSGDState` as `ddp_comm_state`: after how many updates the weights
            of all processes are averaged. Reference: Lin et al., "Don't Use Large Mini-Batches, Use Local SGD", 2020.
        process_group_backend: torch's name of it; None takes nccl for cuda beside gloo for the host, gloo elsewhere.
        timeout: how long a process waits for the others before that is an error, where nobody knows better: up to
            the first training step's end, and in all that is no training step.
        step_timeout: how long in a training step, once it is known how long these take; see `ParallelStrategy`.
        start_method: how a Trainer that has to start processes itself does so: None runs the script again ("popen" is
            Lightning's word for it), "spawn", "fork" and "notebook" run the call in children of this process.
        device: where this process's module and batches live; the Trainer says so.
        world: the processes; the Trainer says so.
        more: further arguments of `torch.nn.parallel.DistributedDataParallel`.

    Raises:
        ValueError: one of `model_averaging_period` and a `PostLocalSGDState` without the other.
    """

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: int | None = None,
        ddp_comm_state: object | None = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        model_averaging_period: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        step_timeout: timedelta | None = timedelta(minutes=5),
        start_method: str | None = None,
        device: torch.device | str = "cpu",
        world: World | None = None,
        **more: Any,
    ) -> None:
        super().__init__(device, world, process_group_backend, timeout, step_timeout, start_method)
        self.settings: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "bucket_cap_mb": bucket_cap_mb,
            **more,
        }
        self.hook = (ddp_comm_state, ddp_comm_hook, ddp_comm_wrapper)
        if (model_averaging_period is not None) != (type(ddp_comm_state).__name__ == "PostLocalSGDState"):
            raise ValueError(
                "model_averaging_period and ddp_comm_state=PostLocalSGDState(...) belong together: the one says how "
                f"often weights are averaged, the other from when on gradients are not. Received: "
                f"model_averaging_period={model_averaging_period!r}, ddp_comm_state={ddp_comm_state!r}."
            )
        self.model_averaging_period = model_averaging_period
        if ddp_comm_state is not None:
            self.unsaved = f"what the gradients' hook remembers ({type(ddp_comm_state).__name__})"
        self.model: DistributedDataParallel | None = None
        """The module as DDP has it while it is trained; None when none of its parameters learns."""
        self._trained: list[int] = []
        self._averaging: list[Any] = []

    # ---- the step
    def wrap_training(
        self, module: nn.Module, step: Callable[..., Any], wishes: Wishes | None = None
    ) -> Callable[..., Any]:
        """Return the training step as the loop calls it: through DDP, which averages its gradients in backward."""
        self._steps = Steps(module, step, wishes)
        if wishes is not None:
            wishes.carried = self._reaches_all()
        self._wrap()
        return self._step

    def _reaches_all(self) -> bool:
        """Whether what goes with the gradients comes to all processes: not by a hook of which nobody knows."""
        _, hook, _ = self.hook
        return hook is None or (hook.__module__ in COMPLETE and hook.__name__ != "noop_hook")

    def optimizers_made(self, optimizers: Iterable[Optimizer]) -> None:
        """Average weights every so many updates, where gradients are not averaged over all processes."""
        if self.model_averaging_period is None:
            return
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        first: Any = self.hook[0]
        for optimizer in optimizers:
            averager = PeriodicModelAverager(self.model_averaging_period, first.start_localSGD_iter)
            made = optimizer.register_step_post_hook(
                lambda stepped, *_, averager=averager: averager.average_parameters(stepped.param_groups)
            )
            self._averaging.append(made)

    def _wrap(self) -> None:
        learning = [p for p in self._steps.module.parameters() if p.requires_grad]
        self._trained = list(map(id, learning))
        self.model = None
        if not learning:  # which DDP refuses
            return
        cuda = [self.device.index] if self.device.type == "cuda" else None
        self.model = DistributedDataParallel(self._steps, device_ids=cuda, **self.settings)
        rebuilds = not (self.settings["static_graph"] or self.settings["find_unused_parameters"])
        if self.world_size > 2 and rebuilds:
            self._settle_buckets()
        state, hook, wrapper = self.hook
        if hook is not None:
            self.model.register_comm_hook(state, wrapper(hook) if wrapper is not None else hook)

    def _settle_buckets(self) -> None:
        """Let DDP lay its buckets out before the first step, and not after it.

        It lays them out again when it has seen a backward, and a sum over three processes depends in its last bit on
        where in a bucket a number is: the first step of a resumed run would differ from what the run that was not cut
        had at that place. So it sees the backward of a sum over all parameters, last ones first, that nobody uses.
        """
        parameters = [p for p in self._steps.parameters() if p.requires_grad]
        hooked = any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
        if self.model is None or hooked or any(getattr(part, "sparse", False) for part in self._steps.modules()):
            return  # hooks of the user's would take it for a step, and sparse gradients are of other kinds
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        self.model.reducer.prepare_for_backward([])
        with torch.enable_grad():
            sums = [(torch.view_as_real(p) if p.is_complex() else p).sum().float() for p in parameters]
            torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
        self.model.reducer._rebuild_buckets()
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad

    def epoch_starts(self) -> None:
        """Look whether other parameters learn than before: DDP has to know."""
        learning = [id(p) for p in self._steps.module.parameters() if p.requires_grad]
        if learning != self._trained:
            self._wrap()

    def _step(self, *args: Any) -> Any:
        return self._steps(*args) if self.model is None else self.model(*args)

    def sync(self, wanted: bool, lacking: bool = False) -> None:
        """Say before a step's forward whether its gradients are averaged: not inside an accumulation window.

        Forward sends rank 0's buffers, unless some process has no forward.
        """
        if self.model is not None:
            self.model.require_backward_grad_sync = wanted
            self.model.require_forward_param_sync = not lacking

    def prepare_backward(self, loss: Tensor) -> None:
        """Have the gradients of a backward averaged that the step itself runs, inside of its forward."""
        if self.model is not None:
            wants = self.settings["find_unused_parameters"] and not self.settings["static_graph"]
            self.model.reducer._rebuild_buckets()
            self.model.reducer.prepare_for_backward(list(_find_tensors(loss)) if wants else [])  # type: ignore[no-untyped-call]

    def sync_by_hand(self) -> None:
        """Average the gradients after a step in which some process had no sample, and so no forward and backward."""
        parameters = [p for p in self._steps.parameters() if p.requires_grad]
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        self.all_reduce(there, "max")
        for parameter, anywhere in zip(parameters, there.tolist(), strict=True):
            if anywhere:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(grad)
                parameter.grad = grad.div_(self.world_size)

    def teardown(self, module: nn.Module) -> None:
        """Let DDP go, and give an accelerator's memory back."""
        self.model = None
        self.__dict__.pop("_steps", None)
        while self._averaging:
            self._averaging.pop().remove()
        super().teardown(module)


class Wishes:
    """What each process wants of all, sent with the gradients: a parameter whose gradient is the wish.

    Args:
        names: what can be wished.
        device: where the parameters are.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.own = torch.zeros(len(names), device=device)
        """What this process wishes; numbers above 0 are wishes."""
        self.carrier = nn.Parameter(torch.zeros(len(names), device=device))
        self.carried = False
        """Whether they are sent with the gradients; a strategy says so. Else processes ask each other at log points."""

    def heard(self) -> Tensor | None:
        """Return the sum of what was wished since the last time, or its mean; None where no gradient was sent."""
        grad, self.carrier.grad = self.carrier.grad, None
        return grad


class Carry(torch.autograd.Function):
    """Give the loss on as it is; the carrier's gradient is what this process wishes."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, carrier: Tensor, own: Tensor) -> Tensor:
        ctx.own = own
        return loss.clone()  # FSDP warns of views

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.own.clone(), None


class Steps(nn.Module):
    """The training step as the forward that DDP knows how to call."""

    def __init__(self, module: nn.Module, step: Callable[..., Any], wishes: Wishes | None) -> None:
        super().__init__()
        self.module = module
        self.step, self.wishes = step, wishes
        self.carrier = wishes.carrier if wishes is not None else None  # the last one is sent first, with the loss

    def forward(self, *args: Any) -> Any:
        """Run the step."""
        output = self.step(*args)
        if self.wishes is None:
            return output
        if isinstance(output, Tensor):
            return Carry.apply(output, self.carrier, self.wishes.own)
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": Carry.apply(output["loss"], self.carrier, self.wishes.own)}
        return output
