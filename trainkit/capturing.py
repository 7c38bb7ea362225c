"""What a step may not do while it is captured: a graph repeats what the device did, and nothing that python did.

Whatever would silently stay as it was at the capture is refused here, with its name and what to do instead.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainkit.errors import MisconfigurationException
from trainkit.random import numpy_random
from trainkit.tree import children

if TYPE_CHECKING:
    from trainkit.compiling import Recorder
    from trainkit.trainer import Trainer

CHANGING = frozenset(
    (
        "batch_idx", "callback_metrics", "current_epoch", "estimated_stepping_batches", "global_step", "is_last_batch",
        "log_step", "logged_metrics", "logger", "loggers", "lr_scheduler_configs", "metrics", "optimizers", "progress",
        "progress_bar_metrics", "should_stop", "step_optimizers",
    )
)  # fmt: skip
"""What of a trainer is another in each step."""


def refused(what: str, instead: str) -> MisconfigurationException:
    """Return the error for a step that can't be captured."""
    return MisconfigurationException(
        f"compile='graph': training_step {what}, which a graph can't repeat: it would stay as it was in one step. "
        f"{instead} Or use compile=True."
    )


class StillTrainer:
    """Stand in for the trainer during a capture: what changes from step to step can't be read."""

    def __init__(self, trainer: Trainer, recorder: Recorder) -> None:
        self.__dict__.update(_trainer=trainer, print=recorder.print)

    def __getattr__(self, name: str) -> Any:
        if name in CHANGING:
            raise refused(f"reads trainer.{name}", "Read it in on_train_batch_start or on_train_batch_end.")
        return getattr(self._trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise refused(f"sets trainer.{name}", "Set it in on_train_batch_end.")


class BatchIndex(int):
    """A batch's index that can be passed on, and not be computed with."""


def _no_number(self: BatchIndex, *_: Any) -> Any:
    raise refused("computes with batch_idx", "Leave it out, or do so in on_train_batch_start or on_train_batch_end.")


for _name in (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
    "__rmul__", "__truediv__", "__rtruediv__", "__floordiv__", "__mod__", "__rmod__", "__divmod__", "__pow__",
    "__bool__", "__index__", "__float__", "__int__", "__neg__", "__abs__", "__format__", "__str__", "__repr__",
    "__hash__",
):  # fmt: skip
    setattr(BatchIndex, _name, _no_number)


def signature_of(batch: Any) -> tuple[Any, list[Tensor], str | None]:
    """Return what two batches must share to go through one graph, and a batch's tensors in order.

    Returns:
        structure, shapes and values that are no tensors; the tensors; and what makes the batch unfit, None for nothing.
    """
    tensors: list[Tensor] = []
    unfit: list[str] = []

    def of(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            same = next((i for i, other in enumerate(tensors) if other is value), len(tensors))
            tensors.append(value)
            if value.layout is not torch.strided or value.is_quantized:
                unfit.append(f"{where} is not a dense tensor")
                return None
            return same, value.shape, value.stride(), value.dtype, value.device
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return type(value), value
        held = children(value)
        if held is None:
            unfit.append(f"{where} is a {type(value).__name__}")
            return None
        keys = tuple(value) if isinstance(value, Mapping) else range(len(held))
        parts = [of(item, f"{where}[{key!r}]") for key, item in zip(keys, held, strict=True)]
        return type(value), tuple(keys), tuple(parts)

    return of(batch, "batch"), tensors, unfit[0] if unfit else None


@contextmanager
def nothing_but_tensors(module: nn.Module) -> Iterator[None]:
    """Refuse code that changes python's own state: attributes of the module or its parts, or random sources."""
    attributes, draws = _attributes(module), _host_random()
    yield
    for (where, name), (value, identity, size) in _attributes(module).items():
        _, identity_before, size_before = attributes.get((where, name), (None, None, None))
        if identity != identity_before or size != size_before:
            place = ".".join(part for part in (where, name) if part)
            kind = "a metric object" if hasattr(value, "compute") or _is_metric(module, where) else "an attribute"
            raise refused(f"changes self.{place}, {kind} of the module", "Do that in on_train_batch_end.")
    if _host_random() != draws:
        raise refused("draws random numbers from python's random or numpy", "Draw them with torch, on the device.")


def _is_metric(module: nn.Module, where: str) -> bool:
    return bool(where) and hasattr(module.get_submodule(where), "compute")


def _attributes(module: nn.Module) -> dict[tuple[str, str], tuple[Any, int, int | None]]:
    """Return what every part of a module holds, by identity; containers with how much they hold."""
    found = {}
    for where, part in module.named_modules():
        plain = {name: value for name, value in vars(part).items() if not name.startswith(("_trainer", "_run_metrics"))}
        for name, value in {**plain, **part._parameters, **part._buffers}.items():
            sized = isinstance(value, (list, dict, set)) and not name.startswith("_")
            found[where, name] = value, id(value), len(value) if sized else None
    return found


def _host_random() -> tuple[Any, ...]:
    kind, keys, *rest = numpy_random().get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def check_logged(calls: list[tuple[Any, ...]], device: torch.device) -> None:
    """Refuse to log in a captured step what is not on the device: it is not there anew after each replay."""
    for _, name, value, *_ in (call for call in calls if call[0] is None):
        if not isinstance(value, Tensor) or value.device != device:
            what = f"logs {name!r}, which is no tensor of the device but a {type(value).__name__}"
            raise refused(what, "Log it in on_train_batch_end, or compute it as a tensor on the device.")


def explained(error: BaseException) -> BaseException:
    """Return what to raise when torch could not capture a step."""
    first = error
    while first.__context__ is not None and not isinstance(first, MisconfigurationException):
        first = first.__context__  # leaving a capture that has failed fails, too
    if isinstance(first, MisconfigurationException):
        return first
    line = next((line.strip() for line in str(first).splitlines() if line.strip()), type(first).__name__)
    return MisconfigurationException(
        f"compile='graph': training_step could not be captured: {line}. A captured step may not wait for the device, "
        "as .item(), float(tensor), print(tensor), `if tensor:`, tensor[mask] and nonzero() do, nor bring data to it, "
        "as torch.tensor(..., device='cuda') does. Do such things in on_train_batch_end, or use compile=True."
    )


@contextmanager
def still(trainer: Trainer, recorder: Recorder) -> Iterator[None]:
    """Let a module see a trainer that stands still, and note what it logs."""
    module: Any = trainer.module
    module.attach(StillTrainer(trainer, recorder), recorder)
    recorder.noting = True
    try:
        with nothing_but_tensors(module):
            yield
    finally:
        recorder.noting = False
        module.attach(trainer, recorder)


Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Capture a function: return what it returned, whose tensors stay where they are, and what repeats it into them."""


class CudaRecord:
    """Capture functions as CUDA graphs, all in one pool of memory and on one stream of their own.

    Args:
        device: a cuda device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool: Any = None

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run eagerly on the stream that will be captured, so that autograd's accumulators belong to it."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.collect()
        gc.disable()  # memory of the device that is given back in the middle would end the capture
        try:
            # a thread that writes a checkpoint or pins memory may go on meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                returned = function()
        finally:
            if collects:
                gc.enable()
        if self.pool is None:
            self.pool = graph.pool()
        return returned, graph.replay
