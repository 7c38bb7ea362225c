"""How the weights are updated where the loop's own lines do not say it: a module's override points, and closures.

Update      which parts of an update the module has overridden, worked out once, before the loop
Replay      the update through a closure: LBFGS and its like, or a module's own `optimizer_step`
StepOptimizer   an optimizer as user code gets it: its `step` goes through precision, hooks and clipping
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from trainkit.errors import MisconfigurationException
from trainkit.fused import parameters_of
from trainkit.hooks import announced, is_overridden
from trainkit.metrics import TRAIN_BATCH
from trainkit.nonfinite import guard_of
from trainkit.precision import Precision
from trainkit.profiler.actions import recorded

if TYPE_CHECKING:
    from trainkit.profiler.actions import Actions
    from trainkit.trainer import Trainer

Step = Callable[..., Any]


class Update:
    """The parts of an update that are not the loop's own lines; None where they are.

    Args:
        trainer: whose module and settings decide.
    """

    def __init__(self, trainer: Trainer) -> None:
        module, precision = trainer.module, trainer.precision_plugin
        self.trainer = trainer
        self.zero_grad: Step = clear
        self.unscale = changed(precision, "unscale")
        self.adapt = changed(precision, "update")
        self.clip: Callable[[Optimizer], None] | None = None
        self.backward: Step = precision.backward
        if changed(precision, "backward") is None and changed(precision, "scale") is None:
            self.backward = Tensor.backward
        self.own_backward = is_overridden(module, "backward")
        if is_overridden(module, "optimizer_zero_grad"):
            self.zero_grad = announced(trainer, "optimizer_zero_grad", module.optimizer_zero_grad)
        if self.own_backward:
            self.backward = announced(trainer, "backward", self._backward)
        if is_overridden(module, "configure_gradient_clipping") or is_overridden(module, "clip_gradients"):
            self.clip = announced(trainer, "configure_gradient_clipping", self._clip_as_configured)
        elif trainer.gradient_clip_val is not None and trainer.gradient_clip_val > 0:
            self.clip = self._clip
        if trainer.actions is not None:
            self._record(trainer.actions)
        self.step: Step = precision.step
        self.guard = guard_of(trainer, wants_closure)
        """Whether updates are finite; None: nobody wants to know (`nan_policy="off"`)."""
        if self.guard is not None:
            self.backward, self.step = self.guard.watch_backward(self.backward), self.guard.step

    def _record(self, actions: Actions) -> None:
        """Let a profiler see the parts of an update."""
        module, strategy = (type(part).__name__ for part in (self.trainer.module, self.trainer.strategy))
        zero_grad = self.trainer.module.optimizer_zero_grad
        self.zero_grad = actions.wrap(f"[LightningModule]{module}.optimizer_zero_grad", zero_grad)
        self.backward = actions.wrap(f"[Strategy]{strategy}.backward", self.backward)
        if self.clip is not None:
            self.clip = actions.wrap(f"[LightningModule]{module}.configure_gradient_clipping", self.clip)

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.module.backward(trainer.precision_plugin.scale(loss), *args, **kwargs)

    def _clip(self, optimizer: Optimizer) -> None:
        trainer, limit = self.trainer, self.trainer.gradient_clip_val
        assert limit is not None
        parameters = list(parameters_of(optimizer.param_groups))
        trainer.strategy.clip_gradients(parameters, limit, trainer.gradient_clip_algorithm)

    def _clip_as_configured(self, optimizer: Optimizer) -> None:
        trainer = self.trainer
        trainer.module.configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        )

    def replay(self, training_step: Step, loss_of: Callable[[Any], Tensor | None]) -> Replay | None:
        """Return the update through a closure, None when nobody needs one."""
        trainer = self.trainer
        own_step = is_overridden(trainer.module, "optimizer_step")
        if own_step or any(wants_closure(optimizer) for optimizer in trainer.optimizers):
            return Replay(trainer, self, training_step, loss_of)
        return None


def clear(epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
    """Clear an optimizer's gradients; torch's own way takes a tiny model's whole backward to write down that it did."""
    if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:  # a class or object of its own
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def changed(precision: Precision, name: str) -> Callable[..., Any] | None:
    """Return a precision's method, None where it is plain float32's, which adds nothing to what torch does."""
    return None if getattr(type(precision), name) is getattr(Precision, name) else getattr(precision, name)


def wants_closure(optimizer: Optimizer) -> bool:
    """Whether to hand an optimizer a closure: it can't do without, or it is not torch's own and may use one."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is None:
        return False
    return closure.default is closure.empty or not type(optimizer).__module__.startswith("torch.optim")


class Replay:
    """Update through a closure.

    The loop has computed the loss and its gradients when the update begins, so the closure's first call only returns
    that loss. Each later call clears the gradients and computes forward and backward again, for all batches of the
    accumulation window.
    """

    def __init__(
        self, trainer: Trainer, update: Update, training_step: Step, loss_of: Callable[[Any], Tensor | None]
    ) -> None:
        self.trainer, self.own = trainer, update
        self.training_step = announced(trainer, TRAIN_BATCH, training_step)
        self.loss_of = loss_of
        step = recorded(trainer, "LightningModule", trainer.module, "optimizer_step")
        self.optimizer_step = announced(trainer, "optimizer_step", step)
        self.window: list[tuple[Any, int]] = []
        """The batches whose gradients are pending, with their index."""

    def remember(self, batch: Any, batch_idx: int) -> None:
        """Keep a batch that has become a part of the window."""
        self.window.append((batch, batch_idx))

    def update(self, loss: Tensor | None, batch_idx: int) -> bool:
        """Let every optimizer step, through the module's `optimizer_step`; return whether the weights moved."""
        trainer = self.trainer
        moved = True
        for optimizer in trainer.step_optimizers:
            optimizer.moved = True  # an optimizer_step that leaves it alone is not an overflow
            self.optimizer_step(trainer.progress.epoch, batch_idx, optimizer, self._closure(loss))
            moved &= optimizer.moved
        return moved

    def _closure(self, loss: Tensor | None) -> Callable[[], Tensor | None]:
        computed = True

        def closure() -> Tensor | None:
            nonlocal computed
            if computed:
                computed = False
                return loss
            return self._compute()

        return closure

    def _compute(self) -> Tensor | None:
        """Compute the window's gradients again, in the loop's order, and return the last loss."""
        trainer, own, hooks = self.trainer, self.own, self.trainer.hooks
        last: Tensor | None = None
        for number, (batch, batch_idx) in enumerate(self.window):
            if number == 0:
                for optimizer in trainer.optimizers:
                    hooks.on_before_zero_grad(optimizer)
                    own.zero_grad(trainer.progress.epoch, batch_idx, optimizer)
            loss = self.loss_of(self.training_step(batch, batch_idx))
            if loss is None:
                continue
            if trainer.accumulate_grad_batches > 1:
                loss = loss / trainer.accumulate_grad_batches
            hooks.on_before_backward(loss)
            own.backward(loss)
            hooks.on_after_backward()
            last = loss
        return last


class StepOptimizer:
    """An optimizer as user code gets it, from `self.optimizers()` and in `optimizer_step`.

    Its `step` goes through the precision, the hook `on_before_optimizer_step` and the clipping; everything else is the
    optimizer's own. It passes `isinstance(optimizer, type(optimizer.optimizer))`.

    Args:
        optimizer: what it stands for.
        trainer: whose run it steps in; without one a step is the optimizer's own.
    """

    def __init__(self, optimizer: Optimizer, trainer: Trainer | None = None) -> None:
        self.optimizer = optimizer
        self.moved = True
        """Whether the last step changed the weights; a float16 gradient that overflowed holds them."""
        self._trainer = trainer

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Update the weights and return what the closure returned first.

        With manual optimization, one batch counts as one step of the run, however many optimizers stepped in it.

        Args:
            closure: computes the loss and its gradients; some optimizers call it more than once.
            options: for the optimizer's own `step`.
        """
        trainer, optimizer = self._trainer, self.optimizer
        if trainer is None:
            return optimizer.step(closure, **options)
        precision, update, about_to_step = (
            trainer.precision_plugin,
            trainer.update,
            trainer.hooks.on_before_optimizer_step,
        )
        clip, guard, automatic = update.clip, update.guard, trainer.module.automatic_optimization

        def prepare() -> None:
            precision.unscale(optimizer)
            about_to_step(optimizer)
            if clip is not None and automatic:
                clip(optimizer)

        answers: list[Any] = []
        if closure is None and not automatic and guard is not None and not guard.passes([optimizer]):
            self.moved = False
        elif closure is None:
            prepare()
            self.moved = update.step(optimizer, **options)
        else:

            def evaluate() -> Any:
                answers.append(closure())
                prepare()
                return answers[-1]

            self.moved = update.step(optimizer, evaluate, **options)
        if not automatic:
            precision.update()
            trainer.stepped_manually = True
        return answers[0] if answers else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Let only this optimizer's parameters get gradients inside the block.

        Args:
            sync_grad: False keeps gradients of several processes apart until a later block; with one process, nothing.
        """
        if self._trainer is None:
            raise MisconfigurationException("toggle_model needs an optimizer of a run, from self.optimizers().")
        module = self._trainer.module
        module.toggle_optimizer(self)
        try:
            yield
        finally:
            module.untoggle_optimizer(self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.optimizer)  # so that schedulers and user code take it for what it stands for

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepOptimizer.__new__, (StepOptimizer,), self.__dict__

    def __repr__(self) -> str:
        return f"StepOptimizer({self.optimizer!r})"
