"""What a model consists of: its layers, their parameters and sizes, and the work of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from trainkit.pieces import class_of
from trainkit.random import isolated_random
from trainkit.tree import map_tensors

UNKNOWN = "?"
WIDTH = 80  # columns of a table, wherever that is possible

Columns = list[tuple[str, list[str]]]


class LayerSummary:
    """One layer: its class, parameters and mode, and after the first forward pass the sizes that went in and out.

    Example:
        >>> layer = nn.Conv2d(3, 8, 3)
        >>> summary = LayerSummary(layer)
        >>> _ = layer(torch.rand(1, 3, 5, 5))
        >>> summary.num_parameters, summary.in_size, summary.out_size
        (224, [1, 3, 5, 5], [1, 8, 3, 3])
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.in_size: Any = UNKNOWN
        self.out_size: Any = UNKNOWN
        self._hook = None
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            self._hook = module.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        self.in_size = sizes_of(given[0] if len(given) == 1 else given)
        self.out_size = sizes_of(output)
        self.detach_hook()  # once: a layer that is called again may be called with something else

    def detach_hook(self) -> None:
        """Stop waiting for a forward pass."""
        if self._hook is not None:
            self._hook.remove()

    @property
    def layer_type(self) -> str:
        """The name of its class."""
        return class_of(self.module).__name__

    @property
    def num_parameters(self) -> int:
        """How many parameters it has, those of the layers inside included; what a lazy layer will have is not known."""
        return count(self.module)

    @property
    def lazy(self) -> bool:
        """Whether some of its parameters have no size before the first forward pass."""
        return any(isinstance(parameter, UninitializedParameter) for parameter in self.module.parameters())

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        return self.module.training


class ModelSummary:
    """What a model consists of, as a value; `str()` is a table.

    If the model has an `example_input_array` it is called with it, in evaluation mode and without gradients, and the
    sizes that went through each layer and the floating-point operations are counted: two for a multiplication with an
    addition. A tuple or list is given as positional arguments, a dict as keyword arguments.

    Args:
        model: any nn.Module.
        max_depth: how many levels of layers to list: 1 the model's own, -1 all, 0 none.

    Raises:
        ValueError: `max_depth` is not a whole number of at least -1.

    Example:
        >>> print(ModelSummary(nn.Sequential(nn.Linear(4, 2), nn.ReLU())))
        layer  type    parameters  mode
        0      Linear          10  train
        1      ReLU             0  train
        total                  10  under 0.01 MB
        all trainable
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        check_depth(max_depth)
        self.model, self.max_depth = model, max_depth
        self.total_flops = 0
        """Floating-point operations of a forward pass; 0 without an `example_input_array`."""
        self.layers: dict[str, LayerSummary] = {
            name: LayerSummary(module)
            for name, module in model.named_modules()
            if name and (max_depth == -1 or name.count(".") < max_depth)
        }
        self.flop_counts: dict[str, dict[Any, int]] = {name: {} for name in self.layers}
        """The same for each listed layer, by operation."""
        self.has_example = getattr(model, "example_input_array", None) is not None
        try:
            if self.has_example:
                self._run_example()
        finally:
            for layer in self.layers.values():
                layer.detach_hook()

    def _run_example(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        model = self.model
        modes = [(part, part.training) for part in model.modules()]
        counter = FlopCounterMode(display=False)
        try:
            model.eval()
            with torch.no_grad(), isolated_random(), counter:
                call_with_example(model)
        except Exception as error:
            error.add_note(
                f"This was the summary calling {type(model).__name__} with its example_input_array. Make that fit "
                "forward, or leave it out; Trainer(enable_model_summary=False) makes no summary."
            )
            raise
        finally:
            for part, training in modes:
                part.training = training
        counts = counter.get_flop_counts()
        root = class_of(model).__name__
        self.total_flops = int(counter.get_total_flops())
        self.flop_counts = {name: dict(counts.get(f"{root}.{name}", {})) for name in self.layers}

    # ---- layer by layer
    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The listed layers."""
        return [(name, layer.module) for name, layer in self.layers.items()]

    @property
    def layer_names(self) -> list[str]:
        """Their names, dotted."""
        return list(self.layers)

    @property
    def layer_types(self) -> list[str]:
        """The names of their classes."""
        return [layer.layer_type for layer in self.layers.values()]

    @property
    def in_sizes(self) -> list[Any]:
        """The sizes that went into each; "?" where that is not known."""
        return [layer.in_size for layer in self.layers.values()]

    @property
    def out_sizes(self) -> list[Any]:
        """The sizes that came out of each."""
        return [layer.out_size for layer in self.layers.values()]

    @property
    def param_nums(self) -> list[int]:
        """How many parameters each has."""
        return [layer.num_parameters for layer in self.layers.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each is in training mode."""
        return [layer.training for layer in self.layers.values()]

    # ---- the whole model: shared parameters count once
    @property
    def total_parameters(self) -> int:
        """How many parameters the model has."""
        return count(self.model)

    @property
    def trainable_parameters(self) -> int:
        """How many of them get a gradient."""
        return count(self.model, trainable_only=True)

    @property
    def non_trainable_parameters(self) -> int:
        """How many of them get none."""
        return self.total_parameters - self.trainable_parameters

    @property
    def total_layer_params(self) -> int:
        """The parameters of all listed layers; one that lies inside another counts in both."""
        return sum(self.param_nums)

    @property
    def model_size(self) -> float:
        """The parameters' size in megabytes (10^6 bytes), each in its own dtype."""
        return sum(p.numel() * p.element_size() for p in known_parameters(self.model)) / 1e6

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many of all layers, listed or not, are in "train" and in "eval" mode."""
        modes = [module.training for name, module in self.model.named_modules() if name]
        return {"train": modes.count(True), "eval": modes.count(False)}

    @property
    def lazy(self) -> bool:
        """Whether some parameters have no size before the first forward pass."""
        return any(isinstance(parameter, UninitializedParameter) for parameter in self.model.parameters())

    # ---- as a table
    def columns(self) -> Columns:
        """Return the table's columns, each a title and its cells; the last row may be what lies in no listed layer."""
        lazy = [layer.lazy for layer in self.layers.values()]
        numbers = zip(self.param_nums, lazy, strict=True)
        columns: Columns = [
            (" ", [str(index) for index in range(len(self.layers))]),
            ("Name", self.layer_names),
            ("Type", self.layer_types),
            ("Params", ["not known yet" if unknown else f"{number:,}" for number, unknown in numbers]),
            ("Mode", ["train" if training else "eval" for training in self.training_modes]),
        ]
        if self.has_example:
            flops = [sum(counts.values()) for counts in self.flop_counts.values()]
            columns += [
                ("FLOPs", [get_human_readable_count(number).strip() for number in flops]),
                ("In sizes", [str(size) for size in self.in_sizes]),
                ("Out sizes", [str(size) for size in self.out_sizes]),
            ]
        own = sum(p.numel() for p in self.model.parameters(recurse=False) if not isinstance(p, UninitializedParameter))
        if own and self.layers:
            cells = {"Name": "(its own)", "Params": f"{own:,}"}
            for title, column in columns:
                column.append(cells.get(title, ""))
        return columns

    def __str__(self) -> str:
        text = table_text(
            self.columns(),
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
        )
        return f"{text}\n{LAZY}" if self.lazy else text

    __repr__ = __str__


LAZY = "lazy layers get their parameters, and count, with the first batch"


def summarize(module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """Return what a module consists of, as a value whose `str()` is a table; see `ModelSummary`."""
    return ModelSummary(module, max_depth)


def call_with_example(model: nn.Module) -> Any:
    """Call a model with its `example_input_array`, on its device and in the precision of its run."""
    tensors = (*model.parameters(), *model.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    trainer = model.__dict__.get("_trainer")

    def call(example: Any) -> Any:
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, (list, tuple)) else model(example)

    run = call if trainer is None else trainer.precision_plugin.wrap(call)
    return run(map_tensors(lambda value: value.to(device), model.example_input_array))


def known_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's parameters, shared ones once, without those that have no size yet."""
    return [parameter for parameter in module.parameters() if not isinstance(parameter, UninitializedParameter)]


def count(module: nn.Module, trainable_only: bool = False) -> int:
    """Return how many parameters a module has."""
    return sum(p.numel() for p in known_parameters(module) if p.requires_grad or not trainable_only)


def sizes_of(value: Any) -> Any:
    """Return the size of a tensor as a list, of a list or tuple one for each; "?" for anything else and for nothing."""
    if hasattr(value, "shape"):
        return list(value.shape) or UNKNOWN
    return [sizes_of(each) for each in value] or UNKNOWN if isinstance(value, (list, tuple)) else UNKNOWN


def check_depth(max_depth: int) -> None:
    """Refuse a depth that means nothing."""
    if isinstance(max_depth, bool) or not isinstance(max_depth, int) or max_depth < -1:
        raise ValueError(f"max_depth must be -1 (all levels), 0 (nothing) or more. Received: {max_depth!r}.")


# ---------------------------------------------------------------------- text
def get_human_readable_count(number: int) -> str:
    """Return a number in thousands (K), millions (M), billions (B) or trillions (T), with two or three digits.

    Example:
        >>> [get_human_readable_count(number) for number in (123, 1234, 131_584, 2_000_000, 5 * 10**15)]
        ['123  ', '1.2 K', '131 K', '2.0 M', '5,000 T']
    """
    power = 0
    while power < 4 and number >= 1000 ** (power + 1):
        power += 1
    if power == 0:
        return f"{number}  "
    scaled = number / 1000**power
    return f"{int(scaled):,} {' KMBT'[power]}" if scaled >= 100 else f"{scaled:.1f} {' KMBT'[power]}"


def size_text(megabytes: float) -> str:
    """Return a size in megabytes as text."""
    if 0 < megabytes < 0.01:
        return "under 0.01 MB"
    return f"{megabytes:,.1f} MB" if megabytes >= 1 else f"{megabytes:.2f} MB"


def totals_text(total: int, trainable: int, modes: Mapping[str, int], flops: int) -> list[str]:
    """Return what there is to say below a table, a line each."""
    if trainable == total:
        lines = ["all trainable"]
    else:
        lines = [f"{trainable:,} trainable, {total - trainable:,} non-trainable" if trainable else "none trainable"]
    if modes.get("eval"):
        lines.append(f"{modes['train']:,} layers in train mode, {modes['eval']:,} in eval mode")
    if flops:
        lines.append(f"{get_human_readable_count(flops).strip()} FLOPs in a forward pass of example_input_array")
    return lines


def table_text(
    columns: Columns, total: int, trainable: int, megabytes: float, modes: Mapping[str, int], flops: int
) -> str:
    """Return a table of layers and its totals as plain text, in 80 columns as far as it goes."""
    titles = {"Name": "layer", "Type": "type", "Params": "parameters", "Mode": "mode", "In sizes": "in"}
    titles["Out sizes"] = "out"
    shown = {titles.get(title, title): list(cells) for title, cells in columns if title != " "}
    shown["layer"] = [indented(name) for name in shown["layer"]]
    widths = {title: max(map(len, (title, *cells))) for title, cells in shown.items()}
    widths["layer"] = max(widths["layer"], len("total"))
    widths["parameters"] = max(widths["parameters"], len(f"{total:,}"))
    for title, least in (("layer", 28), ("type", 20), ("in", 14), ("out", 14), ("layer", 18), ("type", 10), ("in", 9),
                         ("out", 9)):  # fmt: skip
        if title in widths:  # what is too wide gives way, the longest texts first
            table = sum(widths.values()) + 2 * (len(widths) - 1)
            end = widths["layer"] + widths["type"] + widths["parameters"] + 6 + len(size_text(megabytes))
            excess = max(table, end) - WIDTH
            widths[title] = min(widths[title], max(least, widths[title] - max(excess, 0)))

    def line(cells: Mapping[str, str]) -> str:
        parts = []
        for title, width in widths.items():
            text = shortened(cells.get(title, ""), width)
            parts.append(text.rjust(width) if title in ("parameters", "FLOPs") else text.ljust(width))
        return "  ".join(parts).rstrip()

    rows = [{title: cells[index] for title, cells in shown.items()} for index in range(len(shown["layer"]))]
    totals = line({"layer": "total", "parameters": f"{total:,}"})
    lines = [line({title: title for title in shown}), *map(line, rows), f"{totals}  {size_text(megabytes)}"]
    return "\n".join([*lines, *totals_text(total, trainable, modes, flops)])


def indented(name: str) -> str:
    """Return a dotted name as it stands in a table: its last part, as far to the right as it is deep."""
    return "  " * name.count(".") + name.rpartition(".")[2]


def shortened(text: str, longest: int) -> str:
    """Return a text with its middle left out where it is too long."""
    return text if len(text) <= longest else f"{text[: longest // 2 - 2]}...{text[-(longest - longest // 2 - 1) :]}"
