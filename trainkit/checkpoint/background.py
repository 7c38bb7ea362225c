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
        self._thread: threading.Thread | None = None
        self._done: Done | None = None
        self._result: Any = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether something was begun that is not settled yet."""
        return self._thread is not None

    @property
    def finished(self) -> bool:
        """Whether something is over and can be settled without waiting."""
        return self._thread is not None and not self._thread.is_alive()

    def submit(self, work: Callable[[], Any], done: Done) -> None:
        """Begin something, after what was begun before is settled.

        Args:
            work: called in the other thread.
            done: called by `settle`, in the thread that calls it, with what `work` returned or raised.
        """
        self.settle()
        self._result = self._error = None
        self._done = done
        self._thread = threading.Thread(target=self._run, args=(work,), name="trainkit-checkpoint", daemon=False)
        self._thread.start()

    def settle(self) -> None:
        """Wait for what was begun, if anything was, and tell what came of it. An interrupt leaves it as it is."""
        if self._thread is None or self._done is None:
            return
        self._thread.join()
        done, result, error = self._done, self._result, self._error
        self._thread = self._done = self._result = self._error = None
        done(result, error)

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._result = work()
        except BaseException as error:  # told by settle
            self._error = error
