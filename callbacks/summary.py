"""ModelSummary: a table of a model's layers and the size of it all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import UninitializedParameter

from trainkit import Callback

if TYPE_CHECKING:
    from rich.text import Text

    from trainkit import Module, Trainer

_LONGEST_NAME, _LONGEST_TYPE = 28, 20  # what fits in 80 columns beside the numbers


@dataclass(frozen=True)
class Layer:
    """One row of a summary; `name` is dotted, `parameters` is None while a lazy layer has not seen a batch."""

    name: str
    type: str
    depth: int
    parameters: int | None
    mode: str


@dataclass(frozen=True)
class Summary:
    """What a model consists of; `str()` is the table. Shared parameters count once in the totals."""

    layers: list[Layer]
    trainable_parameters: int
    total_parameters: int
    megabytes: float
    lazy: bool

    @property
    def non_trainable_parameters(self) -> int:
        """Parameters that get no gradient."""
        return self.total_parameters - self.trainable_parameters

    def __str__(self) -> str:
        rows = [("layer", "type", "parameters", "mode")]
        for layer in self.layers:
            count = "not known yet" if layer.parameters is None else f"{layer.parameters:,}"
            name = _shortened("  " * (layer.depth - 1) + layer.name.rpartition(".")[2], _LONGEST_NAME)
            rows.append((name, _shortened(layer.type, _LONGEST_TYPE), count, layer.mode))
        totals = f"{self.total_parameters:,}"
        widths = [max(len(row[column]) for row in [*rows, ("total", "", totals, "")]) for column in range(4)]
        lines = [
            f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}  {mode}".rstrip()
            for name, kind, count, mode in rows
        ]
        lines.append(f"{'total':<{widths[0]}}  {'':<{widths[1]}}  {totals:>{widths[2]}}  {_size(self.megabytes)}")
        lines.append(self._share())
        if self.lazy:
            lines.append("lazy layers get their parameters, and count, with the first batch")
        return "\n".join(lines)

    def __rich__(self) -> Text:
        """Return the table as rich draws it on a terminal."""
        from rich.text import Text

        titles, _, rows = str(self).partition("\n")
        return Text(no_wrap=True).append(titles, "dim").append(f"\n{rows}")

    def _share(self) -> str:
        frozen = self.non_trainable_parameters
        if not frozen:
            return "all trainable"
        if frozen == self.total_parameters:
            return "none trainable"
        return f"{self.trainable_parameters:,} trainable, {frozen:,} non-trainable"


def summarize(module: nn.Module, max_depth: int = 1) -> Summary:
    """Return a module's layers, parameter counts and size, as a value whose `str()` is a table.

    Args:
        module: any nn.Module.
        max_depth: how many levels of layers to list: 1 the module's own, -1 all, 0 none.

    Raises:
        ValueError: `max_depth` is below -1.

    Example:
        >>> print(summarize(nn.Sequential(nn.Linear(4, 2), nn.ReLU())))
        layer  type    parameters  mode
        0      Linear          10  train
        1      ReLU             0  train
        total                  10  under 0.01 MB
        all trainable
    """
    _check_depth(max_depth)
    layers: list[Layer] = []
    _list_layers(module, "", 1, max_depth, layers)
    own = list(module.parameters(recurse=False))
    if own and layers:
        layers.append(Layer("(its own)", "", 1, _count(own), ""))
    parameters = list(module.parameters())  # each once, however often it is shared
    known = [parameter for parameter in parameters if not isinstance(parameter, UninitializedParameter)]
    return Summary(
        layers=layers,
        trainable_parameters=sum(parameter.numel() for parameter in known if parameter.requires_grad),
        total_parameters=sum(parameter.numel() for parameter in known),
        megabytes=sum(parameter.numel() * parameter.element_size() for parameter in known) / 1e6,
        lazy=len(known) < len(parameters),
    )


class ModelSummary(Callback):
    """Print a table of the model's layers when training starts.

    Args:
        max_depth: how many levels of layers to list: 1 the model's own, -1 all, 0 prints nothing.

    Raises:
        ValueError: `max_depth` is below -1.
    """

    def __init__(self, max_depth: int = 1) -> None:
        _check_depth(max_depth)
        self.max_depth = max_depth
        self._printed: Summary | None = None

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        if self.max_depth == 0 or not trainer.is_global_zero:
            return
        summary = summarize(module, self.max_depth)
        if summary != self._printed:  # a second fit of the same model has nothing new to say
            self._printed = summary
            trainer.print(summary)


def _check_depth(max_depth: int) -> None:
    if isinstance(max_depth, bool) or not isinstance(max_depth, int) or max_depth < -1:
        raise ValueError(f"max_depth must be -1 (all levels), 0 (nothing) or more. Received: {max_depth!r}.")


def _list_layers(module: nn.Module, prefix: str, depth: int, max_depth: int, layers: list[Layer]) -> None:
    if max_depth != -1 and depth > max_depth:
        return
    for name, child in module.named_children():
        mode = "train" if child.training else "eval"
        layers.append(Layer(prefix + name, type(child).__name__, depth, _count(child.parameters()), mode))
        _list_layers(child, f"{prefix}{name}.", depth + 1, max_depth, layers)


def _count(parameters: Iterable[nn.Parameter]) -> int | None:
    total = 0
    for parameter in parameters:
        if isinstance(parameter, UninitializedParameter):
            return None
        total += parameter.numel()
    return total


def _size(megabytes: float) -> str:
    if 0 < megabytes < 0.01:
        return "under 0.01 MB"
    return f"{megabytes:,.1f} MB" if megabytes >= 1 else f"{megabytes:.2f} MB"


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2 - 2]}...{text[-(longest - longest // 2 - 1) :]}"
