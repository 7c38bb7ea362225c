"""launch: start the processes of a run that nobody has started, by torch's elastic launcher, and end as they end.

way      when                                           what runs in each process
---      ----                                           -------------------------
script   the program is a file or a module, such as     the same command again; this process waits, and ends with the
         `python train.py` or `trainkit fit`            exit code of the run: what is behind the call runs in the others
spawn    it can't be started again: in pytest, or       the call itself (`trainer.fit(...)`); this process then has
         strategy="ddp_spawn"                           what rank 0 had: weights, metrics, counters, callbacks' states
fork     a notebook or `python -c`, something that      the same
         can't be pickled, or strategy="ddp_fork"

    launch -> elastic_launch -> torch's agent -> the processes (see launched.py)
                 Workers hears from it which they are, passes signals on, and tells whose error ended the run

A signal to this process is passed on, and means for the run what it means for one process. When one of the processes
fails, the others are ended within seconds, and its error is shown first.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from trainkit import launched
from trainkit.environment import announce
from trainkit.errors import MisconfigurationException
from trainkit.signals import NOTED, Interrupted, Preempted, SIGTERMException
from trainkit.world import World

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

STARTED_IN = os.getcwd()
"""The directory that the program was started in, as far as that is known: where trainkit was imported."""
ALONE = 3.0  # seconds that the others have, when one process has failed, to notice it and to close by themselves
STUCK = 8.0  # seconds after which those are killed that have not
TAIL = 40  # lines of what a process said last, when it left no error
RUNNERS = ("pytest", "py.test", "unittest", "nose2")
LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing.spawn")
EVENTS = "torchelastic-events-null"


def needed(world: World) -> bool:
    """Whether a run has several processes that nobody has started yet."""
    return world.size > 1 and not world.launcher


def launch(trainer: Trainer, method: str, arguments: Mapping[str, Any]) -> Any:
    """Start the processes of a run, in each of them call a method of the Trainer, and return what rank 0's returned.

    Args:
        trainer: whose world says how many.
        method: "fit", "validate", "test" or "predict".
        arguments: of the call, by name.

    Raises:
        SystemExit: the program was started again; its run is over, and so is this process.
        MisconfigurationException: the processes can't be started from here.
        Exception: what the first process that failed has raised.
    """
    way = way_of(trainer, arguments)
    announce(trainer.strategy.world)
    if way == "script":
        run_again(trainer)
    from trainkit.launch_call import call

    return call(trainer, method, {name: value for name, value in arguments.items() if name != "self"}, way)


def way_of(trainer: Trainer, arguments: Mapping[str, Any]) -> str:
    """Return how the processes of a run are started: "script", "spawn" or "fork".

    Raises:
        MisconfigurationException: they are to be on several nodes, which one process can't do; or they can't be forked.
    """
    check_nodes(trainer.strategy.world)
    wish = getattr(trainer.strategy, "start_method", None)
    if wish is None and can_run_again():
        return "script"
    nobody_finds_main = not hasattr(sys.modules["__main__"], "__file__")
    if wish in ("fork", "notebook") or (wish is None and (is_notebook() or nobody_finds_main)):
        way = "fork"
    else:
        problem = unpicklable((trainer, dict(arguments)))
        if problem and wish == "spawn":
            raise MisconfigurationException(
                f"strategy='ddp_spawn' hands the call to new processes, and it can't be pickled: {problem}. Define it "
                "in a module of its own, or use strategy='ddp_fork'."
            )
        way = "fork" if problem else "spawn"
    if way == "fork":
        check_fork(trainer)
    return way


def check_nodes(world: World) -> None:
    """Refuse several nodes: a process can start others on its own machine only."""
    if world.num_nodes > 1:
        program = shlex.join(_program(sys.orig_argv[1:])) or "train.py"
        raise MisconfigurationException(
            f"num_nodes={world.num_nodes}: nobody has started the processes on the other nodes. Start the program on "
            f"each of them: torchrun --nnodes {world.num_nodes} --nproc-per-node {world.local_size} "
            f"--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 {program}. Or in a job of SLURM: "
            f"srun --nodes {world.num_nodes} --ntasks-per-node {world.local_size} python {program}."
        )


def check_fork(trainer: Trainer) -> None:
    """Refuse to fork where it can't work."""
    if not hasattr(os, "fork"):
        raise MisconfigurationException(
            "the processes can't be forked on this system. Put the program in a file and run it, or use torchrun."
        )
    if trainer.strategy.device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise MisconfigurationException(
            "cuda is in use in this process already, and can't be used in a copy of it. Call the Trainer before "
            "anything is put on a cuda device (restart the notebook), or put the program in a file and run it."
        )


# ---------------------------------------------------------------- can it be started again?
def can_run_again() -> bool:
    """Whether this program is a file or a module that its command starts again."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None) or ""
    file = getattr(main, "__file__", None)
    if is_notebook() or is_test(name, file) or hasattr(sys, "ps1"):
        return False
    return bool(name) or (file is not None and os.path.exists(file))


def is_notebook() -> bool:
    """Whether IPython or Jupyter runs this program."""
    import builtins

    return hasattr(builtins, "get_ipython") or hasattr(builtins, "__IPYTHON__")


def is_test(name: str, file: str | None) -> bool:
    """Whether a program that runs tests runs this one."""
    runner = name.partition(".")[0] or os.path.basename(file or "")
    return runner in RUNNERS or ("PYTEST_CURRENT_TEST" in os.environ and "pytest" in sys.modules)


def _program(words: Sequence[str]) -> list[str]:
    """Return the words of a command from the program on, without the interpreter's own options."""
    takes_value = ("-W", "-X", "--check-hash-based-pycs")
    position = 0
    while position < len(words) and words[position].startswith("-") and words[position] not in ("-m", "-c", "-"):
        position += 2 if words[position] in takes_value else 1
    return list(words[position:])


class _Finder(pickle.Pickler):
    """A pickler that writes nothing down, and notes in which modules the classes and functions are."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), protocol=pickle.HIGHEST_PROTOCOL)
        self.modules: set[str] = set()

    def reducer_override(self, thing: Any) -> Any:
        named = thing if isinstance(thing, type) or callable(thing) else type(thing)
        module = getattr(named, "__module__", None)
        if isinstance(module, str):
            self.modules.add(module.partition(".")[0])
        return NotImplemented


class _Nowhere(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


def unpicklable(thing: Any) -> str:
    """Return why something can't be handed to a new process, "" if it can."""
    finder = _Finder()
    try:
        finder.dump(thing)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for name in sorted(finder.modules - {"__main__"}):
        if name not in sys.builtin_module_names and PathFinder.find_spec(name) is None and not _is_frozen(name):
            return f"it uses the module {name!r}, which a new process does not find"
    return ""


def _is_frozen(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "origin", None) == "frozen"


# ---------------------------------------------------------------- the same command again
def run_again(trainer: Trainer) -> NoReturn:
    """Start this program's command once for each process, wait, and end this process as they end.

    Raises:
        SystemExit: with 0; with the exit code of the process that failed, 128 and the number if a signal ended it; or
            as a signal ends a run of one process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.chdir(STARTED_IN)
    command = [word.replace("$", "$$") for word in sys.orig_argv[1:]]  # which torch puts local ranks in the place of
    with private_folder() as folder:
        workers = Workers(trainer.strategy.world.local_size, folder)
        failed = workers.run(sys.executable, command, report=True)
        leftover_logs(workers, trainer.default_root_dir)
    workers.leave_if_signalled(failed)
    raise SystemExit(0 if failed is None else failed.exit_code)


def leftover_logs(workers: Workers, root: str) -> None:
    """Keep what processes said that never knew of a run's directory."""
    for rank in range(1, workers.count):
        early = workers.file(rank, "stderr.log")
        if early is not None and early.stat().st_size:
            with contextlib.suppress(OSError):
                path = Path(root) / "logs" / f"rank{rank}.log"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as to:
                    to.write(early.read_bytes())


@contextmanager
def private_folder() -> Iterator[str]:
    """Make a folder for what the processes tell this one, and remove it."""
    folder = tempfile.mkdtemp(prefix="trainkit-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- the processes
@dataclass(frozen=True)
class Failure:
    """The process whose end ended the run.

    Args:
        rank: which one.
        code: what it ended with, -9 for SIGKILL.
        trace: its traceback, "" if it left none.
        said: what it said last, if it left no traceback.
        told: it has told on the terminal itself.
    """

    rank: int
    code: int
    trace: str = ""
    said: str = ""
    told: bool = False

    @property
    def exit_code(self) -> int:
        """What a shell would say of it."""
        return 128 - self.code if self.code < 0 else self.code or 1

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.trace:
            return f"rank {self.rank} raised {self.trace.rstrip().splitlines()[-1]}"
        if self.code < 0:
            return f"rank {self.rank} was ended by {_signal_name(-self.code)}"
        return f"rank {self.rank} ended with exit code {self.code}"


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


class Workers(logging.Handler):
    """The processes that torch's agent keeps: what it says of them is heard here as the records of its loggers.

    Args:
        count: how many.
        folder: where they leave their errors.
    """

    def __init__(self, count: int, folder: str) -> None:
        super().__init__()
        self.count, self.folder = count, folder
        self.pids: dict[int, int] = {}
        """The processes that run, by rank."""
        self.codes: dict[int, int] = {}
        """How those ended that have, by rank."""
        self.signal: int | None = None
        """The signal that this process was asked to pass on."""
        self.reports = False
        self._reported: Failure | None = None
        self._held = False
        self._handlers: dict[int, Any] = {}

    def run(
        self, entrypoint: str | Callable[..., Any], arguments: Sequence[Any], report: bool, start_method: str = "spawn"
    ) -> Failure | None:
        """Run a command or a function in all of them, and return whose failure ended them, None when they are done.

        Args:
            entrypoint: what.
            arguments: its arguments.
            report: show the error on stderr, before the others are ended.
            start_method: "spawn" or "fork", for a function.
        """
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        self.reports = report
        with surroundings(self.count), self._heard(), self._signals_restored(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=self.count,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1",
                max_restarts=0,  # a program that is to be restarted is started by torchrun
                monitor_interval=0.05,
                start_method=start_method,
                logs_specs=DefaultLogsSpecs(self.folder, redirects=dict.fromkeys(range(1, self.count), Std.ERR)),
            )
            try:
                elastic_launch(config, entrypoint)(*arguments)
            except ChildFailedError as error:
                self._look()
                for rank, failure in error.failures.items():
                    self.codes.setdefault(rank, failure.exitcode)
                found = self._cause_at_the_end()
                self._report(found)
                return self._reported and replace(self._reported, code=self.codes.get(self._reported.rank, 1))
            except SignalException as stopped:  # before they were known
                self.signal = int(stopped.sigval)
        return None

    # ---- what the agent says
    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Hear what torch's agent logs; nobody else does, unless the user has asked for it by LOGLEVEL."""
        from torch.distributed.elastic import events
        from torch.distributed.elastic.events.api import Event, EventSource

        events.record(Event("trainkit.launch", EventSource.AGENT))  # makes the logger of the others
        heard = [logging.getLogger(name) for name in (*LOGGERS, EVENTS)]
        before = [(logger.propagate, logger.level) for logger in heard]
        for logger in heard:
            logger.addHandler(self)
            logger.propagate = "LOGLEVEL" in os.environ and logger.name != EVENTS
        heard[-1].setLevel(logging.INFO)
        try:
            yield
        finally:
            for logger, (propagate, level) in zip(heard, before, strict=True):
                logger.removeHandler(self)
                logger.propagate = propagate
                logger.setLevel(level)

    def handle(self, record: logging.LogRecord) -> bool:
        """Take one, without the lock of a logging handler, which would be held for as long as the agent is."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Hear of a process that was started, and of the end of all when one has failed."""
        if record.name == EVENTS:
            about = json.loads(record.getMessage()).get("metadata", {})
            if about.get("state") == "START" and about.get("worker_id"):
                self.pids[int(about["global_rank"])] = int(about["worker_id"])
                if len(self.pids) == self.count:
                    self._all_started()
        elif (
            record.levelno >= logging.WARNING and len(self.pids) == self.count and self.signal is None and self._gone()
        ):
            self._hold()

    def _all_started(self) -> None:
        threading.Thread(target=self._kill_stuck, name="trainkit-workers", daemon=True).start()
        if threading.current_thread() is threading.main_thread():  # instead of torch's, which give them 30 s
            for number, before in self._handlers.items():
                signal.signal(number, signal.SIG_IGN if before is signal.SIG_IGN else self._pass_on)

    # ---- signals
    @contextmanager
    def _signals_restored(self) -> Iterator[None]:
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            numbers = {*NOTED, getattr(signal, "SIGQUIT", signal.SIGTERM)}
            found = {number: signal.getsignal(number) for number in numbers}
            self._handlers = {number: handler for number, handler in found.items() if handler is not None}
        try:
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on, and wait for the end of all here, where the agent can't end those that still save."""
        self.signal = self.signal or number
        for rank, pid in self.pids.items():
            if rank not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        while hasattr(os, "waitid") and not self._all_ended():
            time.sleep(0.02)

    def leave_if_signalled(self, failed: Failure | None) -> None:
        """End this process as a signal ends a run of one process."""
        if self.signal is None or (failed is not None and not self._is_of_signal(failed.code)):
            return
        if self.codes.get(0) == 0:  # over before it came, or a job that is queued again
            raise SystemExit(0)
        left = {signal.SIGINT: Interrupted, signal.SIGTERM: SIGTERMException}.get(signal.Signals(self.signal))
        raise (left or Preempted)(128 + self.signal)

    def _is_of_signal(self, code: int) -> bool:
        """Whether a process ended because it was asked to, by this one or by somebody else, and not by a failure."""
        return code in (0, *(128 + number for number in NOTED)) or (self.signal is not None and code == -self.signal)

    # ---- their ends
    def _all_ended(self) -> bool:
        self._look()
        return len(self.codes) == self.count

    def _look(self) -> None:
        """See who has ended, and leave it to the agent to see that, too."""
        if not hasattr(os, "waitid"):
            return
        for rank, pid in self.pids.items():
            if rank not in self.codes:
                try:
                    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                except ChildProcessError:  # the agent has seen it; what it knows comes with its error
                    continue
                if ended is not None:
                    exited = ended.si_code == os.CLD_EXITED
                    self.codes[rank] = ended.si_status if exited else -ended.si_status

    def _gone(self) -> set[int]:
        """Return the ranks that do not run any more."""
        self._look()
        return {rank for rank, pid in self.pids.items() if rank in self.codes or not launched.is_running(pid)}

    def _hold(self) -> None:
        """Keep the agent from ending the others at once: show the cause first, and let them close by themselves."""
        if self._held:
            return
        self._held = True
        began = time.monotonic()
        while time.monotonic() - began < ALONE and self._cause() is None and len(self._gone()) < self.count:
            time.sleep(0.02)  # those that ended only lost a connection, or were asked to: the cause has yet to end
        if self._cause() is not None:  # else the agent will know more
            self._report(self._cause())
        while time.monotonic() - began < ALONE and len(self._gone()) < self.count:
            time.sleep(0.02)

    def _kill_stuck(self) -> None:
        """Kill what still runs a while after one has failed; torch's agent would wait for half a minute."""
        failed_at = None
        while len(gone := self._gone()) < self.count:
            failed = any(code and not self._is_of_signal(code) for code in list(self.codes.values()))
            if failed_at is None and (failed or self._held):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > STUCK:
                for rank, pid in self.pids.items():
                    if rank not in gone:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.05)

    # ---- the cause
    def file(self, rank: int, name: str) -> Path | None:
        """Return a file that belongs to a process, None if there is none."""
        return next(Path(self.folder).glob(f"*/attempt_*/{rank}/{name}"), None)

    def errors(self) -> dict[int, dict[str, Any]]:
        """Return what the processes have left that raised something, by rank."""
        found = {}
        for rank in range(self.count):
            path = self.file(rank, "error.json")
            with contextlib.suppress(OSError, ValueError):
                if path is not None:
                    found[rank] = json.loads(path.read_text())
        return found

    def _cause(self) -> Failure | None:
        """Return the first error that is not a lost connection, as far as there is one yet."""
        errors = self.errors()
        noted = {rank: error.get("trainkit", {}) for rank, error in errors.items()}
        causes = [rank for rank, about in noted.items() if not about.get("lost") and self.codes.get(rank) != 0]
        if causes:
            return self._failure(min(causes, key=lambda rank: noted[rank].get("time", 0.0)), errors)
        return None

    def _cause_at_the_end(self) -> Failure | None:
        """Return the failure that ended the run, when it is known how all have ended."""
        if (found := self._cause()) is not None:
            return found
        errors = self.errors()
        failed = [rank for rank, code in sorted(self.codes.items()) if code]
        silent = [rank for rank in failed if rank not in errors and not self._is_of_signal(self.codes[rank])]
        others = [rank for rank in silent if self.codes[rank] != -signal.SIGTERM]  # which the agent sends
        first = next(iter([*others, *silent, *sorted(errors), *failed]), None)
        return None if first is None else self._failure(first, errors)

    def _report(self, found: Failure | None) -> None:
        """Show the failure that ended the run, once."""
        if self._reported is None and found is not None:
            self._reported = found
            if self.reports and not self._is_of_signal(found.code) and not found.told:
                self._show(found)

    def _failure(self, rank: int, errors: Mapping[int, Mapping[str, Any]]) -> Failure:
        code = self.codes.get(rank, 1)
        if rank in errors:
            message, about = errors[rank]["message"], errors[rank].get("trainkit", {})
            trace = message["extraInfo"]["py_callstack"] if isinstance(message, dict) else message
            return Failure(rank, code, trace, told=rank == 0 and not about.get("uncaught", True))
        path, moved = self.file(rank, "stderr.log"), self.file(rank, launched.MOVED)
        path = Path(moved.read_text()) if moved is not None else path
        said = ""
        with contextlib.suppress(OSError):
            said = "\n".join("" if path is None else path.read_text(errors="replace").splitlines()[-TAIL:])
        return Failure(rank, code, said=said, told=rank == 0 and code > 0)

    def _show(self, found: Failure) -> None:
        errors = self.errors()
        lines = [found.trace.rstrip() or found.said.rstrip(), f"{found.how}; the other processes are ended."]
        for rank in sorted(errors.keys() - {found.rank}):
            lost = errors[rank].get("trainkit", {}).get("lost")
            lines.append(f"rank {rank} lost its connection" if lost else self._failure(rank, errors).how)
        sys.stdout.flush()
        print(*filter(None, lines), sep="\n", file=sys.stderr, flush=True)


@contextmanager
def surroundings(count: int) -> Iterator[None]:
    """Have the environment that the processes begin with, and afterwards this process's own."""
    before = dict(os.environ)
    os.environ[launched.LAUNCHER] = str(os.getpid())
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a store of their own, as where they are restarted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
