"""Worker processes: how many fit, what they ignore, when they end, and what is said when one is killed."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, _utils, get_worker_info

from trainkit.data.order import Placed
from trainkit.data.served import Served
from trainkit.stacks import answer_asked

IGNORED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
PR_SET_PDEATHSIG = 1


class WorkerStart:
    """Begin a worker: it leaves signals to the main process, and ends with it.

    A scheduler signals all processes of a job, Ctrl-C those of a terminal; the main process then finishes its step with
    the batches that are under way.

    Args:
        then: the user's own worker_init_fn.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then
        self.by_kernel = False
        """Whether the kernel can end the worker: when the thread that starts it lives as long as the process."""

    def __call__(self, worker: int) -> None:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
        self._end_with_parent()
        answer_asked()
        info: Any = get_worker_info()
        if issubclass(type(info.dataset), Served):
            inner = object.__getattribute__(info.dataset, "_inner")
            object.__setattr__(info, "dataset", inner)  # which refuses plain assignment; it is what user code asks for
        if self.then is not None:
            self.then(worker)

    def _end_with_parent(self) -> None:
        parent = multiprocessing.parent_process()
        if parent is None:
            return
        if self.by_kernel and parent.pid == os.getppid():
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
        if not parent.is_alive():  # it ended before it could be watched
            os._exit(1)


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def suggested_max_num_workers(local_world_size: int) -> int:
    """Return how many workers each training process's loader can have, so that one core is left to the process itself.

    Args:
        local_world_size: how many training processes this machine runs.

    Raises:
        ValueError: it is less than 1.
    """
    if local_world_size < 1:
        raise ValueError(f"local_world_size must be at least 1. Received: {local_world_size}.")
    affinity = getattr(os, "sched_getaffinity", None)  # the cores that this process may use; Linux only
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)


class Crew:
    """The workers of a DataLoader, started, watched and stopped.

    torch reports a worker that died from within a signal handler, wherever the run happens to be: in the middle of an
    update of the weights, say. Here it is reported to whoever waits for the worker's batch.

    Args:
        loader: the DataLoader whose workers they are.
        name: how messages call it.
    """

    def __init__(self, loader: DataLoader[Any], name: str) -> None:
        self.name = name
        self.start = WorkerStart(loader.worker_init_fn)
        self._iterator: Callable[[], Any] = lambda: None  # torch's, which has the processes and ends them when it goes

    def serve(self, copied: DataLoader[Any]) -> None:
        """Let the workers of this copy of the DataLoader be these."""
        vars(copied).update(worker_init_fn=self.start, _get_iterator=partial(self._begin, weakref.ref(copied)))

    def _begin(self, copied: Callable[[], Any]) -> Any:
        """Return the iterator of a DataLoader; it takes the place of `_get_iterator`."""
        loader = copied()
        method = getattr(loader.multiprocessing_context, "get_start_method", multiprocessing.get_start_method)()
        self.start.by_kernel = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
        with _deaf(method != "forkserver"):
            iterator = type(loader)._get_iterator(loader)
        self._iterator = weakref.ref(iterator)
        for worker in getattr(iterator, "_workers", ()):
            worker._popen.terminate = worker._popen.kill  # torch and multiprocessing end one that is stuck; it is deaf
        self._unwatch(iterator)
        return iterator

    def _unwatch(self, iterator: Any) -> None:
        if getattr(iterator, "_worker_pids_set", False):
            signals: Any = _utils.signal_handling
            signals._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False

    def complete(self) -> bool:
        """Whether there are workers, and all of them live."""
        iterator = self._iterator()
        return iterator is not None and not iterator._shutdown and all(map(_is_alive, iterator._workers))

    def end(self) -> None:
        """End the workers, though an error may still hold on to who waited for them."""
        iterator = self._iterator()
        if iterator is not None:
            iterator._shutdown_workers()

    def receive(self, batches: Iterator[Any], asked: Iterable[Placed] = (), first: int = 0) -> Any:
        """Return the next batch, or the iterator itself at its end; a worker that died is noticed at once.

        Args:
            batches: the DataLoader's iterator, or one that goes through it.
            asked: the batches that were asked for last.
            first: the index of the batch that was asked for first.

        Raises:
            RuntimeError: a worker died.
        """
        iterator = self._iterator()
        if iterator is None or iterator._shutdown:
            return next(batches, batches)
        signals: Any = _utils.signal_handling
        signals._set_worker_pids(id(iterator), tuple(worker.pid for worker in iterator._workers))
        iterator._worker_pids_set = True
        try:
            signals._error_if_any_worker_fails()
            return next(batches, batches)
        except Exception as error:  # an OSError, too, where a batch lies in the memory of a worker that is gone
            self._unwatch(iterator)
            told = self._told(iterator, asked, first)
            if told is None:
                raise
            raise RuntimeError(told) from error
        finally:
            self._unwatch(iterator)

    def _told(self, iterator: Any, asked: Iterable[Placed], first: int) -> str | None:
        """Return what to say about a worker that died, None when all are well."""
        gone = multiprocessing.connection.wait([process.sentinel for process in iterator._workers], timeout=0.1)
        for process in iterator._workers:
            if process.sentinel in gone:
                process.join(timeout=1)  # it may still be on its way out
        streams = issubclass(type(iterator._dataset), IterableDataset)  # whose workers end when they have no more data
        ends = {
            worker: process.exitcode
            for worker, process in enumerate(iterator._workers)
            if process.exitcode or (process.exitcode == 0 and not streams)
        }
        if not ends:
            return None
        worker, code = max(ends.items(), key=lambda end: end[1] != 0)
        if code == -signal.SIGKILL:
            how = "was killed (signal 9: most often the kernel's out-of-memory killer; fewer workers need less memory)"
        elif code < 0:
            how = f"was killed (signal {-code}: {signal.strsignal(-code)})"
        else:
            how = f"ended with exit code {code}"
        waiting = sorted(first + sent for sent, task in iterator._task_info.items() if task == (worker,))
        message = f"{self.name}: a worker process {how}"
        if waiting:
            message += f" while loading batch {' or '.join(map(str, waiting))}"
        batches = [batch for batch in asked if batch.batch_idx in waiting]
        if batches:
            indices = " or ".join(str(batch[:]) for batch in batches)
            message += f" of epoch {batches[0].epoch}: samples with the indices {indices}"
        return f"{message}."


def _is_alive(process: Any) -> bool:
    return bool(process.is_alive())


@contextlib.contextmanager
def _deaf(wanted: bool) -> Iterator[None]:
    """Let processes that are started now hear no signal before they can ignore it."""
    if not wanted or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
