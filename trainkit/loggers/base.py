"""Logger: what a trainer tells its loggers, and FileLogger: the run directory that file loggers share.

Logger                     hears everything, does nothing: the off switch, and what users derive theirs from
  DummyLogger              stands in for the loggers of a fast_dev_run: takes any method, of any logger
  FileLogger               owns <save_dir>/<name>/version_N and the hparams.yaml in it
    CSVLogger              metrics.csv
    JSONLinesLogger        metrics.jsonl
    TensorBoardLogger      one event file
  WandbLogger, MLFlowLogger   hand everything to somebody else's program

The trainer's calls, in order:

    continue_run(directory, step)        only when a checkpoint of that directory is resumed
    check_writable()                     before the first step: what is needed is made, or the run ends here
    log_hyperparams, log_graph           once
    log_metrics(metrics=, step=)         at every log point
    save()                               at the end of an epoch, and wherever what was logged shall be seen
    sync()                               before a checkpoint is published, which its rows must not fall behind
    after_save_checkpoint(callback)
    finalize("success" | "failed" | "interrupted")

In the processes of other ranks than 0 they do nothing: `rank_zero_only` and `rank_zero_experiment` see to that.
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import wraps
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeVar

from trainkit.errors import MisconfigurationException, WrongTypeException
from trainkit.rank_zero import current_rank, rank_zero_only
from trainkit.redaction import redacted

T = TypeVar("T")


class Logger:
    """Record a run's metrics. Subclass and override what you need; as it is, it records nothing.

    With `save_dir`, `name` and `version` the run's checkpoints go to `<save_dir>/<name>/<version>/checkpoints`, where
    an int N as version is written `version_N`.

    Example:
        >>> from trainkit.rank_zero import rank_zero_only
        >>> class Printer(Logger):
        ...     @rank_zero_only
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, dict(metrics))
        >>> Printer().log_metrics({"loss": 0.5}, step=9)
        9 {'loss': 0.5}
    """

    group_separator = "/"
    """Stands between a metric's group and its name, as in `train/loss`."""

    @property
    def name(self) -> str | None:
        """The experiment's name."""
        return None

    @property
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""
        return None

    @property
    def save_dir(self) -> str | None:
        """The directory under which all experiments lie."""
        return None

    @property
    def root_dir(self) -> str | None:
        """The directory under which all versions of this experiment lie."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The directory of this run; None for a logger that writes no files."""
        return None

    @property
    def experiment(self) -> Any:
        """The object behind the logger, for what `log_metrics` can't say; here one that ignores any call."""
        return Silence()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record values at x value `step`."""

    def log_hyperparams(
        self, params: Mapping[str, Any] | Namespace, metrics: Mapping[str, float] | float | None = None
    ) -> None:
        """Record what the run was made with, and the metrics to compare runs by."""

    def log_graph(self, module: Any, input_array: Any = None) -> None:
        """Record the module's graph, traced with `input_array` or the module's `example_input_array`."""

    def save(self) -> None:
        """Write what was logged: others can read it, and a crash of the process can't take it."""

    def sync(self) -> None:
        """Save, and have it on the disk, where a power loss can't take it either."""
        self.save()

    def finalize(self, status: str) -> None:
        """Save and close at the end of a run; `status` is "success", "failed" or "interrupted"."""
        self.save()
        self.close()

    def close(self) -> None:
        """Let go of files and threads. Logging again opens them again."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Called after a checkpoint callback has saved; for loggers that upload checkpoints."""

    def continue_run(self, directory: Path, step: int) -> None:
        """Go on in a run directory whose checkpoint is being resumed: rows at x >= `step` will be logged again."""

    def check_writable(self) -> None:
        """Fail now, with the reason, if the run could not be recorded; by default, open the `experiment`."""
        _ = self.experiment


class DummyLogger(Logger):
    """Accept any call of any logger and do nothing, as the loggers of a `fast_dev_run` do."""

    @property
    def name(self) -> str:
        """The experiment's name: none."""
        return ""

    @property
    def version(self) -> str:
        """Which run this is: none."""
        return ""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __getitem__(self, index: int) -> DummyLogger:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):  # copy, pickle and inspect ask for these and must hear the truth
            raise AttributeError(name)
        return _ignore


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


class Silence:
    """Accept any attribute, call or item and do nothing: code written for a real experiment runs without one."""

    def __getattr__(self, name: str) -> Silence:
        if name.startswith("__"):  # copy, pickle and inspect ask for these and must hear the truth
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Silence:
        return self

    def __getitem__(self, key: Any) -> Silence:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def rank_zero_experiment(method: Callable[[Any], T]) -> Callable[[Any], T]:
    """Decorate a logger's `experiment`: it is opened in the process with rank 0 only; elsewhere it ignores any call.

    Example:
        >>> class Recorder(Logger):
        ...     @property
        ...     @rank_zero_experiment
        ...     def experiment(self):
        ...         return "opened"
        >>> Recorder().experiment
        'opened'
    """

    @wraps(method)
    def experiment(self: Any) -> Any:
        return method(self) if current_rank() == 0 else Silence()

    return experiment


def require(package: str, logger: str) -> None:
    """Raise ModuleNotFoundError, with the line that installs it, if a logger's library is not there."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{logger} needs {package}, which is not installed. Install it with `pip install {package}`.", name=package
        )


class FileLogger(Logger):
    """Own a run directory, `<save_dir>/<name>/version_N`, and the `hparams.yaml` in it.

    Nothing is made on disk before something is written or `check_writable` is called. An automatic version is claimed
    at that moment, by making its directory: of two processes that start together, one moves on to the next number.

    Args:
        save_dir: where all experiments lie; `~` and `$VARIABLES` are expanded.
        name: the experiment, a directory below `save_dir`; "" or None for none.
        version: an int N for `version_N`, a string for that very directory name, None for the next free number.
        prefix: put before every metric's name, with a dash between.
    """

    LOGGER_JOIN_CHAR = "-"
    """Stands between the prefix and a metric's name."""
    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
    ) -> None:
        if not isinstance(save_dir, str | os.PathLike):
            raise TypeError(f"save_dir must be a path, not {save_dir!r} ({type(save_dir).__name__}).")
        if isinstance(version, bool) or not isinstance(version, int | str | None):
            raise TypeError(f"version must be an int, a string or None, not {version!r} ({type(version).__name__}).")
        if isinstance(version, int) and version < 0:
            raise ValueError(f"version must not be negative, not {version}. Leave it out for the next free number.")
        if not isinstance(name, str | None):
            raise TypeError(f"name must be a string or None, not {name!r} ({type(name).__name__}).")
        if not isinstance(prefix, str):
            raise TypeError(f'prefix must be a string, "" for none, not {prefix!r} ({type(prefix).__name__}).')
        save_dir = local_path(save_dir)
        check_stays_below("name", name)
        check_stays_below("version", version)
        self.hparams: dict[str, Any] = {}
        """All hyper-parameters logged so far, as they were given."""
        self._save_dir = os.fspath(save_dir)
        self._name = name or ""
        self._version = version
        self._prefix = f"{prefix}{self.LOGGER_JOIN_CHAR}" if prefix else ""
        self._version_is_fixed = version is not None
        self._settled = self._version_is_fixed  # whether log_dir is final
        self._made = False
        self._last_step: int | None = None

    @property
    def name(self) -> str:
        """The experiment's name, "" for none."""
        return self._name

    @property
    def version(self) -> int | str:
        """The run's number or name. An automatic number is final once `check_writable` or a write has claimed it."""
        if self._version is None:
            self._version = self._next_version()
        return self._version

    @property
    def save_dir(self) -> str:
        """The directory under which all experiments lie, as it was given."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """The directory under which all versions of this experiment lie."""
        return str(Path(os.path.expandvars(os.path.expanduser(self._save_dir)), self.name or ""))

    @property
    def log_dir(self) -> str:
        """The directory of this run; asking for it makes nothing on disk."""
        version = self.version
        return str(Path(self.root_dir, version if isinstance(version, str) else f"version_{version}"))

    @rank_zero_only
    def check_writable(self) -> None:
        """Make the run directory and prove that a file can be written in it.

        Raises:
            MisconfigurationException: naming the directory, the reason, and what to change.
        """
        self._claim()
        with self._explained(), tempfile.NamedTemporaryFile(dir=self.log_dir, prefix=".writable-") as file:
            file.write(bytes(4096))  # an empty file can be made on a full disk
            file.flush()

    @rank_zero_only
    def log_hyperparams(
        self, params: Mapping[str, Any] | Namespace | None = None, metrics: Mapping[str, float] | float | None = None
    ) -> None:
        """Write `hparams.yaml`; what is logged later joins what is there. Values that YAML can't say become strings."""
        import yaml

        self.hparams.update(as_mapping(params))
        self._claim()
        text = yaml.safe_dump(plain(self.hparams), sort_keys=False, allow_unicode=True)
        with replacing(Path(self.log_dir, self.NAME_HPARAMS_FILE)) as file:
            file.write(text.encode())

    def continue_run(self, directory: Path, step: int) -> None:
        """Go on in `directory` with the row at x value `step`: earlier rows stay, later ones give way to the new ones.

        A fixed version that is another directory stays where it is. Nothing on disk changes before the next write.
        """
        self.close()
        directory = self._version_directory(Path(directory))
        if os.path.realpath(directory) != os.path.realpath(self._version_directory(Path(self.log_dir))):
            if self._version_is_fixed:
                return
            self._move_to(directory)
        self._settled, self._made = True, False
        self._last_step = step - 1
        self._rewind(step)

    def settle_version(self, version: int | str) -> None:
        """Take the version that another process of this run has claimed."""
        self._version, self._settled = version, True

    def _rewind(self, step: int) -> None:
        """Make the next write take the place of all rows at x >= `step`."""

    def _version_directory(self, log_dir: Path) -> Path:
        """Return the directory that bears the version, given a run's `log_dir`."""
        return log_dir

    def _move_to(self, directory: Path) -> None:
        if os.path.realpath(directory.parent) != os.path.realpath(self.root_dir):
            self._save_dir, self._name = str(directory.parent), ""
        number = version_number(directory.name)
        self._version = directory.name if number is None else number

    def _next_version(self) -> int:
        try:
            names = os.listdir(self.root_dir)
        except OSError:  # not there yet; what else may be wrong is told by the claim
            return 0
        return max((number + 1 for name in names if (number := version_number(name)) is not None), default=0)

    def _claim(self) -> None:
        """Make the run directory, once; nobody else's, if the version is automatic."""
        if self._made:
            return
        with self._explained():
            os.makedirs(self.root_dir, exist_ok=True)
            while not self._settled:
                try:
                    os.mkdir(self._version_directory(Path(self.log_dir)), 0o700)
                    self._settled = True
                except FileExistsError:
                    self._version = max(self._next_version(), int(self.version) + 1)
            os.makedirs(self.log_dir, 0o700, exist_ok=True)
        self._made = True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of an OSError which directory it is about and what to change."""
        try:
            yield
        except OSError as error:
            raise MisconfigurationException(
                f"The run directory {self.log_dir} cannot be written: {reason(error, self.log_dir)}. Choose another "
                f"place with default_root_dir= of the Trainer or save_dir= of the {type(self).__name__}."
            ) from error

    def _place(self, metrics: Mapping[str, Any], step: int | None) -> tuple[Mapping[str, Any], int]:
        """Return the metrics of a row and its x value: a metric called "step", else `step`, else one after the last."""
        if "step" in metrics:
            x = number("step", metrics["step"])
            if x != x // 1:
                raise ValueError(f'The metric "step" is the x value of its row and must be a whole number, not {x}.')
            metrics, step = {name: value for name, value in metrics.items() if name != "step"}, int(x)
        elif step is None:
            step = 0 if self._last_step is None else self._last_step + 1
        self._last_step = step
        return metrics, step


def runs_directory(logger: Logger, default: str) -> str:
    """Return the directory under which the runs of a logger's experiment lie, in `default` if it names none."""
    if isinstance(logger, FileLogger):
        return logger.root_dir
    return os.path.join(logger.save_dir or default, str(logger.name or ""))


def run_directory(logger: Logger, default: str) -> str:
    """Return the directory of a logger's run, for files that are not the logger's: `version_N` or its string."""
    version = logger.version
    name = f"version_{version}" if isinstance(version, int) else str(version or "")
    return os.path.normpath(os.path.join(runs_directory(logger, default), name))


def number(name: str, value: Any) -> float:
    """Return a metric's value as a Python number, whether it is one or a tensor of one element."""
    if type(value) is int:
        return value
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError):  # torch's and numpy's word for "more than one element"
            raise ValueError(
                f"The metric {name!r} is a tensor of shape {tuple(value.shape)}; a logger takes a number or a tensor "
                "of one element. Reduce it first, for example with .mean()."
            ) from None
    if isinstance(value, int):
        return int(value)  # a bool, too
    if isinstance(value, float):
        return float(value)
    raise WrongTypeException(
        f"The metric {name!r} is {value!r:.80} ({type(value).__name__}); "
        "a logger takes a number or a tensor of one element."
    )


def flat_row(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return metrics as Python numbers under their full names; a mapping as a value becomes `name/key`."""
    row: dict[str, float] = {}
    for name, value in metrics.items():
        if type(value) is float:
            row[prefix + name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                row[f"{prefix}{name}/{key}"] = number(f"{name}/{key}", item)
        else:
            row[prefix + name] = number(name, value)
    return row


def check_metrics(metrics: Any) -> None:
    """Raise if `metrics` is not a mapping of names to values."""
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f'log_metrics takes a mapping of names to values, as in {{"loss": 0.5}}, '
            f"not {metrics!r:.80} ({type(metrics).__name__})."
        )
    for name in metrics:
        if not isinstance(name, str):
            raise TypeError(f"A metric's name must be a string, not {name!r} ({type(name).__name__}).")


def local_path(save_dir: str | os.PathLike[str]) -> str:
    """Return the path of a directory on this machine, given as a path or a `file://` address."""
    path = os.fspath(save_dir)
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    if scheme != "file":
        raise ValueError(
            f"save_dir must be a directory of this machine, not {path!r}: rows are appended as they come, which "
            f"{scheme} storage can't do. Log to a local directory and copy it when the run is over."
        )
    return rest


def check_stays_below(argument: str, value: Any) -> None:
    """Raise if a path given as `argument` would leave the directory it is put under."""
    if isinstance(value, str) and (PurePath(value).is_absolute() or ".." in PurePath(value).parts):
        raise ValueError(f"{argument} must stay below save_dir, not {value!r}. Put the other place in save_dir.")


def version_number(directory_name: str) -> int | None:
    """Return N of "version_N", None for any other name."""
    digits = directory_name.removeprefix("version_")
    is_one = digits != directory_name and digits.isascii() and digits.isdigit()
    return int(digits) if is_one else None


def reason(error: OSError, directory: str) -> str:
    """Return in words why `directory` can't be used: what stands in its way, else what the system said."""
    for path in (*reversed(Path(directory).parents), Path(directory)):
        if os.path.lexists(path) and not os.path.isdir(path):
            return f"{path} is not a directory"
    return error.strerror or str(error)


def private(path: str, flags: int) -> int:
    """Open a file for `open`; one that is made can be read by its owner only."""
    return os.open(path, flags, 0o600)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` when the block ends well; until then and after an error `path` stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power loss after the rename may leave an empty file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append(path: Path, data: bytes, durable: bool = False) -> None:
    """Add `data` to the end of a file: all of it, or nothing when the disk is full; `durable` waits for the disk."""
    with open(path, "ab", buffering=0, opener=private) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            if durable:
                os.fsync(file.fileno())
        except BaseException:  # an interrupt, too, must not leave half a record
            file.truncate(size)
            raise


def as_mapping(params: Any) -> dict[str, Any]:
    """Return hyper-parameters as a dict, given a mapping, a namespace, a dataclass or None for none.

    What looks like a secret is "***" in it.
    """
    if params is None:
        return {}
    if isinstance(params, Mapping):
        return dict(redacted(params))
    if isinstance(params, Namespace):
        return dict(redacted(vars(params)))
    if is_dataclass(params) and not isinstance(params, type):
        return dict(redacted({field.name: getattr(params, field.name) for field in fields(params)}))
    raise TypeError(f"log_hyperparams takes a mapping or a Namespace, not {params!r:.80} ({type(params).__name__}).")


def plain(value: Any) -> Any:
    """Return `value` as None, bools, numbers, strings, lists and dicts; what is none of these becomes a string."""
    if isinstance(value, Enum):
        return plain(value.value)
    for kind in (bool, int, float, str):  # bool first: it is an int
        if isinstance(value, kind):
            return kind(value)  # of a subclass, which YAML doesn't know, the value
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value, key=str)]
    if isinstance(value, Namespace) or (is_dataclass(value) and not isinstance(value, type)):
        return plain(as_mapping(value))
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of torch or numpy
        return plain(value.item())
    if hasattr(value, "__qualname__"):  # a class or a function: its str() would hold an address
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)
