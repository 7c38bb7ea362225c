"""Run a few lines of Python as the N processes of a run, and see what each of them printed: the fixture `processes`.

    def test_all_see_one_sum(processes):
        ranks = processes(2, '''
            import torch, torch.distributed as dist
            dist.init_process_group("gloo")
            one = torch.ones(1)
            dist.all_reduce(one)
            print(one.item())
        ''')
        assert [rank.out for rank in ranks] == ["2.0\\n", "2.0\\n"]

The processes have the environment that torchrun gives its workers, with a store that this process keeps, so no port can
be taken by somebody else. Starting them takes as long as importing torch: do a lot in one call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

CHECKOUT = Path(__file__).resolve().parents[1]
GRACE = 5.0  # seconds that the others may go on when one of them has failed


class Result(NamedTuple):
    """How one process ended, and what it said."""

    rank: int
    out: str
    err: str
    code: int
    """0, or what it ended with; -9 for SIGKILL. Those that had to be ended because another one failed have -9, too."""


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process in which this checkout is imported and torch has one thread."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})}


def run(
    nproc: int,
    source: str,
    *args: object,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
    check: bool = True,
) -> list[Result]:
    """Run `source` in so many processes, and return how each of them ended, by rank.

    Args:
        nproc: how many.
        source: a script; its indentation is taken away.
        args: its `sys.argv[1:]`.
        timeout: seconds until all of them are killed, which fails the test.
        env: more environment variables.
        folder: where it runs; None is the current one, a test's own.
        check: fail the test, and show what was said, when a process does not end with 0.
    """
    folder = folder or Path.cwd()
    number = len(list(folder.glob("processes-*.py")))
    script = folder / f"processes-{number}.py"
    script.write_text(textwrap.dedent(source))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    common = {
        "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    started, files = [], []
    for rank in range(nproc):
        out, err = (folder / f"processes-{number}-{rank}.{name}" for name in ("out", "err"))
        files.append((out, err))
        with out.open("wb") as to, err.open("wb") as problems:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(script), *map(str, args)],
                    env={**environment(env), **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=to,
                    stderr=problems,
                    start_new_session=True,
                )
            )
    late = _wait(started, timeout)
    results = [
        Result(rank, out.read_text(), err.read_text(), started[rank].returncode)
        for rank, (out, err) in enumerate(files)
    ]
    said = "\n".join(f"-- rank {r.rank} ended with {r.code}\n{r.out}{r.err}" for r in results)
    assert not late, f"killed after {timeout} s\n{said}"
    assert not check or not any(result.code for result in results), said
    return results


def _wait(started: list[subprocess.Popen[bytes]], timeout: float) -> bool:
    """Wait until all have ended, and return whether that took too long; nobody is left behind."""
    began, failed_at = time.monotonic(), None
    try:
        while any(process.poll() is None for process in started):
            now = time.monotonic()
            if now - began > timeout:
                return True
            if failed_at is None and any(process.returncode for process in started):
                failed_at = now
            if failed_at is not None and now - failed_at > GRACE:
                return False
            time.sleep(0.02)
        return False
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()


def told(nproc: int, source: str, *args: object, timeout: float) -> list[dict[str, Any]]:
    """Run a script in so many processes, and return what each told last, by rank: a line "told " and JSON.

    One process is a plain `python -c source`.
    """
    if nproc == 1:
        command = [sys.executable, "-c", source, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        assert not done.returncode, done.stderr
        outs = [done.stdout]
    else:
        outs = [result.out for result in run(nproc, source, *args, timeout=timeout)]
    lines = [[line for line in out.splitlines() if line.startswith("told ")][-1] for out in outs]
    return [json.loads(line.removeprefix("told ")) for line in lines]
