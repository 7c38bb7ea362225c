"""JSONLinesLogger: metrics.jsonl, a JSON object per call."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.loggers.base import FileLogger, append, check_metrics, flat_row, rank_zero_experiment, replacing
from trainkit.loggers.csv import drop_incomplete_line, is_before
from trainkit.rank_zero import rank_zero_only


class JSONLinesLogger(FileLogger):
    """Write metrics to `<save_dir>/<name>/version_N/metrics.jsonl` and hyper-parameters to `hparams.yaml` beside it.

    Each `log_metrics` call appends one line, at once: a JSON object with "step" and the metrics of that call. A killed
    process loses no row, and a new metric changes no line that is there. JSON has no NaN and no infinity: they are the
    strings "NaN", "Infinity" and "-Infinity", which `float()` of Python and `Number()` of JavaScript read. A file that
    is already there, in a fixed version, is appended to. A resumed run first takes out the rows that it will log again.

    Args:
        save_dir: where all experiments lie.
        name: the experiment, a directory below `save_dir`; "" or None for none.
        version: an int N for `version_N`, a string for that very name, None for the next free number.
        prefix: put before every metric's name, with a dash between.

    Example:
        >>> logger = JSONLinesLogger("logs", name="digits")
        >>> logger.log_metrics({"train_loss": 0.5, "epoch": 0}, step=49)
        >>> print(open(logger.metrics_file_path).read(), end="")
        {"step": 49, "train_loss": 0.5, "epoch": 0}
    """

    NAME_METRICS_FILE = "metrics.jsonl"

    _waiting: bytes = b""  # lines that the disk did not take
    _looked = False  # whether the file was looked at: what a kill has left of a line is cut off
    _rewind_to: int | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> JSONLinesLogger:
        """The logger itself: there is nothing behind it."""
        return self

    @property
    def metrics_file_path(self) -> str:
        """Where the rows go."""
        return str(self._path())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line. A mapping as a value is spread over the names `name/key`.

        Args:
            metrics: numbers or tensors of one element by name; one called "step" takes the place of `step`.
            step: the row's x value; one more than the last by default.
        """
        check_metrics(metrics)
        if not metrics:
            return
        metrics, step = self._place(metrics, step)
        row = {"step": step, **{name: as_json(value) for name, value in flat_row(metrics, self._prefix).items()}}
        self._waiting += (json.dumps(row, allow_nan=False) + "\n").encode()
        self._write()

    @rank_zero_only
    def save(self) -> None:
        """Write what the disk did not take before, if there is anything."""
        if self._waiting:
            self._write()

    def _write(self) -> None:
        self._claim()
        path = self._path()
        try:
            if not self._looked:
                self._tidy(path)
            append(path, self._waiting)
        except OSError as error:
            count = self._waiting.count(b"\n")
            raise OSError(
                error.errno,
                f"{path} could not be written: {error.strerror}. {count} rows are kept for the next attempt",
            ) from error
        self._waiting = b""

    @rank_zero_only
    def sync(self) -> None:
        """Have all rows on the disk, safe from a power loss as well; may take some milliseconds."""
        self.save()
        if self._looked:
            append(self._path(), b"", durable=True)

    def __getstate__(self) -> dict[str, Any]:
        # A copy shares the directory, but the lines not yet written stay with the original, which will write them.
        return self.__dict__ | {"_waiting": b""}

    def _rewind(self, step: int) -> None:
        self._looked = False
        self._rewind_to = step

    def _path(self) -> Path:
        return Path(self.log_dir, self.NAME_METRICS_FILE)

    def _tidy(self, path: Path) -> None:
        """Leave only whole lines, and none that a resumed run logs again."""
        if path.exists():
            drop_incomplete_line(path)
            if self._rewind_to is not None:
                with replacing(path) as file, open(path, "rb") as old:
                    file.writelines(line for line in old if is_kept(line, self._rewind_to))
        self._looked, self._rewind_to = True, None


def as_json(value: float) -> float | str:
    """Return a number as JSON can say it."""
    if isinstance(value, int) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def is_kept(line: bytes, step: int) -> bool:
    """Tell whether a line is a row before `step`; what is no such row is no reason to drop it."""
    try:
        return is_before(str(json.loads(line)["step"]), step)
    except (ValueError, TypeError, KeyError):
        return True
