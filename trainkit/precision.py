"""Precision: which dtype the parameters, the step and the gradients have.

`Precision` is plain float32 and costs nothing; a subclass overrides what differs. `PRECISIONS` knows them by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from trainkit.errors import MisconfigurationException
from trainkit.tree import map_tensors

Step = Callable[..., Any]


class Precision:
    """What the loop asks of a precision. This one is `32-true`: the step as it is."""

    precision = "32-true"
    """Its name, as `Trainer(precision=...)` takes it."""

    def init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new parameters have the precision's dtype."""
        return nullcontext()

    def convert_module(self, module: nn.Module) -> None:
        """Change the parameters' dtype, before optimizers are made."""

    def wrap(self, step: Step) -> Step:
        """Return the step as it runs in this precision; called once a run."""
        return step

    def attach(self, optimizers: list[Optimizer], device: torch.device) -> None:
        """Get to know the run's optimizers, before the first step."""

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss that backward starts from."""
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the loss's gradients to the parameters'."""
        self.scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """Make the optimizer's gradients true ones, before anybody clips or looks at them."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **options: Any) -> bool:
        """Update the weights and return whether they moved.

        Args:
            optimizer: whose parameters.
            closure: computes the loss and its true gradients; the optimizer may call it more than once.
            options: for the optimizer's own `step`.
        """
        if closure is None:
            optimizer.step(**options)
        else:
            optimizer.step(closure, **options)
        return True

    def update(self) -> None:
        """Adapt to how the step went, after every optimizer of the batch has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class MixedPrecision(Precision):
    """Autocast around the step; float16 with a gradient scaler.

    Parameters stay float32. The scaler multiplies the loss so that small gradients survive float16, and holds an
    update back when a gradient overflowed (Micikevicius et al., Mixed Precision Training, ICLR 2018).

    Args:
        dtype: torch.bfloat16 or torch.float16.
        scaler: the gradient scaler to use; None makes torch's default one for float16 and none for bfloat16.
    """

    def __init__(self, dtype: torch.dtype, scaler: torch.amp.GradScaler | None = None) -> None:
        self.dtype = dtype
        self.scaler = scaler
        self.precision = "bf16-mixed" if dtype is torch.bfloat16 else "16-mixed"
        self._device_type = "cpu"
        self._stepped = False
        self._unscaled: set[int] = set()  # optimizers, by id, whose gradients of this step are true already
        self._watched: list[RemovableHandle] = []

    def wrap(self, step: Step) -> Step:
        wrapped: Step = torch.autocast(self._device_type, self.dtype)(step)
        return wrapped

    def attach(self, optimizers: list[Optimizer], device: torch.device) -> None:
        self._device_type = device.type
        if self.dtype is not torch.float16:
            return
        if self.scaler is None:
            self.scaler = torch.amp.GradScaler(device.type)
        while self._watched:
            self._watched.pop().remove()
        # the scaler leaves the optimizer alone when a gradient overflowed, and does not say so
        self._watched = [optimizer.register_step_post_hook(self._note_step) for optimizer in optimizers]

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def scale(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        if self.scaler is not None and id(optimizer) not in self._unscaled:
            self._unscaled.add(id(optimizer))
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **options: Any) -> bool:
        if self.scaler is None:
            return super().step(optimizer, closure, **options)
        if closure is not None and needs_closure(optimizer):
            raise MisconfigurationException(
                f"precision={self.precision!r} can't run {type(optimizer).__name__}: the scaler must see the gradients "
                'before the update, and this optimizer makes them while it updates. Use precision="bf16-mixed".'
            )
        if closure is not None:
            closure()
        self._stepped = False
        self.scaler.step(optimizer, **options)
        return self._stepped

    def update(self) -> None:
        if self.scaler is not None and self._unscaled:  # else no optimizer has stepped: there is nothing to learn from
            self._unscaled.clear()
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


class TruePrecision(Precision):
    """Parameters, floating-point inputs and new tensors all have one dtype.

    Args:
        dtype: torch.bfloat16, torch.float16 or torch.float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.precision, self._cast = {
            torch.bfloat16: ("bf16-true", nn.Module.bfloat16),
            torch.float16: ("16-true", nn.Module.half),
            torch.float64: ("64-true", nn.Module.double),
        }[dtype]

    @contextmanager
    def init_context(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def convert_module(self, module: nn.Module) -> None:
        self._cast(module)  # module.to(dtype) would drop the imaginary part of complex parameters

    def wrap(self, step: Step) -> Step:
        dtype = self.dtype

        def convert(value: Any) -> Any:
            tensor = value.data if isinstance(value, PackedSequence) else value
            return value.to(dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else value

        @functools.wraps(step)
        def run(batch: Any, *args: Any) -> Any:
            with self.init_context():
                return step(map_tensors(convert, batch), *args)

        return run


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer can't step without recomputing the loss, as LBFGS can't."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


PRECISIONS: dict[str, Callable[[], Precision]] = {
    "32-true": Precision,
    "bf16-mixed": lambda: MixedPrecision(torch.bfloat16),
    "16-mixed": lambda: MixedPrecision(torch.float16),
    "bf16-true": lambda: TruePrecision(torch.bfloat16),
    "16-true": lambda: TruePrecision(torch.float16),
    "64-true": lambda: TruePrecision(torch.float64),
}
ALIASES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def precision_of(given: str | int | Precision | None) -> Precision:
    """Return the precision with that name, or the object itself; None is `32-true`.

    Raises:
        MisconfigurationException: no precision has that name; the message lists those that exist.
    """
    if isinstance(given, Precision):
        return given
    name = "32-true" if given is None else str(given)
    name = ALIASES.get(name, name)
    if isinstance(given, bool) or name not in PRECISIONS:
        known = ", ".join(repr(n) for n in PRECISIONS)
        raise MisconfigurationException(f"precision must be one of {known} or a Precision object. Received: {given!r}.")
    return PRECISIONS[name]()
