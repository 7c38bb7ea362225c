"""One thing at a time, done in another thread; what came of it is told to the thread that asked for it.

    submit(work, done)     begins, when what was begun before is settled
    finished               whether there is something to settle
    settle()               waits if need be, and calls done(result, error) here

The thread is no daemon: a process that ends in the meantime waits for it. A worker process forked meanwhile has no such
thread and no use for one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Done = Callable[[Any, BaseException | None], None]


class Background:
    """What is done in another thread, one thing at a time."""

    def __init__(self) -> None:
        self._over: threading.Event | None = None  # not Thread.join: a Ctrl-C in there makes it forget the thread
        self._done: Done | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self.joint = False
        """Whether it is one of several processes' work on one thing: they settle it at the same place, not when each
        of them is ready."""

    @property
    def busy(self) -> bool:
        """Whether something was begun that is not settled yet."""
        return self._over is not None

    @property
    def finished(self) -> bool:
        """Whether something is over and can be settled without waiting."""
        return self._over is not None and self._over.is_set() and not self.joint

    def submit(self, work: Callable[[], Any], done: Done) -> None:
        """Begin something, after what was begun before is settled.

        Args:
            work: called in the other thread.
            done: called by `settle`, in the thread that calls it, with what `work` returned or raised.
        """
        self.settle()
        self._result = self._error = None
        self._done, self._over = done, threading.Event()
        threading.Thread(target=self._run, args=(work, self._over), name="trainkit-checkpoint", daemon=False).start()

    def settle(self) -> None:
        """Wait for what was begun, if anything was, and tell what came of it. An interrupt leaves it as it is."""
        if self._over is None or self._done is None:
            return
        self._over.wait()
        done, result, error = self._done, self._result, self._error
        self._over = self._done = self._result = self._error = None
        done(result, error)

    def _run(self, work: Callable[[], Any], over: threading.Event) -> None:
        try:
            self._result = work()
        except BaseException as error:  # told by settle
            self._error = error
        finally:
            over.set()
