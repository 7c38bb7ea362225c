"""`Trainer(compile="graph")`: forward and backward, clipping and update of a training step as CUDA graphs.

Graphs        which parts of a run are captured, and what can't be
Step          training_step with its backward: eager, or a replay into tensors that stay where they are
Update        clipping or an optimizer's step, on those gradients
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit.capturing import BatchIndex, CudaRecord, Record, check_logged, explained, signature_of, still
from trainkit.compiling import Recorder
from trainkit.errors import MisconfigurationException, warn
from trainkit.fused import Watch
from trainkit.hooks import is_overridden, takes_iterator
from trainkit.tree import map_tensors

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

Call = Callable[..., Any]

WARM_UP = 3
"""So many steps of one shape run eagerly, as steps of the run, before one is captured."""
MOST_CAPTURES = 5
"""An update whose options change more often than this is not captured any more."""


class Graphs:
    """Capture the training steps of a Trainer's runs.

    Args:
        record: what captures.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.step: Step | None = None

    @classmethod
    def on(cls, device: torch.device) -> Graphs:
        """Return what captures on a cuda device."""
        return cls(CudaRecord(device))

    def attach(self, trainer: Trainer) -> None:
        """Get to know a run whose optimizers are there, and stand before backward, clipping and update.

        Raises:
            MisconfigurationException: the run does what no graph can do; the message says what.
        """
        check(trainer)
        update = trainer.update
        self.step = step = Step(trainer, self.record, update.backward)
        update.backward = step.backward
        if trainer.scaler is not None:  # float16: whether gradients overflowed is read on the host, between the two
            return
        if update.clip is not None and not is_overridden(trainer.module, "configure_gradient_clipping"):
            update.clip = Update(step, update.clip, steps=False)
        update.step = Update(step, update.step, steps=True)

    def training_step(self, step: Call) -> Call:
        """Return the step as the loop calls it."""
        assert self.step is not None
        if self.step.asked:  # the loop has its step; somebody else wants one, to measure with
            return step
        self.step.eager, self.step.asked = step, True
        return self.step

    def close(self) -> None:
        """Give the graphs' memory back, at the end of a run."""
        if self.step is not None:
            self.step.own_gradients()
        self.step = None


def check(trainer: Trainer) -> None:
    """Refuse a run that a graph can't repeat."""
    module = trainer.module
    wrong = [
        f"{type(module).__name__} overrides {name}"
        for name in ("backward", "optimizer_step")
        if is_overridden(module, name)
    ]
    if not module.automatic_optimization:
        wrong.append("automatic_optimization=False: training_step updates the weights itself")
    if takes_iterator(module.training_step):
        wrong.append("training_step takes a dataloader_iter")
    if trainer.update.replay(module.training_step, lambda loss: loss) is not None:
        wrong += [
            f"{type(o).__name__} computes the loss again in its step" for o in trainer.optimizers[:1] if not wrong
        ]
    if trainer.nan_policy != "off":
        wrong.append(f"nan_policy={trainer.nan_policy!r} looks at each update")
    if trainer.detect_anomaly:
        wrong.append("detect_anomaly=True looks at each gradient")
    if trainer.world_size > 1:
        wrong.append("gradients are shared between processes")
    if wrong:
        raise MisconfigurationException(f"compile='graph' can't be used here: {'; '.join(wrong)}. Use compile=True.")


class Captured(NamedTuple):
    """A step in a graph."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    output: Any
    gradients: list[tuple[Tensor, Tensor]]
    """Parameters, each with the tensor that its gradient is in after a replay."""
    calls: list[tuple[Any, ...]]
    """What it logged."""


class Step:
    """`training_step` with its backward.

    Args:
        trainer: whose run.
        record: what captures.
        backward: the eager one.
    """

    def __init__(self, trainer: Trainer, record: Record, backward: Call) -> None:
        self.trainer, self.record, self.eager_backward = trainer, record, backward
        self.eager: Call = backward  # until the loop asks for its step
        self.asked = False
        self.recorder = Recorder(trainer.metrics, trainer)
        self.parameters = list(trainer.module.parameters())
        self.fresh: Captured | None = None
        """For the first batch of a window, whose gradients replace those that were there."""
        self.onto: Captured | None = None
        """For the others, whose gradients are added."""
        self.places: list[Tensor | None] = []
        """Where the first one leaves each parameter's gradient."""
        self.signature: Any = None
        self.state: Any = None
        self.seen = 0
        self.generation = 0
        """How often what was captured was of no use any more."""
        self.done = False  # backward, by the replay
        self._warned = False

    @property
    def captured(self) -> bool:
        """Whether gradients have a place of their own by now."""
        return self.fresh is not None

    def __call__(self, batch: Any, batch_idx: int) -> Any:
        signature, tensors, unfit = signature_of(batch)
        self.done = False
        if unfit is not None or not tensors:
            return self._eagerly(batch, batch_idx, unfit or "it has no tensor")
        state = self._state()
        if state != self.state:  # frozen, unfrozen, moved, or another length of windows: what was captured is of no use
            self.own_gradients()
            self.fresh = self.onto = None
            self.generation += 1
            self.state, self.signature, self.seen = state, None, 0
        if signature != self.signature:
            if self.captured:
                return self._eagerly(batch, batch_idx, None)
            self.signature, self.seen = signature, 0
        self.seen += 1
        fresh = all(parameter.grad is None for parameter in self.parameters)
        if self.seen == WARM_UP + 1 + self.trainer.accumulate_grad_batches and not self.captured:
            warn(
                "compile='graph' captures nothing: gradients are kept from window to window. Let zero_grad set them to "
                "None, as it does by default."
            )
        if self.seen <= WARM_UP or not (fresh or self.captured):
            with getattr(self.record, "warming_up", nullcontext)():
                return self.eager(batch, batch_idx)
        if fresh:
            captured = self.fresh = self.fresh or self._capture(batch, tensors, batch_idx, onto=False)
        else:
            self._put_gradients_in_place()
            captured = self.onto = self.onto or self._capture(batch, tensors, batch_idx, onto=True)
        torch._foreach_copy_(captured.inputs, tensors)
        captured.replay()
        return self._handed_out(captured)

    def backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        """Add the loss's gradients to the parameters', unless a replay has done so."""
        if self.done:
            self.done = False
        else:
            self.eager_backward(loss, *arguments, **keywords)

    def own_gradients(self) -> None:
        """Move pending gradients out of the graphs' memory."""
        if self.captured:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def in_place(self) -> bool:
        """Whether the gradients that are there are those which replays write, and no others."""
        if self.fresh is None:
            return False
        return all(parameter.grad is place for parameter, place in zip(self.parameters, self.places, strict=True))

    def _eagerly(self, batch: Any, batch_idx: int, why: str | None) -> Any:
        if why is not None and not self._warned:
            self._warned = True
            warn(f"compile='graph': a batch runs uncaptured: {why}. A graph takes plain containers of dense tensors.")
        return self.eager(batch, batch_idx)

    def _state(self) -> tuple[Any, ...]:
        """Return what of the module a graph depends on."""
        module = self.trainer.module
        return (
            self.trainer.accumulate_grad_batches,
            [(parameter.requires_grad, parameter.data_ptr()) for parameter in self.parameters],
            [buffer.data_ptr() for buffer in module.buffers()],
            [part.training for part in module.modules()],
        )

    def _put_gradients_in_place(self) -> None:
        """Copy the gradients of a batch that ran eagerly to where replays add theirs."""
        assert self.fresh is not None
        for parameter, gradient in self.fresh.gradients:
            if parameter.grad is None:
                parameter.grad = gradient.zero_()
            elif parameter.grad is not gradient:
                parameter.grad = gradient.copy_(parameter.grad)

    def _capture(self, batch: Any, tensors: list[Tensor], batch_idx: int, onto: bool) -> Captured:
        static = {id(tensor): tensor.detach().clone() for tensor in tensors}
        inputs = map_tensors(lambda value: static[id(value)] if isinstance(value, Tensor) else value, batch)
        accumulate, calls = self.trainer.accumulate_grad_batches, self.recorder.calls

        def whole() -> Any:
            if not onto:
                for parameter in self.parameters:
                    parameter.grad = None
            output = self.eager(inputs, BatchIndex(batch_idx))
            loss = output["loss"] if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor):
                raise MisconfigurationException(
                    "compile='graph': training_step must return the loss of every batch. Received: "
                    f"{type(loss).__name__}."
                )
            self.eager_backward(loss / accumulate if accumulate > 1 else loss)
            gradients = [parameter.grad for parameter in self.parameters]
            noted, self.recorder.calls = self.recorder.calls, calls
            return map_tensors(_detached, output), gradients, noted

        try:
            with still(self.trainer, self.recorder):
                (output, gradients, noted), replay = self.record(whole)
            check_logged(noted, self.parameters[0].device)
        except (RuntimeError, MisconfigurationException) as error:
            raise explained(error) from error
        if not onto:
            self.places = gradients
        pairs: list[tuple[Tensor, Tensor]] = [
            (p, gradient) for p, gradient in zip(self.parameters, gradients, strict=True) if gradient is not None
        ]
        return Captured(replay, [static[id(tensor)] for tensor in tensors], output, pairs, noted)

    def _handed_out(self, captured: Captured) -> Any:
        """Return a replay's output as the loop knows it, in memory that the next replay does not write."""
        for parameter, gradient in captured.gradients:
            parameter.grad = gradient
        output = map_tensors(lambda value: value.clone() if isinstance(value, Tensor) else value, captured.output)
        loss = output["loss"] if isinstance(output, Mapping) else output
        loss.requires_grad_()  # as the loop wants it; its backward is done
        self.done = True
        if captured.calls:
            self.recorder.calls = list(captured.calls)
            self.recorder.flush()
        return output


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class Rate:
    """A learning rate on the device, where a captured update reads it."""

    def __init__(self, rate: float, device: torch.device) -> None:
        self.used, self.tensor = rate, torch.tensor(float(rate), device=device)


class Graph(NamedTuple):
    """A captured clipping or update."""

    depends: Any
    replay: Callable[[], None]
    rates: list[Rate]
    state: list[Tensor]
    """What it updates beside the weights; kept, so that nothing else can come to lie there."""


class Update:
    """Clipping, or an optimizer's step: captured once gradients are where replays write them.

    Args:
        step: says where gradients are.
        eager: what is captured.
        steps: whether it is the optimizer's step.
    """

    def __init__(self, step: Step, eager: Call, steps: bool) -> None:
        self.step, self.eager, self.steps = step, eager, steps
        self.graphs: dict[int, Graph] = {}
        self.captures: dict[int, int] = {}

    def __call__(self, optimizer: Optimizer, *arguments: Any, **keywords: Any) -> Any:
        key, count = id(optimizer), self.captures.get(id(optimizer), 0)
        if arguments or keywords or count > MOST_CAPTURES or not self._may_be_captured(optimizer):
            return self.eager(optimizer, *arguments, **keywords)
        depends, graph = self._depends(optimizer), self.graphs.get(key)
        if graph is None or graph.depends != depends:
            self.captures[key] = count + 1
            graph = self.graphs[key] = self._capture(optimizer, depends)
        for group, rate in zip(optimizer.param_groups, graph.rates, strict=False):
            if rate.used != group["lr"]:
                rate.used = group["lr"]
                rate.tensor.fill_(rate.used)
        graph.replay()
        return True

    def _may_be_captured(self, optimizer: Optimizer) -> bool:
        if not self.step.in_place():
            return False
        before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        hooks = after or any(not isinstance(getattr(h, "__self__", None), Watch) for h in before.values())
        fused = all(group.get("fused") for group in optimizer.param_groups)
        return not self.steps or bool(fused and not hooks and _has_state(optimizer))

    def _depends(self, optimizer: Optimizer) -> Any:
        """Return what a graph of the update depends on."""
        trainer = self.step.trainer
        if not self.steps:
            return self.step.generation, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        names = [name for name in optimizer.defaults if name not in ("lr", "capturable")]
        groups = [(len(group["params"]), [group.get(name) for name in names]) for group in optimizer.param_groups]
        return self.step.generation, groups, list(map(id, _state_of(optimizer)))

    def _capture(self, optimizer: Optimizer, depends: Any) -> Graph:
        if not self.steps:
            return Graph(depends, self.step.record(lambda: self.eager(optimizer))[1], [], [])
        groups, device = optimizer.param_groups, self.step.parameters[0].device
        names = ["lr", "capturable"]
        before = [{name: group[name] for name in names if name in group} for group in groups]
        rates = [Rate(group["lr"], device) for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group.update({name: rate.tensor if name == "lr" else True for name in names if name in group})
            _, replay = self.step.record(lambda: self.eager(optimizer))
        finally:
            for group, own in zip(groups, before, strict=True):
                group.update(own)  # schedules, monitors and checkpoints see a number, as ever
        return Graph(depends, replay, rates, _state_of(optimizer))


def _state_of(optimizer: Optimizer) -> list[Tensor]:
    return [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]


def _has_state(optimizer: Optimizer) -> bool:
    """Whether an optimizer has made its state, as it does in its first step."""
    if not any("betas" in group or group.get("momentum") for group in optimizer.param_groups):
        return True
    learning = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(optimizer.state.get(parameter) for parameter in learning)
