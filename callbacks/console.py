"""What a run shows: on a terminal a header, a row per epoch and one live line; anywhere else plain lines.

`Terminal` and `Lines` draw the same few things; a progress bar decides when.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainkit.callbacks.run_facts import Ending, Facts, Frame, Row

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text


@dataclass
class RichProgressBarTheme:
    """The styles a terminal shows, each a rich style such as "bold green", and the form of the numbers.

    `metrics_format` is a format specification such as ".3f"; "" gives four significant digits. `progress_bar_pulse` is
    not used: where there is no length there is no bar.
    """

    description: str = "bold"
    progress_bar: str = "cyan"
    progress_bar_finished: str = "green"
    progress_bar_pulse: str = "cyan"
    batch_progress: str = ""
    time: str = "dim"
    processing_speed: str = "dim"
    metrics: str = ""
    metrics_text_delimiter: str = "  "
    metrics_format: str = ""
    label: str = "dim"
    best: str = "bold green"


def shows_live_line(stream: Any) -> bool:
    """Whether a stream is a terminal on which one line may be drawn again and again."""
    environment = os.environ
    if environment.get("CI", "").lower() not in ("", "0", "false") or environment.get("TERM") in ("dumb", "unknown"):
        return False
    if "0" in (environment.get("TTY_COMPATIBLE"), environment.get("TTY_INTERACTIVE")):
        return False
    if hasattr(stream, "rich_proxied_file"):  # a rich Live is active already, and a terminal shows only one
        return False
    return bool(getattr(stream, "isatty", bool)())


def duration_text(seconds: float) -> str:
    """Return seconds as 0:07, 12:03 or 1:02:03."""
    minutes, second = divmod(int(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def number_text(value: Any, form: str = "") -> str:
    """Return a metric's value in few characters whose number hardly changes from one value to the next."""
    value = value.item() if hasattr(value, "item") else value  # a custom get_metrics may return tensors
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if form:
        return format(value, form)
    size = abs(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if 1000 <= size < 1e6:
        return f"{value:.0f}"
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}"
    return f"{value:#.3g}" if 0 < size < 0.1 else f"{value:#.4g}"


def rate_text(rate: float) -> str:
    """Return batches a second, always of about the same width."""
    return (f"{rate:.0f}" if rate >= 99.95 else f"{rate:#.3g}").rjust(4) + " it/s"


class Lines:
    """Plain `key=value` lines for files, pipes, CI and batch systems."""

    first_frame = 5.0  # seconds until a sign of life, then between two
    between_frames = 30.0

    def header(self, facts: Facts) -> None:
        pairs: dict[str, Any] = {"run": facts.run_directory, "model": facts.model, "parameters": facts.parameters}
        pairs |= {f"{name}_{unit}": "unknown" if size is None else size for name, (size, unit) in facts.data.items()}
        pairs |= {"device": facts.device, "precision": facts.precision, "seed": facts.seed}
        if facts.resumed_from:
            pairs["resumed_from"] = facts.resumed_from
        self._line(pairs)

    def draw(self, frame: Frame) -> None:
        if frame.stage == "sanity check":
            return
        pairs: dict[str, Any] = {"epoch": frame.epoch} if frame.epoch else {}
        count = f"{frame.done}/{frame.total}" if frame.total is not None else str(frame.done)
        pairs |= {"batch": count, "step": frame.step} if frame.stage == "fit" else {frame.stage: count}
        if frame.rate is not None:
            pairs["rate"] = rate_text(frame.rate).strip().replace(" it", "")
        pairs["elapsed"] = duration_text(frame.elapsed)
        if frame.remaining is not None:
            pairs["remaining"] = duration_text(frame.remaining)
        self._line(pairs | {name: number_text(value) for name, value in frame.metrics.items()})

    def row(self, row: Row) -> None:
        pairs: dict[str, Any] = {"epoch": f"{row.epoch}/{row.epochs}" if row.epochs else row.epoch, "step": row.step}
        pairs |= {name: number_text(row.values[name]) for name in row.names if name in row.values}
        self._line(pairs | {"elapsed": duration_text(row.elapsed)} | ({"best": "yes"} if row.best else {}))

    def ending(self, ending: Ending) -> None:
        if ending.sentence:
            self.print(ending.sentence)
        else:
            pairs: dict[str, Any] = {"epochs": ending.epochs, "step": ending.step}
            pairs["elapsed"] = duration_text(ending.elapsed)
            if best := ending.best:
                pairs[f"best_{best.name}"] = number_text(best.value)
                pairs |= {"best_epoch": best.epoch, "best_step": best.step} if best.epoch is not None else {}
            pairs |= {"checkpoint": ending.checkpoint} if ending.checkpoint else {}
            self._line(pairs, "done ")
        for label in ("time", "advice", "resume"):
            if text := getattr(ending, label):
                self.print(f"{label}: {text}")

    def print(self, *values: Any, sep: str = " ", end: str = "\n") -> None:
        text = sep.join(map(str, values))
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)

    def close(self) -> None:
        pass

    def _line(self, pairs: Mapping[str, Any], start: str = "") -> None:
        self.print(start + " ".join(f"{key}={_quoted(str(value))}" for key, value in pairs.items()))


class Terminal:
    """A header, one permanent row per epoch and one transient live line, drawn with rich."""

    first_frame = 0.0
    between_frames = 0.2

    def __init__(self, theme: RichProgressBarTheme, leave: bool, console_kwargs: Mapping[str, Any]) -> None:
        from rich.console import Console

        self._console = Console(**console_kwargs)
        self._theme, self._leave = theme, leave
        self._live: Live | None = None
        self._columns: list[str] | None = None
        self._gap = True  # whether a blank line belongs before what comes next
        ascii_only = self._console.options.ascii_only
        self._full, self._half, self._empty = ("=", ">", "-") if ascii_only else ("\u2501", "\u2578", "\u2500")
        self._star = "*" if ascii_only else "\u2605"

    def header(self, facts: Facts) -> None:
        self._grid("run", facts.run_directory)
        if facts.resumed_from:
            self._grid("from", facts.resumed_from)
        self._grid("model", f"{facts.model}, {facts.parameters:,} parameters")
        sizes = [(name, "unknown" if size is None else f"{size:,} {unit}") for name, (size, unit) in facts.data.items()]
        self._grid("data", ", ".join(f"{name} {size}" for name, size in sizes))
        seed = "no seed" if facts.seed is None else f"seed {facts.seed}"
        self._grid("device", f"{facts.device}, {facts.precision}, {seed}")
        self._console.print()
        self._gap = False

    def draw(self, frame: Frame) -> None:
        if self._live is None:
            from rich.live import Live

            if self._gap and (frame.epoch or frame.stage == "sanity check"):  # inside fit
                self._console.print()
                self._gap = False
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        # room for the ^C that a terminal echoes: a line that wraps could not be taken away
        self._live.update(self.live_line(frame, self._console.width - 3), refresh=True)

    def live_line(self, frame: Frame, width: int) -> Text:
        """Return the live line in at most `width` columns; what matters less goes first when it is narrow."""
        from rich.text import Text

        theme = self._theme
        label = f"epoch {frame.epoch}" if frame.stage == "fit" else frame.stage
        label = label.ljust(len(f"epoch {frame.epoch}")) if frame.epoch else label
        total = str(frame.total) if frame.total is not None else ""
        count = f"{frame.done:>{len(total)}}/{total}" if total else f"{frame.done} batches"
        times = [duration_text(frame.elapsed)]
        if frame.remaining is not None:
            times.insert(0, f"{times[0]} < {duration_text(frame.remaining)}")
        metrics = [f"{name} {number_text(value, theme.metrics_format)}" for name, value in frame.metrics.items()]
        gap = theme.metrics_text_delimiter

        left = width - len(f"{label}  {count}")
        time = next((text for text in times if len(text) + 2 <= left), "")
        left -= len(time) + 2 if time else 0
        shown: list[str] = []
        if metrics and len(metrics[0]) + 2 <= left:
            shown, left = metrics[:1], left - len(metrics[0]) - 2
        rate = "" if frame.rate is None else rate_text(frame.rate)
        rate = rate if len(rate) + 2 <= left else ""
        left -= len(rate) + 2 if rate else 0
        shortest_bar = 12 if left >= 12 else 0
        for metric in metrics[1:] if shown else ():
            if len(metric) + len(gap) <= left - shortest_bar:
                shown, left = [*shown, metric], left - len(metric) - len(gap)

        line = Text(no_wrap=True, overflow="crop", end="").append(label, theme.description)
        if frame.total and left >= 6:
            self._append_bar(line, min(frame.done / frame.total, 1.0), min(left - 2, 40))
        line.append(f"  {count}", theme.batch_progress)
        for text, style in ((rate, theme.processing_speed), (time, theme.time), (gap.join(shown), theme.metrics)):
            if text:
                line.append("  ").append(text, style)
        return line

    def _append_bar(self, line: Text, share: float, width: int) -> None:
        halves = int(share * width * 2)
        style = self._theme.progress_bar if share < 1 else self._theme.progress_bar_finished
        full = self._full * (halves // 2) + self._half * (halves % 2)
        line.append("  ").append(full, style).append(self._empty * (width - len(full)), "dim")

    def row(self, row: Row) -> None:
        from rich.text import Text

        if self._leave and self._live is not None:
            self._console.print(self._live.get_renderable())
        shown = self._fitting(row)
        if shown != self._columns:
            if self._gap or self._columns is not None:
                self._console.print()
            self._columns = shown
            titles = [_shortened(name).rjust(_width(name)) for name in shown]
            titles = ["epoch", *titles, "   time"]
            self._console.print(Text("  ".join(titles), self._theme.label, no_wrap=True, overflow="crop"))
        line = Text(f"{row.epoch:>5}", no_wrap=True, overflow="crop")
        for name in self._columns:
            value = number_text(row.values[name], self._theme.metrics_format) if name in row.values else ""
            line.append(f"  {value:>{_width(name)}}", self._theme.metrics)
        line.append(f"  {duration_text(row.elapsed):>7}", self._theme.time)
        if row.best:
            line.append(f"  {self._star} best", self._theme.best)
        self._console.print(line)

    def _fitting(self, row: Row) -> list[str]:
        """Return the metrics for which there is room, in the order in which they were logged."""
        left = self._console.width - len("epoch") - len("     time") - len("  * best")
        chosen: set[str] = set()
        for name in row.ranking:
            if _width(name) + 2 <= left:
                chosen.add(name)
                left -= _width(name) + 2
        return [name for name in row.names if name in chosen]

    def ending(self, ending: Ending) -> None:
        self._console.print()
        if ending.sentence:
            self.print(ending.sentence)
        else:
            epochs, steps = f"{ending.epochs} epoch", f"{ending.step:,} step"
            epochs, steps = (text if text.startswith("1 ") else f"{text}s" for text in (epochs, steps))
            self._grid("done", f"{epochs}, {steps} in {duration_text(ending.elapsed)}")
            if best := ending.best:
                where = "before this run" if best.epoch is None else f"in epoch {best.epoch}, step {best.step}"
                self._grid("best", f"{best.name} {number_text(best.value, self._theme.metrics_format)} {where}")
            if ending.checkpoint:
                self._grid("saved", ending.checkpoint)
        for label in ("time", "advice", "resume"):
            if text := getattr(ending, label):
                self._grid(label, text)

    def print(self, *values: Any, sep: str = " ", end: str = "\n") -> None:
        self._gap = True
        self._console.print(*values, sep=sep, end=end, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Take the live line away and give stdout and stderr back."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _grid(self, label: str, text: str) -> None:
        from rich.text import Text

        self._console.print(Text().append(f"{label:<6}  ", self._theme.label).append(text), soft_wrap=True)


def _width(name: str) -> int:
    return max(8, min(len(name), 20))


def _shortened(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:8]}...{name[-9:]}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ' "\n') or not value else value
