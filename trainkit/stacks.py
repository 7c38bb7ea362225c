"""Stacks: what a thread is doing, in the words of somebody who wrote the program it runs.

place_of       of the frames of the main thread: whose function it is in, or for whom it waits
all_stacks     every thread's stack as text
worker_stack   that of a data loader's worker process, which is asked for it by a signal (Linux)
"""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import os
import re
import signal
import site
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch

TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
CALLBACKS = os.path.join(os.path.dirname(HERE.rstrip(os.sep)), "callbacks") + os.sep
LIBRARIES = tuple(
    {os.path.join(path, "") for path in (*site.getsitepackages(), *map(sysconfig.get_path, ("stdlib", "purelib")))}
)
DISTRIBUTED = os.path.join(TORCH, "distributed", "")
LOADER = os.path.join(TORCH, "utils", "data", "dataloader.py")
PARALLEL = os.path.join(TORCH, "nn", "parallel", "distributed.py")
WAITING = (DISTRIBUTED, PARALLEL, os.path.join(HERE, "data", "together.py"))
"""Files whose functions wait for other processes where they do not compute."""
COLLECTIVES = {
    "all_reduce", "all_reduce_coalesced", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "recv", "reduce",
    "monitored_barrier", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
    "wait_tensor",
}  # fmt: skip
"""Functions of torch.distributed in which a process waits for others."""
COMPILERS = tuple(os.path.join(TORCH, name, "") for name in ("_dynamo", "_inductor", "_functorch"))
DEBUGGERS = ("pdb.py", "bdb.py")

ASKED = "trainkit-stack"
"""The name of the file in memory to which a worker writes its stack."""


class Frame(NamedTuple):
    """One function that is running."""

    file: str
    line: int
    name: str
    code: FrameType | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is trainkit's own."""
        return self.file.startswith((HERE, CALLBACKS))

    @property
    def is_users(self) -> bool:
        """Whether it is neither trainkit's, nor torch's, nor another library's."""
        return not self.is_ours and not self.file.startswith((TORCH, *LIBRARIES)) and not self.file.startswith("<")

    @property
    def where(self) -> str:
        """The line, as short as it can be found."""
        path = os.path.relpath(self.file) if self.file.startswith(os.getcwd() + os.sep) else self.file
        if os.path.isabs(path):
            path = os.sep.join(path.split(os.sep)[-2:])
        return f"{path}:{self.line}"


class Place(NamedTuple):
    """What a thread is doing.

    Args:
        kind: "runs" a function; "waits" for other processes; "worker": waits for a data loader's worker.
        name: the function, or what it waits in.
        where: the line of the user's code, "" when there is none.
        slow: it may take long: a checkpoint, a compilation, a hook of an epoch.
        quiet: nobody knows how long it takes: a download, a debugger.
    """

    kind: str
    name: str
    where: str = ""
    slow: bool = False
    quiet: bool = False

    def __str__(self) -> str:
        at = f" ({self.where})" if self.where else ""
        return {
            "runs": f"is in {self.name}{at}",
            "waits": f"waits in {self.name}{at}",
            "worker": f"waits for {self.name}",
        }[self.kind]


# ---------------------------------------------------------------- this process
def frames_of(thread: int) -> list[Frame]:
    """Return what a thread is running, the innermost function first."""
    frame, found = sys._current_frames().get(thread), []
    while frame is not None:
        code = frame.f_code
        found.append(Frame(code.co_filename, frame.f_lineno or 0, code.co_qualname.replace("<locals>.", ""), frame))
        frame = frame.f_back
    return found


def place_of(frames: Sequence[Frame], idle: bool = True) -> Place:
    """Return what a thread is doing inside of a run.

    Args:
        frames: what it is running, the innermost function first.
        idle: it does not compute, so in backward it waits for the gradients of others.
    """
    outermost = max((index for index, frame in enumerate(frames) if frame.is_ours), default=len(frames))
    inside = frames[:outermost]
    names = [frame.name.rpartition(".")[2] for frame in inside]
    users = next((index for index, frame in enumerate(inside) if frame.is_users), None)
    where = "" if users is None else inside[users].where
    slow = any(
        frame.file.startswith((*COMPILERS, HERE + "checkpoint", CALLBACKS + "checkpoint"))
        or (name.startswith("on_") and "batch" not in name and name.endswith(("_start", "_end")))
        for frame, name in zip(inside, names, strict=True)
    )
    quiet = "prepare_data" in names or any(frame.file.endswith(DEBUGGERS) for frame in inside)
    waiting = _waiting(inside, names, idle)
    if waiting is not None:
        kind, name = waiting
        own = inside[users].name.rpartition(".")[2] if users is not None else ""
        direct = own not in ("training_step", "forward") and kind == "waits" and "backward" not in name
        return Place(kind, name, where if direct else "", slow, quiet)
    if users is None:
        return Place("runs", *_library(inside or frames), slow, quiet)
    return Place("runs", inside[users].name, where, slow, quiet)


def _waiting(inside: Sequence[Frame], names: Sequence[str], idle: bool) -> tuple[str, str] | None:
    """Return for whom a thread waits, and in what; None when it does not."""
    found = None
    for frame, name in zip(inside, names, strict=True):
        if frame.is_users:
            break
        if frame.file == LOADER and name in ("_try_get_data", "_get_data"):
            return "worker", "its data loader's worker"
        if frame.file.startswith(DISTRIBUTED) and name in COLLECTIVES:
            found = "waits", name  # the outermost of them: all_gather_object calls all_gather
        elif frame is inside[0] and idle and frame.file.startswith(WAITING):
            found = "waits", "all_reduce" if frame.file.startswith(HERE) else name
        elif name == "_engine_run_backward" and idle and found is None:
            found = "waits", "all_reduce (backward)"
        elif frame.file.startswith(os.path.join(HERE, "strategies")) and found is None:
            if name == "_answer":
                found = "waits", "on_rank_zero"
            elif name == "meet":
                found = "waits", "barrier"
    return found


def _library(frames: Sequence[Frame]) -> tuple[str, str]:
    """Return the name and the line of the function of a library that trainkit called; else trainkit's own."""
    ours = next((index for index, frame in enumerate(frames) if frame.is_ours), len(frames))
    called = [frame for frame in frames[:ours] if not frame.file.startswith(TORCH)]
    frame = called[-1] if called else frames[min(ours, len(frames) - 1)] if frames else Frame("?", 0, "Python")
    return frame.name, frame.where


def all_stacks() -> str:
    """Return the stacks of all threads, the main one first, without the one that asks."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    frames = sys._current_frames()
    main = threading.main_thread().ident
    text = []
    linecache.checkcache()
    for ident in sorted(frames, key=lambda ident: (ident != main, ident)):
        if ident != threading.get_ident():
            name = threads[ident].name if ident in threads else "a thread that Python did not start"
            text.append(f"Thread {name} (most recent call last):\n{''.join(traceback.format_stack(frames[ident]))}")
    return "".join(text)


# ---------------------------------------------------------------- the workers of its data loaders
def _ask() -> int | None:
    """Return the signal that asks a worker for its stack, None where there is none."""
    lowest = getattr(signal, "SIGRTMIN", None)
    return int(lowest) + 9 if lowest is not None and hasattr(os, "memfd_create") else None


def answer_asked() -> None:
    """Let this process, a worker, write its stack to a file in memory whenever it is asked."""
    number = _ask()
    if number is not None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            faulthandler.register(number, file=os.memfd_create(ASKED), all_threads=True)


def waited_for(frames: Sequence[Frame]) -> tuple[int, int] | None:
    """Return the number and the process id of the worker whose batch a thread waits for."""
    for frame in frames:
        if frame.file == LOADER and frame.code is not None:
            iterator: Any = frame.code.f_locals.get("self")
            with contextlib.suppress(AttributeError, KeyError, IndexError, TypeError):
                worker = iterator._task_info[iterator._rcvd_idx][0]
                return worker, iterator._workers[worker].pid
    return None


def worker_stack(pid: int, patience: float = 1.0) -> str:
    """Ask a worker for its stack, and return it; "" when it does not answer.

    Args:
        pid: which process.
        patience: seconds that it may take.
    """
    number, path = _ask(), None
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith(f"/memfd:{ASKED}"):
                    path = f"/proc/{pid}/fd/{name}"
    if number is None or path is None:  # nobody may send this signal to a process that does not expect it
        return ""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        os.kill(pid, number)
        began, text = time.monotonic(), b""
        while time.monotonic() - began < patience:
            time.sleep(0.02)
            more = file.read()
            if text and not more:
                break
            text += more
        return text.decode(errors="replace")
    return ""


def place_in(stack: str) -> Place | None:
    """Return what the thread of a stack that `worker_stack` returned is doing, None if that says nothing."""
    current = stack[stack.rfind("Current thread") :] if "Current thread" in stack else stack
    frames = [
        Frame(file, int(line), name)
        for file, line, name in re.findall(r'^  File "(.+)", line (\d+) in (.+)$', current, re.MULTILINE)
    ]
    users = next((frame for frame in frames if frame.is_users), frames[0] if frames else None)
    return None if users is None else Place("runs", users.name, users.where)
