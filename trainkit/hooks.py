"""Hooks: who answers at each hook of a run, worked out once, so that a step looks nothing up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from trainkit.callback import Callback
from trainkit.errors import MisconfigurationException
from trainkit.timing import Spent

if TYPE_CHECKING:
    from trainkit.module import Module
    from trainkit.trainer import Trainer

Call = Callable[..., Any]

# What each hook is called with after (trainer, module). In firing order; the batch hooks of the evaluations end in
# dataloader_idx, which a method may leave out.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "on_fit_start": (),
    "on_sanity_check_start": (),
    "on_sanity_check_end": (),
    "on_train_start": (),
    "on_train_epoch_start": (),
    "on_train_batch_start": ("batch", "batch_idx"),
    "on_before_zero_grad": ("optimizer",),
    "on_before_backward": ("loss",),
    "on_after_backward": (),
    "on_before_optimizer_step": ("optimizer",),
    "on_train_batch_end": ("outputs", "batch", "batch_idx"),
    "on_save_point": (),
    "on_train_epoch_end": (),
    "on_train_end": (),
    "on_fit_end": (),
    **{
        f"on_{stage}_{event}": arguments
        for stage in ("validation", "test", "predict")
        for event, arguments in {
            "start": (),
            "epoch_start": (),
            "batch_start": ("batch", "batch_idx", "dataloader_idx"),
            "batch_end": ("outputs", "batch", "batch_idx", "dataloader_idx"),
            "epoch_end": (),
            "end": (),
        }.items()
    },
    "on_save_checkpoint": ("checkpoint",),
    "on_exception": ("exception",),
    "setup": ("stage",),
    "teardown": ("stage",),
}
CALLBACK_ONLY = {"on_sanity_check_start", "on_sanity_check_end", "on_save_point", "on_exception"}


def nobody(*_: Any) -> None:
    """Answer for a hook that nobody overrides."""


def _first(method: Call, count: int, *arguments: Any) -> Any:
    """Call a method with the first arguments only."""
    return method(*arguments[:count])


Calls = tuple[tuple[Call, Spent], ...]


def _each(trainer: Trainer, name: str, calls: Calls, *arguments: Any) -> None:
    """Call all; meanwhile `log` knows in which hook it is called. What they return, a tensor perhaps, is not read."""
    metrics = trainer.metrics
    before, metrics.hook = metrics.hook, name
    began = perf_counter()
    try:
        for call, spent in calls:
            call(*arguments)
            ended = perf_counter()
            spent.seconds += ended - began
            began = ended
    finally:
        metrics.hook = before


def _each_may_skip(trainer: Trainer, name: str, calls: Calls, *arguments: Any) -> int | None:
    """Call all, and return -1 when any of them did: the rest of the epoch is skipped."""
    metrics, skip = trainer.metrics, None
    before, metrics.hook = metrics.hook, name
    began = perf_counter()
    try:
        for call, spent in calls:
            answer = call(*arguments)
            ended = perf_counter()
            spent.seconds += ended - began
            began = ended
            if isinstance(answer, int) and answer == -1:
                skip = -1
    finally:
        metrics.hook = before
    return skip


@dataclass(frozen=True)
class Evaluation:
    """The hooks of one kind of evaluation."""

    start: Call
    epoch_start: Call
    batch_start: Call
    batch_end: Call
    epoch_end: Call
    end: Call


class Hooks:
    """The calls a run makes, an attribute for each hook.

    A hook nobody overrides is one shared no-op; the answers to the others are called in turn: the callbacks as
    listed, then the module. `print(hooks)` shows who answers where.

    Raises:
        TypeError: a method can't be called with what its hook passes; the message has both lists.
    """

    def __init__(self, trainer: Trainer, module: Module, callbacks: Sequence[Callback]) -> None:
        self.answers: dict[str, list[str]] = {}
        self._build_for = partial(self._build, trainer=trainer, module=module, callbacks=callbacks)
        for name in ARGUMENTS:
            setattr(self, name, self._build_for(name))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Call: ...

    def _build(
        self, name: str, trainer: Trainer, module: Module, callbacks: Sequence[Callback], loaders: int = 1
    ) -> Call:
        answering = [callback for callback in callbacks if overrides(callback, name, Callback)]
        # who watches a metric hears of an epoch's end after the module could still log
        late = [c for c in answering if c.monitors] if name == "on_train_epoch_end" else []
        owners: list[Any] = [callback for callback in answering if callback not in late]
        if name not in CALLBACK_ONLY and is_overridden(module, name):
            owners.append(module)
        owners += late
        calls: list[Call] = [
            checked(getattr(owner, name), name, loaders)
            if owner is module
            else partial(checked(getattr(owner, name), name, loaders, ("trainer", "pl_module")), trainer, module)
            for owner in owners
        ]
        self.answers[name] = [type(owner).__name__ for owner in owners]
        if (actions := trainer.actions) is not None:
            kinds = [
                f"[Callback]{o.state_key}" if o is not module else f"[LightningModule]{type(o).__name__}"
                for o in owners
            ]
            calls = [actions.wrap(f"{kind}.{name}", call) for kind, call in zip(kinds, calls, strict=True)]
        call_all = _each_may_skip if name == "on_train_batch_start" else _each
        spent = [trainer.timing.spent_by(owner, name) for owner in owners]
        call: Call = partial(call_all, trainer, name, tuple(zip(calls, spent, strict=True))) if calls else nobody
        return call if actions is None else actions.span(name, call)

    def evaluation(self, stage: str, loaders: int) -> Evaluation:
        """Return the hooks of "validation", "test" or "predict" under names without the stage.

        Args:
            stage: which of them.
            loaders: how many loaders it goes through; with one, hooks are called without a dataloader_idx.
        """
        calls = {event: getattr(self, f"on_{stage}_{event}") for event in Evaluation.__annotations__}
        if loaders > 1:
            for event in ("batch_start", "batch_end"):
                calls[event] = self._build_for(f"on_{stage}_{event}", loaders=loaders)
        return Evaluation(**calls)

    def __str__(self) -> str:
        width = max(map(len, self.answers))
        return "\n".join(f"{name:<{width}}  {', '.join(names) or '-'}" for name, names in self.answers.items())


def announced(trainer: Trainer, name: str, call: Call) -> Call:
    """Return a call that tells `log` in which of the module's methods it is called."""

    def announce(*arguments: Any, **keywords: Any) -> Any:
        metrics = trainer.metrics
        before, metrics.hook = metrics.hook, name
        try:
            return call(*arguments, **keywords)
        finally:
            metrics.hook = before

    return announce


def overrides(owner: object, name: str, base: type) -> bool:
    """Whether an object has a method of its own where its base class only has the empty one."""
    method = getattr(owner, name)
    return getattr(method, "__func__", method) is not getattr(base, name)


BASES = ("trainkit.module", "trainkit.datamodule", "trainkit.data_hooks")
"""Where the classes are whose methods are nobody's own."""


def is_overridden(owner: object, name: str) -> bool:
    """Whether the user's Module or DataModule, or one of its bases above trainkit's, has this method of its own."""
    method = getattr(owner, name, None)
    if method is None:
        return False
    function = getattr(method, "__func__", method)
    classes = (owner if isinstance(owner, type) else type(owner)).__mro__
    return all(function is not vars(cls).get(name) for cls in classes if cls.__module__ in BASES)


def accepts(method: Call, count: int) -> bool:
    """Whether a method can be called with that many positional arguments."""
    try:
        inspect.signature(method).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # builtins without a signature
        return True
    return True


def checked(method: Call, name: str, loaders: int = 1, prefix: tuple[str, ...] = ()) -> Call:
    """Return the method as its hook can call it, with or without a dataloader_idx."""
    arguments = (*prefix, *ARGUMENTS[name])
    return fitted(method, name, arguments, len(arguments) - ("dataloader_idx" in arguments), loaders)


def fitted(method: Call, name: str, arguments: tuple[str, ...], least: int, loaders: int = 1) -> Call:
    """Return a call that takes all the arguments and hands on as many as the method takes, at least so many.

    With one loader a last argument `dataloader_idx` is handed on only to a method that can't do without.
    """
    counts = list(range(len(arguments), least - 1, -1))
    if loaders == 1 and arguments[-1:] == ("dataloader_idx",):
        counts[:2] = reversed(counts[:2])
    for count in counts:
        if accepts(method, count):
            return method if count == len(arguments) else partial(_first, method, count)
    owner = type(getattr(method, "__self__", None)).__name__
    takes = ", ".join(inspect.signature(method).parameters)
    raise TypeError(f"{owner}.{name} takes ({takes}) but is called with ({', '.join(arguments)}).")


def takes_iterator(step: Call) -> bool:
    """Whether a step is written as `training_step(self, dataloader_iter)`: it takes its batch itself."""
    return "dataloader_iter" in inspect.signature(step).parameters


def with_iterator(step: Call, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
    """Call such a step with an iterator, whose `next` is the step's batch, its index and its loader's."""
    return step(_one(batch, batch_idx, dataloader_idx))


def _one(*item: Any) -> Iterator[Any]:
    yield item
    raise MisconfigurationException(
        "a step took a second item from its dataloader_iter. There is one for each step: (batch, batch_idx, "
        "dataloader_idx). To see several batches at once, let the loader make larger ones."
    )
