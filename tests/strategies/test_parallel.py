"""At its end a process waits for gloo's threads, which may need Python for a moment more."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from trainkit.strategies.parallel import wait_for_gloo


def thread_in(tasks: Path, number: int, name: str, state: str) -> Path:
    folder = tasks / str(number)
    folder.mkdir(parents=True)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "stat").write_text(f"{number} ({name}) {state} 1 2 3")
    return folder / "stat"


def test_only_gloos_busy_threads_are_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    thread_in(tmp_path, 1, "python", "R")
    busy = thread_in(tmp_path, 2, "pt_gloo_runloop", "R")
    rests = threading.Timer(0.2, busy.write_text, ("2 (pt_gloo_runloop) S 1 2 3",))
    rests.start()
    began = time.monotonic()
    wait_for_gloo(tmp_path)
    assert time.monotonic() - began >= 0.15
    rests.join()
    busy.write_text("2 (pt_gloo_runloop) R 1 2 3")
    began = time.monotonic()
    wait_for_gloo(tmp_path, most=0.1)
    assert time.monotonic() - began >= 0.1
    wait_for_gloo(tmp_path / "no such system")
