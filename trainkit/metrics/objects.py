"""Metric objects, torchmetrics' above all: what they compute is logged, they are reset when the epoch is over, and
their half epoch survives a restart. They are known by their methods: torchmetrics is never imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trainkit.errors import MisconfigurationException
from trainkit.metrics.metric import Metric, is_metric_object
from trainkit.metrics.options import Options


class ObjectMetric(Metric):
    """A name that a metric object is logged under."""

    __slots__ = ("_computed", "attribute", "metric")
    RUNNING = ("last", "logged", "attribute")
    takes_objects = True

    def __init__(self, name: str, hook: str, suffix: str, loader: int | None, metric: Any, attribute: str) -> None:
        self.metric, self.attribute = metric, attribute
        self._computed: Any = None
        super().__init__(name, hook, suffix, loader)

    def configure(self, options: Options) -> None:
        super().configure(options)
        self.reduce, self.weighted = "compute", False

    def reset(self) -> None:
        """Forget the values, keep the options."""
        super().reset()
        self._computed = None

    def accept(self, value: Any, module: Any) -> Any:
        """Return the object that takes over the name.

        Raises:
            MisconfigurationException: it is none, or another attribute of the module.
        """
        if value is self.metric:
            return value
        if not is_metric_object(value):
            raise MisconfigurationException(
                f"self.log({self.name!r}, ...) was called with a metric object before, and now with a "
                f"{type(value).__name__}. Log the two under different names."
            )
        given = self.options.metric_attribute if self.options is not None else None
        if attribute_of(module, self.name, value, given) != self.attribute:
            raise MisconfigurationException(
                f"self.log({self.name!r}, ...) was called with two metric objects in {self.hook}. "
                "Log them under different names."
            )
        return value

    def update(self, value: Any, weight: Any) -> None:
        """Take note of what the object's `forward` gave for the batch; `update` alone gives no step value."""
        self.metric = value
        self._computed = None
        if self.on_step:
            self.last = self._checked(getattr(value, "_forward_cache", None), "the value of a batch")
        self.logged = True

    def epoch_value(self) -> Any:
        """Return what the object computes, once for each time that it was logged."""
        if self._computed is None:
            self._computed = self._checked(self.metric.compute(), "compute()")
        return self._computed

    def _checked(self, value: Any, what: str) -> Any:
        """Return a value of the object as a 0-dimensional tensor."""
        if value is None:
            return None
        if not isinstance(value, Tensor) or value.numel() != 1:
            received = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"self.log({self.name!r}, {type(self.metric).__name__}): {what} of a logged metric must be a tensor "
                f"of one element. Received: {received}. Compute it yourself and log its parts with self.log_dict."
            )
        value = value.reshape(()) if value.ndim else value
        return value if self.options is not None and self.options.enable_graph else value.detach()


def attribute_of(module: nn.Module | None, name: str, metric: Any, given: str | None) -> str:
    """Return where in the module a metric object is.

    Raises:
        MisconfigurationException: nowhere, so its state could not be saved; the message names those that are there.
    """
    if given is not None:
        return given
    known = {id(part): where for where, part in _metric_objects(module)}
    if id(metric) not in known:
        there = f", or name one with metric_attribute: {', '.join(known.values())}" if known else ""
        raise MisconfigurationException(
            f"self.log({name!r}, {type(metric).__name__}): the metric is not an attribute of the module, so its state "
            f"would not be moved and saved with it. Assign it in __init__: self.my_metric = ...{there}."
        )
    return known[id(metric)]


def metric_states(module: nn.Module | None) -> dict[str, dict[str, Any]]:
    """Return the states of all metric objects in a module: torchmetrics leaves them out of its `state_dict`."""
    for part in module.modules() if module is not None else ():
        if isinstance(part, nn.ModuleDict) and hasattr(part, "compute"):  # a collection shares one state among several
            list(part.items(keep_base=True, copy_state=False))  # type: ignore[call-arg]
    states = {}
    for where, metric in _metric_objects(module):
        state = {key: getattr(metric, key) for key in _changing(metric)}
        if state:
            states[where] = state
    return states


def load_metric_states(module: nn.Module | None, states: dict[str, dict[str, Any]]) -> None:
    """Take back what `metric_states` returned; a metric that is not there any more is passed over."""
    for where, metric in _metric_objects(module):
        for key, value in states.get(where, {}).items():
            setattr(metric, key, copied(value, getattr(metric, "device", None)))


def object_at(module: nn.Module | None, where: str) -> Any:
    """Return the metric object at a place in the module, None when there is none."""
    return dict(_metric_objects(module)).get(where)


def _metric_objects(module: nn.Module | None) -> Iterator[tuple[str, Any]]:
    if module is not None:
        yield from ((where, part) for where, part in module.named_modules() if is_metric_object(part))


def _changing(metric: Any) -> list[str]:
    """Return the attributes of a torchmetrics metric that its updates change; nothing for a fresh one."""
    defaults = getattr(metric, "_defaults", None)
    if defaults is None:  # not torchmetrics': its buffers are in the module's state_dict
        return []
    # beside the declared states: what wrappers keep, such as the minimum and maximum of MinMaxMetric
    keys = [key for key, value in vars(metric).items() if isinstance(value, Tensor) and not key.startswith("_")]
    if getattr(metric, "_update_count", 0) or getattr(metric, "_num_vals_seen", 0):
        keys += ["_update_count", *(key for key in ("_num_vals_seen",) if hasattr(metric, key)), *defaults]
    elif all(key in defaults for key in keys):
        return []
    return list(dict.fromkeys(keys))


def copied(value: Any, device: Any = None) -> Any:
    """Return a copy of a state, its tensors on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True) if device is not None else value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item, device) for key, item in value.items()}
    return [copied(item, device) for item in value] if isinstance(value, list) else value
