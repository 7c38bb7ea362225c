"""RichProgressBar: what a person sees of a run while it goes on.

A step costs one look at the clock. Metrics are read, and anything is drawn, only when a frame is due: at most five
times a second on a terminal, every 30 seconds elsewhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from trainkit.callbacks.console import Lines, RichProgressBarTheme, Terminal, shows_live_line
from trainkit.callbacks.progress_bar import ProgressBar as ProgressBar
from trainkit.callbacks.progress_bar import get_standard_metrics
from trainkit.callbacks.run_facts import Facts, Frame, Pace, Rows, ending, facts, limit, time_left
from trainkit.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainkit import Module, Trainer


class RichProgressBar(ProgressBar):
    """Show a run: on a terminal with a live line, elsewhere with plain lines.

    On a terminal: what is trained on what, one permanent row per epoch with its metrics and a mark on the best so far,
    one live line, and at the end the best value, its checkpoint and the command to go on. Into a file or a pipe, in CI
    and with TERM=dumb: the same as `key=value` lines, one every 30 seconds and one per epoch. `NO_COLOR` is respected.

    Epochs are counted from 1 here. A row has the metrics logged with prog_bar=True first, then others as far as
    there is room. "Best" is by the metric that ModelCheckpoint, or else EarlyStopping, monitors.

    Args:
        refresh_rate: draw at most so many times a second, and never more than five times; 0 shows nothing.
        leave: keep each epoch's last live line.
        theme: styles of the terminal.
        console_kwargs: arguments of the `rich.console.Console` that is drawn on.

    Raises:
        MisconfigurationException: `refresh_rate` is not a number of at least 0.
    """

    monitors = True  # an epoch's row comes after everything that logs at its end

    def __init__(
        self,
        refresh_rate: float = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(refresh_rate, bool) or not isinstance(refresh_rate, int | float) or not refresh_rate >= 0:
            raise MisconfigurationException(
                "RichProgressBar(refresh_rate=...) must be how often to draw in a second, or 0 to show nothing. "
                f"Received: {refresh_rate!r}."
            )
        self.refresh_rate = refresh_rate
        self.leave = leave
        self.theme = theme or RichProgressBarTheme()
        self.console_kwargs = console_kwargs or {}
        self._run: _Run | None = None
        self._due = math.inf  # when the next frame may be drawn, on the monotonic clock
        self._header: Facts | None = None  # what was shown last: a second fit of the same has nothing new to say

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._enabled and self.refresh_rate > 0

    def enable(self) -> None:
        """Show the run (again)."""
        super().enable()
        if self._run is not None and self.is_enabled:
            self._due = monotonic()

    def disable(self) -> None:
        """Show nothing until `enable`."""
        super().disable()
        self._due = math.inf
        if self._run is not None:
            self._run.display.close()

    def print(self, *values: Any, sep: str = " ", end: str = "\n", **kwargs: Any) -> None:
        """Print above the live line; to a file of its own, or flushed, as the builtin does."""
        run = self._run
        if run is None or kwargs:
            super().print(*values, sep=sep, end=end, **kwargs)
        elif run.waiting is not None:
            run.waiting.append((values, sep, end))
        else:
            run.display.print(*values, sep=sep, end=end)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None, "_due": math.inf, "_header": None}

    # ---- every step
    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if monotonic() >= self._due:
            self._draw_fit(trainer, self._read_metrics(trainer, pl_module, outputs))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if monotonic() >= self._due:
            self._draw_evaluation(trainer, batch_idx + 1, dataloader_idx)

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    # ---- a run begins
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.is_enabled:
            options = self.console_kwargs
            stream = options.get("file") or (sys.stderr if options.get("stderr") else sys.stdout)
            live = options.get("force_terminal") or shows_live_line(stream)
            run = self._run = _Run(Terminal(self.theme, self.leave, options) if live else Lines())
            run.waiting = [] if stage == "fit" else None
            self._due = run.began + run.display.first_frame

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._show_header(trainer, pl_module)
        if self._run is not None:
            self._run.pace, self._run.rows = Pace(trainer.progress.total_batch), Rows(trainer)

    def _show_header(self, trainer: Trainer, pl_module: Module) -> None:
        """Show the header now that the training data is there, and then what was printed before."""
        run = self._run
        if run is not None and run.waiting is not None:
            found = facts(trainer, pl_module)
            if found != self._header and self.is_enabled:
                self._header = found
                run.display.header(found)
            run.release()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._run is not None:
            self._run.pace.go_on()
            if monotonic() >= self._due:
                self._draw_fit(trainer, self._run.metrics)

    # ---- evaluations, alone or inside of fit
    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        run = self._run
        if run is not None and run.rows is not None:
            run.pause(trainer)
            run.rows.before_validation(trainer)
        self._start_evaluation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        run = self._run
        if run is not None and run.rows is not None:
            run.rows.after_validation(trainer)
            run.pace.go_on()

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start_evaluation(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._start_evaluation(trainer)

    def _start_evaluation(self, trainer: Trainer) -> None:
        if self._run is not None:
            self._run.evaluation = Pace()
            if monotonic() >= self._due:
                self._draw_evaluation(trainer, 0, 0)

    # ---- what stays
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        run = self._run
        if run is not None and run.rows is not None:
            run.pause(trainer)
            if self.leave and self._due < math.inf:
                self._draw_fit(trainer, run.metrics)
            live = run.rows.training_first(self._shown(trainer, pl_module), trainer.callback_metrics)
            row = run.rows.row(trainer, live, run.elapsed)
            if self.is_enabled:
                run.display.row(row)
                if isinstance(run.display, Lines):  # the row was a sign of life
                    self._due = monotonic() + run.display.between_frames

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(trainer, None)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        self._end(trainer, exception)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        run, self._run, self._due = self._run, None, math.inf
        if run is not None:
            run.release()
            run.display.close()

    def _end(self, trainer: Trainer, exception: BaseException | None) -> None:
        run, self._due = self._run, math.inf
        if run is not None:
            run.release()
            run.display.close()
            if run.rows is not None and self.is_enabled:
                run.display.ending(ending(trainer, run.rows.best, run.elapsed, exception))
            run.rows = None

    # ---- frames
    def _shown(self, trainer: Trainer, pl_module: Module) -> dict[str, Any]:
        """Return the metrics without the version, which the header has."""
        known = get_standard_metrics(trainer)
        metrics = self.get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if known.get(name) != value}

    def _read_metrics(self, trainer: Trainer, pl_module: Module, outputs: Any) -> dict[str, Any]:
        """Return the metrics of a frame, the loss among them. This waits for the device."""
        run = self._run
        if run is None or run.rows is None:
            return {}
        metrics = run.rows.training_first(self._shown(trainer, pl_module), trainer.callback_metrics)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is not None and not any("loss" in name.lower() for name in metrics.keys() - run.rows.evaluated):
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            metrics = {"loss": float(loss) * scale, **metrics}
        return metrics

    def _draw_fit(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        run = self._run
        if run is not None:
            run.look(trainer)
            run.metrics = metrics
            self._draw(run, trainer, "fit", trainer.progress.batch, trainer.num_training_batches, run.pace.rate)

    def _draw_evaluation(self, trainer: Trainer, done: int, dataloader_idx: int) -> None:
        run = self._run
        if run is not None:
            totals = {
                "sanity check": trainer.num_sanity_val_batches,
                "validate": trainer.num_val_batches,
                "test": trainer.num_test_batches,
                "predict": trainer.num_predict_batches,
            }
            stage = "sanity check" if trainer.sanity_checking else "test" if trainer.testing else "predict"
            if trainer.validating or run.rows is not None:
                stage = "validate"
            done += int(sum(totals[stage][:dataloader_idx]))
            run.evaluation.look(done)
            self._draw(run, trainer, stage, done, sum(totals[stage]), run.evaluation.rate)

    def _draw(self, run: _Run, trainer: Trainer, stage: str, done: int, total: int | float, rate: float | None) -> None:
        epochs = limit(trainer.max_epochs)
        now = monotonic()
        if run.rows is None:  # an evaluation alone
            remaining = run.evaluation.time_for(total - done)
        else:
            remaining = None if run.finish is None else max(run.finish - now, 0.0)
        run.display.draw(
            Frame(
                stage=stage,
                epoch="" if run.rows is None else f"{trainer.current_epoch + 1}" + (f"/{epochs}" if epochs else ""),
                done=done,
                total=int(total) if total < math.inf else None,
                step=trainer.global_step,
                rate=rate,
                elapsed=now - run.began,
                remaining=remaining,
                metrics=run.metrics,
            )
        )
        self._due = monotonic() + max(run.display.between_frames, 1 / self.refresh_rate)


class _Run:
    """What is known while a run is shown."""

    def __init__(self, display: Terminal | Lines) -> None:
        self.display = display
        self.began = monotonic()
        self.pace = self.evaluation = Pace()
        self.rows: Rows | None = None  # while training goes on
        self.metrics: Mapping[str, Any] = {}  # as read for the last frame
        self.finish: float | None = None  # when the run should be done, on the monotonic clock
        self.waiting: list[tuple[tuple[Any, ...], str, str]] | None = None  # printed before there was a header

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return monotonic() - self.began

    def look(self, trainer: Trainer) -> None:
        """Take in how far training is, and work out when it should be done."""
        self.pace.look(trainer.progress.total_batch)
        left = time_left(trainer, self.pace)
        self.finish = None if left is None else monotonic() + left

    def pause(self, trainer: Trainer) -> None:
        """Stop training's clock: something else happens now."""
        self.look(trainer)
        self.pace.pause(trainer.progress.total_batch)

    def release(self) -> None:
        """Show what was printed before there was a header."""
        waiting, self.waiting = self.waiting, None
        for values, sep, end in waiting or ():
            self.display.print(*values, sep=sep, end=end)
