"""CSVLogger: metrics.csv, a row per call, columns that may grow."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from trainkit.loggers.base import FileLogger, append, check_metrics, flat_row, rank_zero_experiment, replacing
from trainkit.rank_zero import rank_zero_only


class CSVLogger(FileLogger):
    """Write metrics to `<save_dir>/<name>/version_N/metrics.csv` and hyper-parameters to `hparams.yaml` beside it.

    Each `log_metrics` call is one row: `step` first, then a column per metric in the order in which they appeared,
    empty where the call did not have it. Numbers are written so that they read back exactly, `nan` and `inf` too.
    Rows are appended; only when a new metric appears is the file written anew, and it takes the old one's place in one
    step. A file that is already there, in a fixed version, is appended to.

    Args:
        save_dir: where all experiments lie.
        name: the experiment, a directory below `save_dir`; "" or None for none.
        version: an int N for `version_N`, a string for that very name, None for the next free number.
        prefix: put before every metric's name, with a dash between.
        flush_logs_every_n_steps: rows are handed to the system every so many steps or rows, whichever comes first;
            a crash loses at most these.

    Example:
        >>> logger = CSVLogger("logs", name="digits")
        >>> logger.log_metrics({"train_loss": 0.5, "epoch": 0}, step=49)
        >>> logger.save()
    """

    NAME_METRICS_FILE = "metrics.csv"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        if type(flush_logs_every_n_steps) is not int or flush_logs_every_n_steps < 1:
            raise ValueError(f"flush_logs_every_n_steps must be a positive int, not {flush_logs_every_n_steps!r}.")
        self._flush_every = flush_logs_every_n_steps
        self._rows: list[dict[str, float]] = []
        self._first_unwritten_step = 0
        self._columns: list[str] | None = None  # None: the file has not been looked at yet
        self._rewind_to: int | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> CSVLogger:
        """The logger itself: there is nothing behind it. See `metrics`, `hparams`, `log_metrics`, `log_hparams`."""
        return self

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows that are not in the file yet."""
        return self._rows

    @property
    def metrics_keys(self) -> list[str]:
        """The columns of the file so far."""
        return list(self._columns or [])

    @property
    def metrics_file_path(self) -> str:
        """Where the rows go."""
        return str(self._path())

    def log_hparams(self, params: Mapping[str, Any] | Namespace) -> None:
        """Write `hparams.yaml`, as `log_hyperparams` does."""
        self.log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add one row. A mapping as a value is spread over the columns `name/key`.

        Args:
            metrics: numbers or tensors of one element by name; one called "step" takes the place of `step`.
            step: the row's x value; one more than the last by default.
        """
        check_metrics(metrics)
        if not metrics:
            return
        metrics, step = self._place(metrics, step)
        row: dict[str, float] = {"step": step, **flat_row(metrics, self._prefix)}
        if not self._rows:
            self._first_unwritten_step = step
        self._rows.append(row)
        if step - self._first_unwritten_step >= self._flush_every - 1 or len(self._rows) >= self._flush_every:
            self._write_rows()

    @rank_zero_only
    def save(self) -> None:
        """Write all rows."""
        self._write_rows()

    @rank_zero_only
    def sync(self) -> None:
        """Write all rows and have them on the disk, safe from a power loss as well; may take some milliseconds."""
        self._write_rows()
        if self._columns is not None:
            append(self._path(), b"", durable=True)

    @rank_zero_only
    def close(self) -> None:
        """Write all rows. No file is kept open."""
        self._write_rows()

    def _rewind(self, step: int) -> None:
        self._columns = None
        self._rewind_to = step

    def _path(self) -> Path:
        return Path(self.log_dir, self.NAME_METRICS_FILE)

    def _write_rows(self) -> None:
        if not self._rows:
            return
        self._claim()
        path = self._path()
        try:
            self._write_to(path)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path} could not be written: {error.strerror}. {len(self._rows)} rows are kept for the next attempt",
            ) from error
        self._rows = []

    def _write_to(self, path: Path) -> None:
        there = path.exists()
        if there and self._columns is None:
            drop_incomplete_line(path)
            self._columns = read_header(path)
        columns = self._columns if there and self._columns else ["step"]
        known = set(columns)
        grown = [*columns, *dict.fromkeys(name for row in self._rows for name in row if name not in known)]
        text = io.StringIO(newline="")
        row_writer(text).writerows([row.get(name, "") for name in grown] for row in self._rows)
        data = text.getvalue().encode("utf-8", "surrogateescape")
        if there and grown == self._columns and self._rewind_to is None:
            append(path, data)
        else:
            rewrite(path, grown, self._rewind_to, data)
            self._columns, self._rewind_to = grown, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy shares the directory, but the rows not yet written stay with the original, which will write them.
        return self.__dict__ | {"_rows": []}


class UnixLines:
    """Write lines that end in a carriage return and a newline with the newline alone."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> int:
        return self._file.write(line[:-2] + "\n")


def row_writer(file: TextIO) -> Any:
    """Return a csv writer whose lines end in a newline.

    The csv module puts only those line ends in quotes that its own `lineterminator` has, but reads both as one.
    """
    return csv.writer(UnixLines(file), lineterminator="\r\n")


def rewrite(path: Path, columns: list[str], before_step: int | None, data: bytes) -> None:
    """Put in the place of `path` its own rows, under more columns, and `data`.

    Args:
        path: the file; it may be missing.
        columns: the new header; begins with the old one.
        before_step: leave out rows at this x value and later; None to leave out none.
        data: the lines to add.
    """
    with replacing(path) as file:
        text = io.TextIOWrapper(file, newline="", write_through=True, encoding="utf-8", errors="surrogateescape")
        writer = row_writer(text)
        writer.writerow(columns)
        if path.exists():
            with open(path, newline="", encoding="utf-8", errors="surrogateescape") as old:
                rows = csv.reader(old)
                header = next(rows, [])
                x = header.index("step") if "step" in header else None
                for row in rows:
                    if before_step is None or x is None or is_before(row[x] if x < len(row) else "", before_step):
                        writer.writerow(row + [""] * (len(columns) - len(row)))
        text.flush()
        text.detach()
        file.write(data)


def is_before(x: str, step: int) -> bool:
    """Tell whether a cell holds an x value before `step`; what is no number is no reason to drop a row."""
    try:
        return not float(x) >= step
    except ValueError:
        return True


def drop_incomplete_line(path: Path) -> None:
    """Cut off what follows the last line end: a row that a kill has torn may read as a wrong number."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            length = min(start, 65536)
            start -= length
            file.seek(start)
            position = file.read(length).rfind(b"\n")
            if position >= 0:
                start += position + 1
                break
        if start < end:
            file.truncate(start)


def read_header(path: Path) -> list[str]:
    """Return the names of a file's columns; none if it is empty."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return next(csv.reader(file), [])
