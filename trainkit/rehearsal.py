"""Rehearsal: train or evaluate a little inside a run, and leave no trace of it.

What comes back, in memory and whatever happens inside:

    the trainer     every attribute: counters, limits, callbacks, loggers, metrics, loaders, flags
    the module      parameters, buffers, tensors that are plain attributes, gradients, training modes, metric objects
    optimizers      their state and their groups
    the precision   the gradient scaler
    random state    of every source, generators that the loaders, the module or the data module hold included
    loaders         those with a state_dict, and the data module's

Numbers, lists and other plain attributes of a Module are its author's: they are not touched.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from trainkit.callback import Callback
from trainkit.data.sources import Clock, Sources
from trainkit.hooks import Hooks
from trainkit.loggers import Logger
from trainkit.metrics import Metrics
from trainkit.module import Module
from trainkit.optim import Schedules
from trainkit.random import isolated_random
from trainkit.signals import Interruption

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

Undo = Callable[[], None]


@contextmanager
def rehearsal(trainer: Trainer, callbacks: Iterable[Callback]) -> Iterator[None]:
    """Lend out a trainer that is in a run: inside, it has these callbacks, no limits, and silent loggers.

    The loops can be called inside (`loop.fit`, `loop.evaluate`, `loop.predict`) on loaders that are asked for anew.
    `Updates` among the callbacks ends training.
    """
    module = trainer.module
    outer = trainer.metrics
    with ExitStack() as stack:
        for undo in (_module(module), *map(_optimizer, trainer.optimizers), _precision(trainer.precision_plugin)):
            stack.callback(undo)
        for undo in _data(trainer):
            stack.callback(undo)
        stack.enter_context(isolated_random())
        stack.callback(lambda: module.attach(trainer, outer))
        stack.callback(_attributes(trainer))

        trainer.callbacks = list(callbacks)
        trainer.loggers = [Muted(logger) for logger in trainer.loggers]
        trainer.max_epochs, trainer.max_steps, trainer.min_epochs, trainer.min_steps = -1, -1, None, None
        trainer.limit_val_batches = trainer.log_every_n_steps = 0
        trainer.progress = replace(trainer.progress, batch=0)
        trainer.should_stop = trainer.is_last_batch = False
        trainer.state = replace(trainer.state)
        trainer.interruption, trainer._since_validation = Interruption(), Clock()
        # who moves schedules by hand finds as many as ever, but none that moves anything
        trainer.lr_scheduler_configs = [replace(c, scheduler=Still(c.scheduler)) for c in trainer.lr_scheduler_configs]
        trainer.schedules = Schedules([], trainer)
        trainer.sources = Sources(trainer, trainer.sources.given, trainer.sources.seed)
        stack.callback(trainer.sources.close)
        trainer.metrics = Metrics(module)
        module.attach(trainer, trainer.metrics)
        trainer.hooks = Hooks(trainer, module, trainer.callbacks)
        yield


def loaders_in(source: Any) -> Iterator[Any]:
    """Yield the loaders of a list, a dict, or anything that combines some."""
    if isinstance(source, Mapping):
        source = list(source.values())
    source = getattr(source, "flattened", source)
    if isinstance(source, (list, tuple)):
        for each in source:
            yield from loaders_in(each)
    elif source is not None:
        yield source


def agreed(trainer: Trainer, value: Any) -> Any:
    """Return the first process's value on all of them."""
    strategy: Any = trainer.strategy
    return value if trainer.world_size == 1 else strategy.broadcast(value)


class Updates(Callback):
    """Stop training after so many updates, counting those that were skipped because the module gave no loss.

    Args:
        most: how many.
        interruption: whose signal stops it, too: that of the run around the rehearsal.
    """

    def __init__(self, most: int, interruption: Interruption) -> None:
        self.most, self.interruption = most, interruption
        self.count = 0
        self._batches = 0

    def updated(self, trainer: Trainer, outputs: Mapping[str, Any]) -> None:
        """Called after each update with what `on_train_batch_end` gets."""

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        self._batches = 0

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches += 1
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.count += 1
            self.updated(trainer, outputs)
        if self.count >= self.most or self.interruption.signal is not None:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        if self._batches == 0:  # the module skips every epoch: no number of them would be enough
            trainer.should_stop = True


class Muted(Logger):
    """Stand in for a logger: it knows where that one writes, and writes nothing."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    name = property(lambda self: self._logger.name)
    version = property(lambda self: self._logger.version)
    save_dir = property(lambda self: self._logger.save_dir)
    root_dir = property(lambda self: self._logger.root_dir)
    log_dir = property(lambda self: self._logger.log_dir)


class Still:
    """Stand in for a learning-rate schedule: it can be read and stepped, and moves nothing."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def step(self, *_: Any, **__: Any) -> None:
        """Stay."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy that is being made has no scheduler yet
            raise AttributeError(name)
        return getattr(self._scheduler, name)


# ---------------------------------------------------------------- what is kept, and how it comes back
def _host_copy(tensor: Tensor) -> Tensor:
    """Return a copy on the host: on an accelerator it would take the memory that the rehearsal is to find out about."""
    return tensor.detach().to("cpu", copy=True)


def _tensor(tensor: Tensor) -> Undo:
    saved = _host_copy(tensor)

    def undo() -> None:
        with torch.no_grad():
            tensor.copy_(saved)

    return undo


def _can_be_written(tensor: Tensor) -> bool:
    expanded = tensor.layout is torch.strided and any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return not (is_lazy(tensor) or tensor.is_meta or tensor.is_inference() or expanded)


def _each(undoes: Iterable[Undo]) -> Undo:
    kept = list(undoes)

    def undo() -> None:
        for one in kept:
            one()

    return undo


def _attributes(owner: Any) -> Undo:
    """Keep which objects an object has as attributes."""
    saved = dict(vars(owner))

    def undo() -> None:
        vars(owner).update(saved)
        for name in vars(owner).keys() - saved.keys():
            del vars(owner)[name]

    return undo


_TORCHS_OWN = set(vars(nn.Module()))  # _parameters, _modules, _forward_hooks, training, ...


def _module(module: nn.Module) -> Undo:
    undo_parts = _each([_part(part) for part in module.modules()])
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, gradient, _ in gradients:
        if gradient is not None:
            parameter.grad = None  # kept as it is: what happens inside gets gradients of its own

    def undo() -> None:
        undo_parts()
        for parameter, gradient, requires_grad in gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    return undo


def _part(part: nn.Module) -> Undo:
    tables: list[dict[str, Any]] = [part._parameters, part._buffers]
    registered = [(table, dict(table)) for table in tables]
    plain = {name: value for name, value in vars(part).items() if name not in _TORCHS_OWN}
    if isinstance(part, Module):
        plain = {name: value for name, value in plain.items() if isinstance(value, Tensor)}
    lists = [(value, list(value)) for value in plain.values() if isinstance(value, list)]  # states of torchmetrics
    tensors = [*plain.values(), *(value for _, table in registered for value in table.values())]
    values = [_tensor(value) for value in tensors if isinstance(value, Tensor) and _can_be_written(value)]
    training = part.training

    def undo() -> None:
        for table, saved in registered:
            table.clear()
            table.update(saved)
        vars(part).update(plain)
        for value, items in lists:
            value[:] = items
        for give_back in values:
            give_back()
        part.training = training

    return undo


def _optimizer(optimizer: Optimizer) -> Undo:
    state = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    other = {
        parameter: {name: copy.deepcopy(value) for name, value in values.items() if not isinstance(value, Tensor)}
        for parameter, values in state.items()
    }
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    tensors = [value for values in (*state.values(), *groups) for value in values.values() if isinstance(value, Tensor)]
    undo_tensors = _each([_tensor(value) for value in tensors])

    def undo() -> None:
        undo_tensors()
        optimizer.state.clear()
        optimizer.state.update({parameter: {**values, **other[parameter]} for parameter, values in state.items()})
        del optimizer.param_groups[len(groups) :]
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.clear()  # in place: schedules hold the groups
            group.update(saved)

    return undo


def _precision(precision: Any) -> Undo:
    undo_attributes, scaler = _attributes(precision), getattr(precision, "scaler", None)
    saved = copy.deepcopy(vars(scaler)) if scaler is not None else {}

    def undo() -> None:
        undo_attributes()
        if scaler is not None:
            vars(scaler).update(saved)

    return undo


def _data(trainer: Trainer) -> Iterator[Undo]:
    """Keep the state of what gives batches: random generators, and loaders and data modules that have a state."""
    given = [*trainer.sources.given.values(), *trainer.sources.objects.values()]
    loaders = list(loaders_in(given))
    owners = [*trainer.module.modules(), trainer.datamodule, *loaders]
    for generator in {id(each): each for owner in owners for each in _generators(owner)}.values():
        yield _generator(generator)
    for owner in (trainer.datamodule, *loaders):
        if callable(getattr(owner, "load_state_dict", None)) and callable(getattr(owner, "state_dict", None)):
            saved = copy.deepcopy(owner.state_dict())
            if saved:
                yield partial(_call, owner.load_state_dict, saved)


def _generators(owner: Any, depth: int = 3) -> Iterator[Any]:
    """Yield the random generators that an object holds, itself or in its loader, sampler or data set."""
    for value in getattr(owner, "__dict__", {}).values():
        if isinstance(value, (torch.Generator, random.Random)) or _is_numpy_generator(value):
            yield value
        elif depth and isinstance(value, (DataLoader, Sampler, Dataset)):
            yield from _generators(value, depth - 1)


def _is_numpy_generator(value: Any) -> bool:
    return type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator")


def _generator(generator: Any) -> Undo:
    if isinstance(generator, torch.Generator):
        return partial(_call, generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(setattr, generator.bit_generator, "state", copy.deepcopy(generator.bit_generator.state))


def _call(function: Callable[[Any], Any], argument: Any) -> None:
    function(argument)
