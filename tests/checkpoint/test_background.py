"""One thing at a time in another thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainkit.checkpoint.background import Background


def test_what_came_of_it_is_told_in_the_thread_that_asks() -> None:
    background, told = Background(), []
    threads: list[threading.Thread] = []

    def work() -> int:
        threads.append(threading.current_thread())
        return 7

    background.submit(work, lambda result, error: told.append((result, error, threading.current_thread())))
    assert background.busy
    background.settle()
    background.settle()
    assert told == [(7, None, threading.current_thread())]
    assert threads[0] is not threading.current_thread()
    assert not threads[0].daemon
    assert not background.busy


def test_one_thing_at_a_time_and_the_one_before_is_settled_first() -> None:
    background, order = Background(), []

    def done(name: str) -> Any:
        return lambda result, error: order.append(name)

    background.submit(lambda: (time.sleep(0.05), order.append("one")), done("one is settled"))
    assert not background.finished
    background.submit(lambda: order.append("two"), done("two is settled"))
    background.settle()
    assert order == ["one", "one is settled", "two", "two is settled"]


def test_an_error_is_told_and_the_next_thing_can_begin() -> None:
    background, told = Background(), []
    background.submit(lambda: 1 / 0, lambda result, error: told.append(type(error)))
    while not background.finished:
        time.sleep(0.001)
    background.submit(lambda: 3, lambda result, error: told.append(result))
    background.settle()
    assert told == [ZeroDivisionError, 3]


def test_an_error_of_done_leaves_nothing_under_way() -> None:
    background = Background()

    def done(result: Any, error: Any) -> None:
        raise ValueError("heard")

    background.submit(lambda: None, done)
    with pytest.raises(ValueError, match="heard"):
        background.settle()
    assert not background.busy


def test_a_process_that_ends_waits_for_what_is_under_way(checkout: Path, tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from trainkit.checkpoint.background import Background; "
        "Background().submit(lambda: (time.sleep(0.3), Path('there').touch()), print)"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
    assert (tmp_path / "there").exists()


def test_an_interrupt_while_waiting_leaves_it_under_way() -> None:
    background, told = Background(), []
    go_on = threading.Event()
    background.submit(lambda: go_on.wait(60), lambda result, error: told.append(result))
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        background.settle()
    timer.join()
    assert background.busy
    assert not background.finished
    go_on.set()
    background.settle()
    assert told == [True]
