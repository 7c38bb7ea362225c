"""What a resumed run needs, all of it, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trainkit.errors import CheckpointError
from trainkit.fused import lay_state
from trainkit.random import random_state, set_random_state

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from trainkit.callback import Callback
    from trainkit.trainer import Trainer


class Stateful(Protocol):
    """Anything with state: what goes into a checkpoint and comes back from it."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


MOSTLY_ZERO = ("skipped", "skipped_in_a_row", "validating")
"""Counters that are left out of a checkpoint while they are zero."""


@dataclass
class Progress:
    """Where a run is. Every number counts finished things, so a checkpoint needs no repair on resume."""

    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Batches finished in the epoch that is running; 0 between epochs."""
    step: int = 0
    """Optimizer updates done, one for each batch that ends an accumulation window."""
    total_batch: int = 0
    """Batches finished in all epochs together."""
    window: int = 0
    """Accumulation windows finished, whether or not they updated the weights: Lightning's x axis."""
    skipped: int = 0
    """Updates that `nan_policy="skip"` skipped; `step` counts them, too."""
    skipped_in_a_row: int = 0
    """Those since the last one that was made."""
    validating: int = 0
    """The validation after the last batch is due, a signal cut it short: 1 inside an epoch, 2 at its end."""

    def state_dict(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value or name not in MOSTLY_ZERO}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name in asdict(self):
            setattr(self, name, int(state.get(name, state["step"] if name == "window" else 0)))


class Each:
    """Several stateful things under one name, told apart by their order."""

    def __init__(self, what: str, parts: Iterable[Stateful]) -> None:
        self.what, self.parts = what, list(parts)

    def state_dict(self) -> list[Any]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[Any]) -> None:
        if len(state) != len(self.parts):
            raise CheckpointError(
                f"the checkpoint has {len(state)} {self.what}, configure_optimizers returned {len(self.parts)}."
            )
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


WAYS = ("foreach", "fused", "capturable")
"""Options of an optimizer that say how an update is computed, not what it is: a run's own and not its checkpoint's."""


class Updating:
    """An optimizer, whose checkpoint may be of a run that computed its updates in another way."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.optimizer.param_groups
        if len(own) == len(state["param_groups"]):  # else it is torch's to say so
            ways = [{way: group[way] for way in WAYS if way in group} for group in own]
            state = {
                **state,
                "param_groups": [{**saved, **way} for saved, way in zip(state["param_groups"], ways, strict=True)],
            }
        self.optimizer.load_state_dict(state)
        lay_state(self.optimizer)


class ByKey:
    """The callbacks' states, told apart by their `state_key`; a callback that was not there keeps its fresh state."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)

    def state_dict(self) -> dict[str, Any]:
        states = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            if callback.state_key in state:
                callback.load_state_dict(state[callback.state_key])


class RandomState:
    """Every random source of the process."""

    def state_dict(self) -> dict[str, Any]:
        return random_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_random_state(state)


class Switches:
    """Which parameters and parts of a module were switched since training began: frozen or not, in which mode.

    Neither is in a module's state_dict. A hook such as `on_train_epoch_start` that freezes the backbone for an epoch
    is not called again when a run goes on inside of it. What was so when training began is the user's code's affair.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._began: dict[str, dict[str, bool]] = {}

    def begin(self, module: nn.Module, switched: Mapping[str, Mapping[str, bool]]) -> None:
        """Note how the module begins, and switch what was switched in the run that it goes on from."""
        self._module, self._began = module, _switches(module)
        things = {"requires_grad": dict(module.named_parameters()), "training": dict(module.named_modules())}
        for attribute, values in switched.items():
            for name, value in values.items():
                if name in things[attribute]:
                    setattr(things[attribute][name], attribute, value)

    def state_dict(self) -> dict[str, dict[str, bool]]:
        """Return what was switched; nothing where nobody did."""
        if self._module is None:
            return {}
        found = {}
        for attribute, values in _switches(self._module).items():
            began = self._began[attribute]
            if switched := {name: value for name, value in values.items() if began.get(name, value) != value}:
                found[attribute] = switched
        return found


def _switches(module: nn.Module) -> dict[str, dict[str, bool]]:
    return {
        "requires_grad": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "training": {name: part.training for name, part in module.named_modules()},
    }


def resume_state(trainer: Trainer) -> dict[str, Stateful]:
    """Return everything a resumed run needs beside the weights, and nothing else: a line here is saved and restored.

    In the order of loading: random state comes last, so that nothing loaded before it can disturb it.
    """
    return {
        "precision": trainer.precision_plugin,
        "progress": trainer.progress,
        "optimizer_states": Each("optimizers", map(Updating, trainer.optimizers)),
        "lr_schedulers": Each("lr schedulers", [config.scheduler for config in trainer.lr_scheduler_configs]),
        "loader": trainer.sources,
        "metrics": trainer.metrics,
        "random": RandomState(),
    }
