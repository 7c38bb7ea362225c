"""TensorBoardLogger: one event file per run, read by TensorBoard."""

from __future__ import annotations

import inspect
import io
import os
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.errors import MisconfigurationException
from trainkit.loggers.base import (
    FileLogger,
    append,
    as_mapping,
    check_metrics,
    check_stays_below,
    number,
    plain,
    rank_zero_experiment,
)
from trainkit.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(FileLogger):
    """Write metrics, hyper-parameters and the graph for TensorBoard to `<save_dir>/<name>/version_N`.

    All values of one `log_metrics` call go into one event, and everything, what is drawn through `experiment`
    included, into one event file. Scalars are stored as 32-bit floats. See them with `tensorboard --logdir <save_dir>`.

    Args:
        save_dir: where all experiments lie.
        name: the experiment, a directory below `save_dir`; "" or None for none.
        version: an int N for `version_N`, a string for that very name, None for the next free number.
        log_graph: record the module's graph, traced in evaluation mode with its `example_input_array`.
        default_hp_metric: give the HParams tab a placeholder metric, `hp_metric` = -1, when hyper-parameters are
            logged without metrics; without it such hyper-parameters go to `hparams.yaml` only.
        prefix: put before every metric's name, with a dash between.
        sub_dir: a directory below `version_N` for the event file and `hparams.yaml`.
        summary_writer_kwargs: for `torch.utils.tensorboard.SummaryWriter`. Events go to the file when `max_queue` (10)
            of them wait, or when the last write is `flush_secs` (here 1) ago; a crash loses at most those that wait.

    Example:
        >>> logger = TensorBoardLogger("logs", name="digits")
        >>> logger.log_metrics({"train_loss": 0.5, "epoch": 0}, step=49)
        >>> logger.experiment.add_text("note", "anything a SummaryWriter can do")
        >>> logger.save()
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **summary_writer_kwargs: Any,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._sub_dir = os.fspath(sub_dir) if sub_dir else ""
        check_stays_below("sub_dir", self._sub_dir)
        if "log_dir" in summary_writer_kwargs:
            raise TypeError("TensorBoardLogger has no argument log_dir; it is made of save_dir, name and version.")
        self._writer_options = {"max_queue": 10, "flush_secs": 1, **summary_writer_kwargs}
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._rewind_to: int | None = None
        self._resumed_after: int | None = None
        self._hparams_are_there = False
        self._session_end: Any = None
        self._writer: Any = None
        self._new_event: Any = None

    @property
    def log_dir(self) -> str:
        """The directory of this run; asking for it makes nothing on disk."""
        return str(Path(super().log_dir, self._sub_dir))

    @property
    def sub_dir(self) -> str | None:
        """The directory below `version_N` that was asked for."""
        return self._sub_dir or None

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The `SummaryWriter`, for images, histograms, text and the like; opened when it is first asked for."""
        if self._writer is None or self._writer.file_writer is None:  # or its user has closed it
            self._writer = self._open_writer()
        return self._writer  # type: ignore[no-any-return]

    @rank_zero_only
    def check_writable(self) -> None:
        """Make the run directory, prove that a file can be written in it, and check the `SummaryWriter`'s arguments.

        Raises:
            MisconfigurationException: naming the directory or the argument, the reason, and what to change.
        """
        known = inspect.signature(import_summary_writer()).parameters
        for name in self._writer_options:
            if name not in known:
                raise MisconfigurationException(
                    f"TensorBoardLogger has no argument {name!r}, and neither has SummaryWriter; "
                    f"it takes {', '.join(sorted(known.keys() - {'log_dir'}))}."
                )
        super().check_writable()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record values at x value `step`.

        Args:
            metrics: numbers or tensors of one element by name; a mapping of them is drawn as several lines in one
                chart (`SummaryWriter.add_scalars`); a metric called "step" takes the place of `step`.
            step: the x value; one more than the last by default.
        """
        check_metrics(metrics)
        if not metrics:
            return
        metrics, step = self._place(metrics, step)
        prefix = self._prefix
        writer: Any = self.experiment
        event = self._new_event()
        add = event.summary.value.add
        for name, value in metrics.items():
            if type(value) is float:
                add(tag=prefix + name, simple_value=value)
            elif isinstance(value, Mapping):
                lines = {str(key): number(f"{name}/{key}", item) for key, item in value.items()}
                with self._reported():
                    writer.add_scalars(prefix + name, lines, step)
            else:
                add(tag=prefix + name, simple_value=number(name, value))
        if event.summary.value:
            try:
                writer.file_writer.add_event(event, step)
            except OSError as error:
                raise self._failure(error) from error

    @rank_zero_only
    def log_hyperparams(
        self,
        params: Mapping[str, Any] | Namespace | None = None,
        metrics: Mapping[str, float] | float | None = None,
        step: int | None = None,
    ) -> None:
        """Write `hparams.yaml`, and the HParams tab's record into the event file.

        Args:
            params: any values; nested mappings are shown as `outer/inner`, what is no number, string or bool as text.
            metrics: the metrics to compare runs by, with a first value each; a number stands for `hp_metric`.
            step: the x value of these; by default where the run is.
        """
        super().log_hyperparams(params)
        if metrics is None:
            if not self._default_hp_metric:
                return
            values: dict[str, float] = {"hp_metric": -1.0}
        else:
            values = dict(metrics) if isinstance(metrics, Mapping) else {"hp_metric": metrics}
            values = {name: number(name, value) for name, value in values.items()}
        from torch.utils.tensorboard.summary import hparams

        with self._reported():
            writer: Any = self.experiment
            experiment, session_start, self._session_end = hparams(  # type: ignore[no-untyped-call]
                flat(plain(as_mapping(params))), values
            )
            if self._hparams_are_there and (metrics is None or self._last_step == self._resumed_after is not None):
                return  # placeholders, which the run got when it began
            writer.file_writer.add_summary(experiment)
            writer.file_writer.add_summary(session_start)
            for name, value in values.items():
                writer.add_scalar(name, value, max(0, self._last_step or 0) if step is None else step)
        self._hparams_are_there = True

    @rank_zero_only
    def log_graph(self, module: Any, input_array: Any = None) -> None:
        """Record the module's graph, if `log_graph=True`. Modes, gradients and random numbers stay as they were."""
        if not self._log_graph:
            return
        if input_array is None:
            input_array = getattr(module, "example_input_array", None)
        if input_array is None:
            warnings.warn(
                "log_graph=True, but there is nothing to trace the graph with. "
                "Set self.example_input_array in the module's __init__ to a batch as forward takes it.",
                stacklevel=2,
            )
            return
        import torch

        from trainkit.export import without_run
        from trainkit.tree import map_tensors

        if not isinstance(input_array, (torch.Tensor, tuple, list)):
            warnings.warn(
                "log_graph=True, but a graph is traced with tensors by position only. Make self.example_input_array a "
                f"tensor or a tuple of them. It is a {type(input_array).__name__}.",
                stacklevel=2,
            )
            return
        tensor = next(chain(module.parameters(), module.buffers()), None)
        device = torch.device("cpu") if tensor is None else tensor.device
        modes = [(part, part.training) for part in module.modules()]
        try:
            with (
                # the tracer asks for every attribute, and a module that is in no run has no trainer
                nullcontext() if vars(module).get("_trainer") is not None else without_run(module),
                torch.no_grad(),
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                warnings.catch_warnings(),
            ):
                # SummaryWriter.add_graph, and nothing else that it could use, traces with torch.jit.
                warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
                self.experiment.add_graph(module, map_tensors(lambda leaf: leaf.to(device), input_array))
        except Exception as error:
            error.add_note("The graph could not be traced. TensorBoardLogger(log_graph=False) trains without it.")
            raise
        finally:
            for part, mode in modes:
                part.training = mode

    @rank_zero_only
    def save(self) -> None:
        """Write all events."""
        if self._writer is not None:
            with self._reported():
                self._writer.flush()

    @rank_zero_only
    def sync(self) -> None:
        """Write all events and have them on the disk, safe from a power loss as well; may take some milliseconds."""
        self.save()
        if self._writer is not None and self._writer.file_writer is not None:
            with self._reported():
                self._writer.file_writer.event_writer.sync()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Save and close. The HParams tab hears only of success: a run that failed may be resumed and succeed."""
        if self._made and not Path(self.log_dir, self.NAME_HPARAMS_FILE).exists():
            FileLogger.log_hyperparams(self, {})  # there is one beside every event file, as Lightning has it
        if status == "success" and self._session_end is not None:
            with self._reported():
                writer: Any = self.experiment
                writer.file_writer.add_summary(self._session_end)
            self._session_end = None
        super().finalize(status)

    @rank_zero_only
    def close(self) -> None:
        """Write all events; logging again opens another event file in the same directory."""
        if self._writer is not None:
            with self._reported():
                self._writer.close()
            self._writer = None

    def _rewind(self, step: int) -> None:
        self._rewind_to, self._resumed_after = step, step - 1
        self._hparams_are_there = step > 0 and bool(event_files(Path(self.log_dir)))

    def _version_directory(self, log_dir: Path) -> Path:
        parts = Path(self._sub_dir).parts
        return log_dir.parents[len(parts) - 1] if parts and log_dir.parts[-len(parts) :] == parts else log_dir

    def _open_writer(self) -> Any:
        summary_writer = import_summary_writer()
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from torch.utils.tensorboard import FileWriter

        self._claim()
        self._new_event = Event
        log_dir, options = Path(self.log_dir), self._writer_options
        limits = options["max_queue"], options["flush_secs"]
        with self._reported():
            writer = in_this_thread(partial(summary_writer, str(log_dir), **options), log_dir, *limits)
            if self._rewind_to is not None:
                # The lines that add_scalars draws are runs in directories below, by names that the writer knows.
                for directory in line_directories(log_dir):
                    name = f"{log_dir}/{directory.relative_to(log_dir).as_posix()}"
                    writer.all_writers[name] = in_this_thread(partial(FileWriter, name), directory, *limits)
                # A START event hides what comes before it in its directory at this x and later; one of TensorBoard's
                # three readers takes the first of a directory for the beginning of the run, and heeds the second.
                for file_writer in (*writer.all_writers.values(),) * 2:
                    file_writer.add_event(Event(session_log={"status": "START"}), self._rewind_to)
        self._rewind_to = None
        return writer

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Raise an OSError again with the directory that it is about."""
        try:
            yield
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> OSError:
        return OSError(error.errno, f"Events could not be written to {self.log_dir}: {error.strerror}")

    def __getstate__(self) -> dict[str, Any]:
        # A copy shares the directory and opens an event file of its own.
        return self.__dict__ | {"_writer": None, "_new_event": None, "_session_end": None}


class EventFile:
    """Append events to a file in the caller's thread; stands in for the writer that tensorboard runs in a thread.

    Tensorboard's writer opens and closes the file for each event and computes checksums in Python while the loop waits
    for the interpreter lock: 41 us of CPU time per event of one scalar, here 10.

    Args:
        path: the event file; it begins with what tensorboard's writer has written.
        max_queue: write when so many events wait.
        flush_secs: write an event at once when the last write is so many seconds ago.
    """

    def __init__(self, path: Path, max_queue: int, flush_secs: float) -> None:
        from torch.utils.tensorboard import RecordWriter

        self._path = path
        self._max_queue = max_queue
        self._flush_secs = flush_secs
        self._waiting = 0
        self._written_at = 0.0
        self._synced = True
        self._lock = threading.RLock()  # callbacks that watch the machine log from threads; signals interrupt this one
        self._buffer = io.BytesIO()
        self._records: Any = RecordWriter(self._buffer)

    def get_logdir(self) -> str:
        """Return the directory of the file."""
        return str(self._path.parent)

    def add_event(self, event: Any) -> None:
        """Take an `Event` and write what waits, if it is time."""
        with self._lock:
            self._records.write(event.SerializeToString())
            self._waiting += 1
            if self._waiting >= self._max_queue or not 0 <= event.wall_time - self._written_at < self._flush_secs:
                self._write()
                self._written_at = event.wall_time

    def flush(self) -> None:
        """Hand all events to the system."""
        with self._lock:
            if self._waiting:
                self._write()

    def sync(self) -> None:
        """Have all events on the disk."""
        with self._lock:
            if self._waiting or not self._synced:
                self._write(durable=True)

    def close(self) -> None:
        """Hand all events to the system; the file is not kept open."""
        self.flush()

    def _write(self, durable: bool = False) -> None:
        append(self._path, self._buffer.getvalue(), durable)
        self._buffer.seek(0)
        self._buffer.truncate()
        self._waiting, self._synced = 0, durable


def import_summary_writer() -> type[SummaryWriter]:
    """Return torch's `SummaryWriter`, or say how to get what it needs."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MisconfigurationException(
            f"TensorBoardLogger needs tensorboard ({error}). Install it with `pip install tensorboard`, "
            "or log with CSVLogger."
        ) from error
    return SummaryWriter


def in_this_thread(open_writer: Callable[[], Any], directory: Path, max_queue: int, flush_secs: float) -> Any:
    """Open a `SummaryWriter` or `FileWriter` on a new event file of `directory`, and make it write in this thread.

    Readers take the event files of a directory by name. The name begins with the second in which the file was made, and
    ends with the process id and a count, as text: a run resumed within a second, or after the clock was set back, could
    be read before the run that it continues. Its file is then given the next second after the newest.
    """
    earlier = event_files(directory)
    writer = open_writer()
    file_writer = getattr(writer, "file_writer", writer)
    file_writer.event_writer.close()
    (path,) = (path for path in {*event_files(directory)} - {*earlier} if f".{os.getpid()}." in path.name)
    if earlier and path < earlier[-1]:
        second, rest = earlier[-1].name.split(".")[3], path.name.split(".", 4)[4]
        if second.isdigit():
            path = path.rename(path.with_name(f"events.out.tfevents.{int(second) + 1:010d}.{rest}"))
    path.chmod(0o600)
    file_writer.event_writer = EventFile(path, max_queue, flush_secs)
    return writer


def event_files(directory: Path) -> list[Path]:
    """Return a directory's event files in the order in which they are read."""
    return sorted(directory.glob("events.out.tfevents.*"))


def line_directories(log_dir: Path) -> list[Path]:
    """Return the directories below a run that hold event files of their own."""
    return sorted({path.parent for path in log_dir.rglob("events.out.tfevents.*")} - {log_dir})


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return plain hyper-parameters as the HParams tab can show them: one level, finite numbers, strings, bools."""
    values: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            values.update(flat(value, f"{prefix}{key}/"))
        elif isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) < float("inf")):
            values[prefix + key] = value
        else:
            values[prefix + key] = str(value)  # a NaN or infinite number is no JSON, and would break the whole tab
    return values
