"""Precision: which dtype the parameters, the step and the gradients have.

`Precision` is plain float32 and costs nothing; a subclass overrides what differs. `PRECISIONS` knows them by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

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
        precision: "16-mixed" or "bf16-mixed".
        device: the type of device autocast runs for; None takes that of the run.
        scaler: the gradient scaler to use; None makes torch's default one for float16. bfloat16 needs none.

    Raises:
        MisconfigurationException: another precision, or a scaler for bfloat16.
    """

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"],
        device: str | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        dtypes = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
        if precision not in dtypes:
            raise MisconfigurationException(
                f'MixedPrecision: precision must be "16-mixed" or "bf16-mixed". Received: {precision!r}.'
            )
        if precision == "bf16-mixed" and scaler is not None:
            raise MisconfigurationException(
                f"MixedPrecision: bfloat16 has float32's range and needs no scaler. Received: scaler={scaler!r}. Use "
                '"16-mixed", or leave the scaler out.'
            )
        self.dtype = dtypes[precision]
        self.scaler = scaler
        self.precision = precision
        self.device = device
        self._device_type = device or "cpu"
        self._stepped = False
        self._unscaled: set[int] = set()  # optimizers, by id, whose gradients of this step are true already
        self._watched: list[RemovableHandle] = []

    def wrap(self, step: Step) -> Step:
        wrapped: Step = torch.autocast(self._device_type, self.dtype)(step)
        return wrapped

    def attach(self, optimizers: list[Optimizer], device: torch.device) -> None:
        self._device_type = self.device or device.type
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


TRUE_DTYPES: dict[str, tuple[torch.dtype, Callable[[nn.Module], nn.Module]]] = {
    "bf16-true": (torch.bfloat16, nn.Module.bfloat16),
    "16-true": (torch.float16, nn.Module.half),
    "64-true": (torch.float64, nn.Module.double),
}


class TruePrecision(Precision):
    """Parameters, floating-point inputs and new tensors all have one dtype.

    Args:
        precision: "bf16-true", "16-true" or "64-true".

    Raises:
        MisconfigurationException: another precision.
    """

    def __init__(self, precision: Literal["bf16-true", "16-true", "64-true"]) -> None:
        if precision not in TRUE_DTYPES:
            raise MisconfigurationException(
                f"{type(self).__name__}: precision must be one of {', '.join(map(repr, TRUE_DTYPES))}. "
                f"Received: {precision!r}."
            )
        self.precision = precision
        self.dtype, self._cast = TRUE_DTYPES[precision]

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


class HalfPrecision(TruePrecision):
    """Everything in 16 bits.

    Args:
        precision: "16-true" or "bf16-true".
    """

    def __init__(self, precision: Literal["bf16-true", "16-true"] = "16-true") -> None:
        super().__init__(precision)


class DoublePrecision(TruePrecision):
    """Everything in float64."""

    def __init__(self) -> None:
        super().__init__("64-true")


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer can't step without recomputing the loss, as LBFGS can't."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


PRECISIONS: dict[str, Callable[[], Precision]] = {
    "32-true": Precision,
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed"),
    "16-mixed": lambda: MixedPrecision("16-mixed"),
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
    "64-true": DoublePrecision,
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
