"""What a process that a launcher started does for the others: it dies with them, and its messages are found.

begin        once a process, when its first Trainer is made
  stay        it ends when its agent is gone: nobody else would end it
  on_error    an uncaught exception is written where the agent looks for it (torch's error file), so that the first one
              of all is shown, and not that of a process that only lost its connection to it
  rank log    rank 0 has the terminal; warnings of the others go to logs/rank1.log and so on in the run's directory
keep_log     once the run has a directory

Of processes that the Trainer started itself (launch.py) all of stderr goes to that file, and their agent shows the
error that ended the run. Those of torchrun, SLURM and MPI keep stderr, and with it their tracebacks.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from trainkit.errors import MissingRankError
from trainkit.rank_zero import rank_zero_only
from trainkit.signals import Interruption
from trainkit.world import World

if TYPE_CHECKING:
    from trainkit.trainer import Trainer

LAUNCHER = "TRAINKIT_LAUNCHER"
"""The environment variable with the process that launched this one by `launch.py`."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
MOVED = "stderr.moved"
"""The file that says where a process's stderr goes now, for its agent."""
PATIENCE = 5.0  # seconds that a process which lost its connection waits for its agent to end it
ORPHANED = 30.0  # seconds that one whose agent is gone may take to finish its step and save

LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "Timed out waiting",
    "failed on rank 0:", "failed on node ", "NCCL communicator was aborted", "remote process exited",
    "recvValue failed", "sendBytes failed",
)  # fmt: skip
"""What errors say that are no cause, but come of another process's end."""

_log: RankLog | None = None
_begun = False


def is_ours() -> bool:
    """Whether a Trainer started this process."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


def begin(world: World) -> None:
    """Do what one of several processes owes the others; once a process."""
    global _begun, _log
    if _begun or not world.launcher:
        return
    _begun = True
    rank_zero_only.rank = world.rank  # type: ignore[attr-defined]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stay()
        sys.excepthook = on_error(sys.excepthook, world.rank)
    if world.rank > 0:
        _log = RankLog(world.rank)


# ---------------------------------------------------------------- it ends with its agent
def stay() -> None:
    """End this process when its agent is gone: by SIGTERM, after which it may finish its step and save."""
    agent = os.getppid()
    launcher = os.environ.get(LAUNCHER, "")
    if launcher.isdigit() and int(launcher) != agent and not is_running(int(launcher)):
        os.kill(os.getpid(), signal.SIGTERM)  # it was killed while this process began
    threading.Thread(target=_watch, args=(agent,), name="trainkit-agent", daemon=True).start()


def is_running(pid: int) -> bool:
    """Whether there is such a process, or one that has ended and whose parent has not looked yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _watch(agent: int) -> None:
    # not prctl's PR_SET_PDEATHSIG: it may send one signal for each thread of the agent, and a second one stops at once
    _wait_for_end(agent)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHANED)
    os._exit(128 + signal.SIGTERM)


def _wait_for_end(agent: int) -> None:
    """Wait until the agent has ended, without waking up where the system can do that."""
    if hasattr(os, "pidfd_open"):
        import select

        try:
            there = os.pidfd_open(agent)
        except OSError:
            pass
        else:
            waiting = select.poll()
            waiting.register(there, select.POLLIN)
            waiting.poll()
            os.close(there)
            return
    while os.getppid() == agent:
        time.sleep(1.0)


# ---------------------------------------------------------------- its error is found
def note(error: BaseException, uncaught: bool = False) -> None:
    """Write an exception where the agent looks for the one that ended a run.

    Args:
        error: what was raised.
        uncaught: nobody has caught it, and told of it.
    """
    path = os.environ.get(ERROR_FILE)
    if not path or not isinstance(error, Exception):
        return
    now = time.time()
    info = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(now))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": info}
    unfinished = f"{path}.unfinished"
    with contextlib.suppress(OSError):
        found = {"time": _first_time(error, now), "lost": is_lost(error), "uncaught": uncaught}
        Path(unfinished).write_text(json.dumps({"message": message, "trainkit": found}))
        os.replace(unfinished, path)


_noted: tuple[int, float] = (0, 0.0)


def _first_time(error: BaseException, now: float) -> float:
    """Return when an exception was noted first: a run notes it, and then the process that it ends."""
    global _noted
    if _noted[0] != id(error):
        _noted = (id(error), now)
    return _noted[1]


def is_lost(error: BaseException | None) -> bool:
    """Whether an exception is a lost connection to another process, whose own error is the cause."""
    if isinstance(error, MissingRankError):
        return False
    from torch.distributed import DistBackendError, DistNetworkError

    seen: list[BaseException] = []
    while error is not None and error not in seen:  # torch's compiler makes errors that are their own cause
        about = isinstance(error, (RuntimeError, ConnectionError)) and any(text in str(error) for text in LOST)
        if about or isinstance(error, (DistBackendError, DistNetworkError)):
            return True
        seen.append(error)
        error = error.__cause__
    return False


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def on_error(shown: Hook, rank: int) -> Hook:
    """Return an excepthook that notes an exception before it is shown."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        note(error, uncaught=True)
        if is_ours():
            if rank == 0 and isinstance(error, Exception):
                return  # the agent shows it, behind the one that it may have come of
        elif is_lost(error) and not Interruption.asked:
            time.sleep(PATIENCE)  # the agent ends this process when it sees that the other one has failed
        shown(kind, error, trace)

    return hook


# ---------------------------------------------------------------- its messages are found
class RankLog:
    """Where the messages of a process go that is not rank 0.

    Args:
        rank: which process this is.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.path: Path | None = None
        self._early: list[str] = []  # warnings from before the run had a directory
        self._file: TextIO | None = None
        self._ours = is_ours() and _early_log() is not None
        if not self._ours and getattr(warnings.showwarning, "__module__", None) == "warnings":
            warnings.showwarning = self._show
        atexit.register(self.close)

    def _show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        recorded: Any = getattr(warnings, "_showwarnmsg_impl", None)
        if file is None and recorded is not None and getattr(recorded, "__module__", None) != "warnings":
            recorded(warnings.WarningMessage(message, category, filename, lineno, file, line))  # as by catch_warnings
            return
        text = warnings.formatwarning(message, category, filename, lineno, line)
        if file is not None:
            file.write(text)
        elif self._file is not None:
            self._file.write(text)
        else:
            self._early.append(text)

    def keep_in(self, folder: str | os.PathLike[str]) -> None:
        """Go on in the log directory of a run, and take along what was written before."""
        path = Path(folder) / "logs" / f"rank{self.rank}.log"
        if path == self.path or "://" in str(folder):
            return
        with contextlib.suppress(OSError):  # a run is not lost for its messages
            path.parent.mkdir(parents=True, exist_ok=True)
            to = path.open("a", buffering=1)
            self.path = path
            if self._ours:
                self._take_over(to)
            else:
                to.writelines(self._early)
                self._early.clear()
                self._file = to

    def _take_over(self, to: TextIO) -> None:
        """Let stderr itself go there."""
        sys.stderr.flush()
        early = _early_log()
        if early is not None:
            to.write(early.read_text(errors="replace"))
            to.flush()
            early.unlink()
        with contextlib.suppress(OSError):
            Path(os.environ[ERROR_FILE]).with_name(MOVED).write_text(str(self.path))
        os.dup2(to.fileno(), 2)
        to.close()

    def close(self) -> None:
        """Leave no empty file behind, and show what never found one."""
        for text in self._early:
            sys.stderr.write(text)
        self._early.clear()
        if self.path is not None and self.path.exists() and self.path.stat().st_size == 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()


def _early_log() -> Path | None:
    """Return the file that torch's agent has sent this process's stderr to."""
    path = Path(os.environ.get(ERROR_FILE, "")).with_name("stderr.log") if os.environ.get(ERROR_FILE) else None
    return path if path is not None and path.exists() else None


def keep_log(trainer: Trainer) -> None:
    """Send the messages of ranks other than 0 to the directory of a run, which is known from here on."""
    if _log is not None:
        _log.keep_in(trainer.log_dir or trainer.default_root_dir)
