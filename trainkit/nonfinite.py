"""nan_policy: an update whose loss or gradients are not finite does not reach the weights.

HostGuard      on the cpu: a flag is looked at in its own memory, so a bad update is not even begun
DeviceGuard    elsewhere: the update is made and taken back on the device; flags are read at log points, saves, the end
"""

from __future__ import annotations

import copy
import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit.data.position import position_of
from trainkit.errors import NonFiniteError
from trainkit.pieces import local

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

Step = Callable[..., Any]

MOST_IN_A_ROW = 100
"""So many skipped updates in a row end a run: its weights or all of its data are beyond repair."""


class Fault(NamedTuple):
    """An update that was not finite."""

    step: int
    """Updates before it."""
    epoch: int
    batches: list[int]
    """Those of its accumulation window, by their index."""
    batch_idx: int
    """The first whose loss is not finite; the window's last when all are."""
    loss: float
    parameter: str | None
    """The first whose gradient is not finite."""

    def __str__(self) -> str:
        finite = self.loss - self.loss == 0
        what = f"the loss is {self.loss:g}"
        if self.parameter is not None:
            what += f", {'but' if finite else 'and'} the gradient of {self.parameter} is not finite"
        elif finite:
            what += ", and the weights would not be finite after it"
        return f"step {self.step} (epoch {self.epoch}, batch {self.batch_idx}): {what}"


class Guard:
    """Keep weights, optimizer state and buffers as they were before an update that is not finite.

    Args:
        trainer: whose `nan_policy` is "raise" or "skip".
        wants_closure: whether an optimizer computes the loss again while it steps.
    """

    def __init__(self, trainer: Trainer, wants_closure: Callable[[Optimizer], bool]) -> None:
        self.trainer, self.wants_closure = trainer, wants_closure
        self.raises = trainer.nan_policy == "raise"
        self.losses: deque[tuple[int, Tensor]] = deque(maxlen=1000)
        """The losses since the last update, each with the index of its batch."""
        self.buffers = list(trainer.module.buffers())
        self.kept = [buffer.clone() for buffer in self.buffers]
        self._untold: list[Fault] = []
        self._begins = True  # a window

    # ---- what it watches
    def watch_step(self, step: Step) -> Step:
        """Return training_step, before which buffers that it changes, running means for example, are kept."""
        if not self.buffers:
            return step

        def watched(*arguments: Any) -> Any:
            if self._begins:
                self._begins = False
                with torch.no_grad():
                    torch._foreach_copy_(self.kept, self.buffers)
            return step(*arguments)

        return watched

    def watch_backward(self, backward: Step) -> Step:
        """Return backward, before which the loss is noted."""

        def watched(loss: Tensor, *arguments: Any, **keywords: Any) -> None:
            self.losses.append((self.trainer.batch_idx, loss.detach()))
            backward(loss, *arguments, **keywords)

        return watched

    def watched(self, optimizers: Iterable[Optimizer]) -> list[Tensor]:
        """Return the parameters whose gradients an update would use."""
        if self.trainer.scaler is not None:  # whose overflows are no faults: it holds the update itself
            return []
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]

    # ---- what it decides
    def passes(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether to make the update: losses and gradients are finite, or it is not known yet.

        Raises:
            NonFiniteError: they are not, and nan_policy is "raise"; or it was so too often in a row.
        """
        raise NotImplementedError

    def step(self, optimizer: Optimizer, closure: Step | None = None, **options: Any) -> bool:
        """Let an optimizer step and return whether the weights moved."""
        trainer = self.trainer
        automatic = trainer.module.automatic_optimization
        if closure is None or (automatic and not self.wants_closure(optimizer)):
            return self.plain_step(optimizer, closure, **options)
        # The loss is computed again in there: what came of it is seen afterwards.
        before = Snapshot(optimizer)
        self._begins = not automatic
        moved = trainer.precision_plugin.step(optimizer, closure, **options)
        bad = not self.all_finite(before.now())
        if bad:
            before.put_back()
            self._put_buffers_back()
            self.found(self.fault([(batch_idx, float(loss)) for batch_idx, loss in self.losses], None))
        self._forget()
        return moved and not bad

    def plain_step(self, optimizer: Optimizer, closure: Step | None, **options: Any) -> bool:
        """Let an optimizer step that uses the gradients which are there."""
        return self.trainer.precision_plugin.step(optimizer, closure, **options)

    def all_finite(self, tensors: list[Tensor]) -> bool:
        """Whether all numbers in some tensors are finite."""
        raise NotImplementedError

    @torch.no_grad()
    def _put_buffers_back(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)

    def settle(self) -> None:
        """Read what is not known yet, and tell what was skipped."""
        faults, self._untold = self._untold, []
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            total = self.trainer.progress.skipped
            self.trainer.print(f'nan_policy="skip": no update for {faults[0]}{more}; skipped so far: {total}')

    def at_log_point(self) -> bool:
        """Whether the step that goes on is one of those at which tensors are read."""
        return (self.trainer.progress.window + 1) % (self.trainer.log_every_n_steps or 50) == 0

    def end_of_update(self) -> None:
        """Begin anew; at a log point hear of what was not finite, and log how many updates were skipped, if any was."""
        self._forget()
        if self.at_log_point():
            self.settle()
            if self.trainer.progress.skipped:
                self.trainer.metrics.log("skipped_updates", float(self.trainer.progress.skipped))

    def _forget(self) -> None:
        self.losses.clear()
        self._begins = True

    # ---- what follows from a fault
    def fault(
        self,
        losses: list[tuple[int, float]],
        parameter: Tensor | None,
        step: int | None = None,
        epoch: int | None = None,
    ) -> Fault:
        """Put together what is known of an update that was not finite."""
        trainer, progress = self.trainer, self.trainer.progress
        losses = losses or [(trainer.batch_idx, float("nan"))]
        batch_idx, loss = next((noted for noted in losses if noted[1] - noted[1] != 0), losses[-1])
        if trainer.module.automatic_optimization:
            loss *= trainer.accumulate_grad_batches  # as training_step returned it
        return Fault(
            progress.step if step is None else step,
            progress.epoch if epoch is None else epoch,
            sorted({index for index, _ in losses}),
            batch_idx,
            loss,
            name_of(trainer, parameter),
        )

    def found(self, fault: Fault) -> None:
        """Count a fault, or raise it."""
        progress = self.trainer.progress
        if self.raises:
            raise self.error(fault, "")
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self._untold.append(fault)
        if progress.skipped_in_a_row >= MOST_IN_A_ROW:
            raise self.error(fault, f"{MOST_IN_A_ROW} updates in a row were skipped. ")

    def error(self, fault: Fault, why: str) -> NonFiniteError:
        """Write down which batch it was, and return the error to raise."""
        trainer = self.trainer
        if trainer.fast_dev_run:
            where = f"trainer.replay(({fault.epoch}, {fault.batch_idx})) fetches the batch again."
        else:
            path = os.path.join(trainer.run_dir, f"nonfinite-step={fault.step}.json")
            try:
                os.makedirs(trainer.run_dir, exist_ok=True)
                with open(path, "w") as file:
                    json.dump(described(trainer, fault), file, indent=1)
                where = f"trainer.replay({path!r}) fetches the batch again, with the same draws."
            except OSError as error:
                where = f"Which samples were in the batch could not be written to {path}: {error}"
        return NonFiniteError(
            f'nan_policy="{trainer.nan_policy}": {why}No update for {fault}. Weights and optimizer state are as before '
            f"it. {where}",
            fault.step,
            fault.epoch,
            fault.batch_idx,
            fault.loss,
            fault.parameter,
        )


def described(trainer: Trainer, fault: Fault) -> dict[str, Any]:
    """Return what is to know about a fault: the step, the loss, the gradient, and where in the data the batch is."""
    return {
        "step": fault.step,
        "loss": repr(fault.loss),
        "parameter": fault.parameter,
        "window": fault.batches,
        **position_of(trainer.sources.train, fault.epoch, fault.batch_idx),
    }


class HostGuard(Guard):
    """A guard that knows at once: on the cpu, memory is looked at where it is."""

    def __init__(self, trainer: Trainer, wants_closure: Callable[[Optimizer], bool]) -> None:
        super().__init__(trainer, wants_closure)
        self._flag, self._one = torch.zeros(1), torch.ones(1)
        self._flagged = self._flag.numpy()  # the same memory

    def passes(self, optimizers: Iterable[Optimizer]) -> bool:
        parameters = self.watched(optimizers)
        values = [(batch_idx, seen(loss)) for batch_idx, loss in self.losses]
        fine = all(value - value == 0 for _, value in values) and self._look([p.grad for p in parameters])
        fine = self._everywhere(fine)
        if fine:
            self.trainer.progress.skipped_in_a_row = 0
        else:
            self._put_buffers_back()
            grads = ((parameter, parameter.grad) for parameter in parameters)
            wrong = (p for p, grad in grads if grad is not None and not values_of(grad).isfinite().numpy().all())
            self.found(self.fault(values, next(wrong, None)))
        self.end_of_update()
        return fine

    def all_finite(self, tensors: list[Tensor]) -> bool:
        return self._everywhere(self._look([tensor.clone() for tensor in tensors]))

    def _everywhere(self, fine: bool) -> bool:
        """Whether all processes say so, where each has a piece of the gradients; else all have the same."""
        strategy = self.trainer.strategy
        return strategy.reduce_boolean_decision(fine) if strategy.sharded else fine

    def _look(self, tensors: list[Any]) -> bool:
        """Whether all numbers are finite. One pass over all of them, which multiplies them by one."""
        if not tensors:
            return True
        self._flagged[0] = 0
        tensors = [local(tensor) for tensor in tensors]
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, self._flag, self._one)
        except RuntimeError:  # sparse or complex
            torch._amp_foreach_non_finite_check_and_unscale_(list(map(values_of, tensors)), self._flag, self._one)
        return not self._flagged[0]


def seen(number: Tensor) -> float:
    """Return a number of the cpu by looking at its memory."""
    return float((number if number.dtype is torch.float32 else number.double()).numpy())


class Unread(NamedTuple):
    """What the device knows of one update."""

    step: int
    epoch: int
    losses: list[tuple[int, Tensor]]
    parameters: list[Tensor]
    finite: Tensor  # for each of their gradients
    held: Tensor
    counted: list[tuple[Tensor, Tensor]]  # what the optimizers count on the host, and by how much it went on


class DeviceGuard(Guard):
    """A guard that decides on the device, and hears of it when tensors are read anyway.

    Weights, optimizer state and buffers are chosen there: those from before the update, or those from after it. With
    "raise" no update counts any more until the first fault is read. What an optimizer counts on the host is set right
    when flags are read; a schedule that moves with updates moves with skipped ones, too.
    """

    def __init__(self, trainer: Trainer, wants_closure: Callable[[Optimizer], bool]) -> None:
        super().__init__(trainer, wants_closure)
        self._hold = torch.zeros((), dtype=torch.bool, device=trainer.device)
        self._unread: list[Unread] = []
        self._counted: list[tuple[Tensor, Tensor]] = []  # of the update that is being made

    @torch.no_grad()
    def passes(self, optimizers: Iterable[Optimizer]) -> bool:
        optimizers = list(optimizers)
        progress, parameters = self.trainer.progress, self.watched(optimizers)
        finite = self._finite([p.grad for p in parameters if p.grad is not None])
        bad = ~self._everywhere(finite.all() & self._finite([loss for _, loss in self.losses]).all())
        self._hold = bad | self._hold if self.raises else bad
        for buffer, before in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(self._hold.to(buffer.device), before, buffer))
        losses, self._counted = list(self.losses), []
        self._unread.append(
            Unread(progress.step, progress.epoch, losses, parameters, finite, self._hold, self._counted)
        )
        read = self.at_log_point() or any(map(self.wants_closure, optimizers))
        self.end_of_update()
        if read:  # what is known on the host is not begun
            self.settle()
        return not read or not self._last_was_held

    def _everywhere(self, fine: Tensor) -> Tensor:
        """Whether all processes say so, where each has a piece of the gradients; else all have the same."""
        strategy = self.trainer.strategy
        return strategy.all_reduce(fine.float(), "min") > 0 if strategy.sharded else fine

    def plain_step(self, optimizer: Optimizer, closure: Step | None, **options: Any) -> bool:
        before = Snapshot(optimizer)
        moved = self.trainer.precision_plugin.step(optimizer, closure, **options)
        self._counted.extend(before.put_back_if(self._hold))
        return moved

    def all_finite(self, tensors: list[Tensor]) -> bool:
        return bool(self._finite(tensors).all())

    def _finite(self, tensors: list[Tensor]) -> Tensor:
        """Return whether all of each tensor is finite, as one tensor on the device."""
        if not tensors:
            return torch.ones(1, dtype=torch.bool, device=self._hold.device)
        values = [values_of(tensor) for tensor in tensors]  # a process may have nothing of a small one
        largest = torch._foreach_norm(
            [v if v.numel() else self._hold.new_zeros(1, dtype=v.dtype) for v in values], float("inf")
        )
        return torch.stack([norm.to(self._hold.device).double() for norm in largest]).isfinite()

    def settle(self) -> None:
        unread, self._unread = self._unread, []
        if unread:
            held = torch.stack([update.held for update in unread]).tolist()
            self._last_was_held = held[-1]
            for update, was_held in zip(unread, held, strict=True):
                if was_held:
                    self._hear_of(update)
                else:
                    self.trainer.progress.skipped_in_a_row = 0
        super().settle()

    _last_was_held = False

    def _hear_of(self, update: Unread) -> None:
        for counter, steps in update.counted:
            counter.sub_(steps)
        losses = [(batch_idx, float(loss)) for batch_idx, loss in update.losses]
        flags = zip(update.parameters, update.finite.tolist(), strict=False)
        wrong = next((parameter for parameter, finite in flags if not finite), None)
        self.found(self.fault(losses, wrong, update.step, update.epoch))


class Snapshot:
    """The weights and the state of an optimizer, to come back to."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.weights = [local(parameter.detach()).clone() for parameter in self.parameters]
        self.state = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}

    def now(self) -> list[Tensor]:
        """Return the weights as they are now."""
        return [values_of(parameter.detach()) for parameter in self.parameters]

    @torch.no_grad()
    def put_back(self) -> None:
        """Come back to them."""
        for parameter, before in zip(self.parameters, self.weights, strict=True):
            local(parameter).copy_(before)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)

    @torch.no_grad()
    def put_back_if(self, hold: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Come back to them where a flag of the device says so; return what is on the host, and what was added to it.

        State that is new comes back to zero.
        """
        for parameter, before in zip(map(local, self.parameters), self.weights, strict=True):
            parameter.copy_(torch.where(hold.to(parameter.device), before, parameter))
        counted = []
        for parameter, state in self.optimizer.state.items():
            earlier = self.state.get(parameter, {})
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                value, before = local(value), local(earlier[name] if name in earlier else torch.zeros_like(value))
                if is_on_another_side(value, hold):
                    counted.append((value, value - before))
                else:
                    value.copy_(torch.where(hold.to(value.device), before, value))
        return counted


def is_on_another_side(value: Tensor, flag: Tensor) -> bool:
    """Whether a number is on the host, and a flag of the device could not be used there without waiting for it."""
    return value.device.type == "cpu" and flag.device.type != "cpu"


def values_of(tensor: Tensor) -> Tensor:
    """Return the numbers in a tensor as a dense real one."""
    tensor = local(tensor)
    values: Tensor = tensor._values() if tensor.is_sparse else tensor
    return torch.view_as_real(values) if values.is_complex() else values


def name_of(trainer: Trainer, wanted: Tensor | None) -> str | None:
    """Return the name of a parameter of the module."""
    named = trainer.module.named_parameters(remove_duplicate=False)
    return next((name for name, parameter in named if parameter is wanted), None)


def guard_of(trainer: Trainer, wants_closure: Callable[[Optimizer], bool]) -> Guard | None:
    """Return what a run's nan_policy asks for; None for "off"."""
    if trainer.nan_policy == "off":
        return None
    return (HostGuard if looks_at_memory(trainer.device) else DeviceGuard)(trainer, wants_closure)


def looks_at_memory(device: torch.device) -> bool:
    """Whether this process sees a device's memory without asking it."""
    return device.type == "cpu"
