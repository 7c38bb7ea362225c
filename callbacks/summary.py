"""ModelSummary and RichModelSummary: show a model's layers and the size of it all when training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainkit import Callback
from trainkit.summary import LAZY, Columns, check_depth, size_text, table_text, totals_text
from trainkit.summary import ModelSummary as Summary
from trainkit.summary import summarize as summarize

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from trainkit import Module, Trainer


class ModelSummary(Callback):
    """Print a table of the model's layers when training starts, once for each model.

    With an `example_input_array` it also has the sizes that go through each layer and the floating-point operations
    of a forward pass.

    Args:
        max_depth: how many levels of layers to list: 1 the model's own, -1 all, 0 prints nothing.
        summarize_kwargs: handed on to `summarize`, for classes that override it.

    Raises:
        ValueError: `max_depth` is not a whole number of at least -1.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        check_depth(max_depth)
        self.max_depth = max_depth
        self.summarize_kwargs = summarize_kwargs
        self._printed = ""

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self.max_depth == 0:
            return
        summary = Summary(pl_module, self.max_depth)
        text = str(summary)
        if text == self._printed or not trainer.is_global_zero:  # a second fit has nothing new to say
            return
        self._printed = text
        shown = self.summarize(
            summary.columns(),
            summary.total_parameters,
            summary.trainable_parameters,
            summary.model_size,
            summary.total_training_modes,
            total_flops=summary.total_flops,
            **self.summarize_kwargs,
        )
        if shown is not None:
            trainer.print(shown)
            if summary.lazy:
                trainer.print(LAZY)

    @staticmethod
    def summarize(
        summary_data: Columns,
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> Any:
        """Return what to print; override it to show something else, or show it yourself and return None.

        Args:
            summary_data: the table's columns, each a title and its cells: " ", "Name", "Type", "Params", "Mode", and
                with an example "FLOPs", "In sizes", "Out sizes".
            total_parameters: how many parameters the model has.
            trainable_parameters: how many of them get a gradient.
            model_size: megabytes.
            total_training_modes: how many layers are in "train" and in "eval" mode.
            total_flops: floating-point operations of a forward pass.
            summarize_kwargs: what this callback was made with.
        """
        return _Shown(
            table_text(
                summary_data, total_parameters, trainable_parameters, model_size, total_training_modes, total_flops
            )
        )


class _Shown(str):
    """A table; on a terminal its titles are dim."""

    __slots__ = ()

    def __rich__(self) -> Text:
        from rich.text import Text

        titles, _, rows = self.partition("\n")
        return Text(no_wrap=True).append(titles, "dim").append(f"\n{rows}")


class RichModelSummary(ModelSummary):
    """Print the table of the model's layers with lines around it, drawn by rich.

    Args:
        max_depth: how many levels of layers to list: 1 the model's own, -1 all, 0 prints nothing.
        summarize_kwargs: `header_style`, the titles' rich style.

    Raises:
        ValueError: `max_depth` is not a whole number of at least -1.
    """

    @staticmethod
    def summarize(
        summary_data: Columns,
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> Any:
        """Return what to print."""
        lines = [f"{total_parameters:,} parameters, {size_text(model_size)}"]
        lines += totals_text(total_parameters, trainable_parameters, total_training_modes, total_flops)
        return _Boxed(summary_data, lines, summarize_kwargs.get("header_style", "bold magenta"))


class _Boxed:
    """A table with lines around it: on a terminal in colours, elsewhere as text."""

    def __init__(self, columns: Columns, lines: list[str], header_style: str) -> None:
        self.columns, self.lines, self.header_style = columns, lines, header_style

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style=self.header_style)
        for title, _ in self.columns:
            right = title in ("Params", "FLOPs", "In sizes", "Out sizes")
            table.add_column(title, justify="right" if right else "left", style="dim" if title == " " else None)
        for row in zip(*(cells for _, cells in self.columns), strict=True):
            table.add_row(*map(Text, row))
        return Group(table, *map(Text, self.lines))

    def __str__(self) -> str:
        import io

        from rich.console import Console

        file = io.StringIO()
        Console(file=file, width=80, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
