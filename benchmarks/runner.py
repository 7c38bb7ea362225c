"""Measurements in fresh processes: who runs when, and what came of it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.case import Case
from benchmarks.peers import PEERS

CHECKOUT = Path(__file__).resolve().parents[1]
BARS = ("hand", "trainkit")  # whose numbers are compared with bars: these run more rounds
TIMEOUT = 1800

Results = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]
"""By workload, case and peer: an answer for each round."""


def schedule(
    workload: ModuleType, peers: list[str], rounds: int | None, quick: bool
) -> Iterator[tuple[int, list[Case], str]]:
    """Yield (round, cases, peer): within a round peers take turns, each round begins with another one."""
    most, few = (1, 1) if quick else workload.ROUNDS
    cases: list[Case] = workload.CASES
    together = quick or getattr(workload, "TOGETHER", False)
    groups = [cases] if together else [[case] for case in cases]
    for number in range(rounds or most):
        for group in groups:
            there = [peer for peer in peers if any(peer in case.peers for case in group)]
            if number >= (rounds or few):
                there = [peer for peer in there if peer in BARS]
            turn = number % len(there) if there else 0
            for peer in there[turn:] + there[:turn]:
                yield number, [case for case in group if peer in case.peers], peer


def run_workload(
    name: str, workload: ModuleType, peers: list[str], rounds: int | None, quick: bool, tell: Callable[[str], None]
) -> tuple[dict[str, dict[str, list[dict[str, Any]]]], list[str]]:
    """Measure one workload; return the answers, and a line for each one that failed or was left out."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {case.name: {} for case in workload.CASES}
    problems: list[str] = []
    for number, cases, peer in schedule(workload, peers, rounds, quick):
        tell(f"{name}, round {number + 1}: {', '.join(case.name for case in cases)}: {peer}")
        answers = in_process(name, [case.name for case in cases], peer, quick)
        for case in cases:
            answer = answers[case.name]
            for problem in ("failed", "left_out"):
                if problem in answer:
                    problems.append(f"{name}/{case.name}: {peer} {problem.replace('_', ' ')}: {answer[problem]}")
                    break
            else:
                results[case.name].setdefault(peer, []).append({"round": number} | answer)
    return results, list(dict.fromkeys(problems))


def in_process(workload: str, cases: list[str], peer: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Return the answer for each case, or {"failed": why}."""
    with tempfile.TemporaryDirectory(prefix="trainkit-benchmark-") as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"workload": workload, "cases": cases, "peer": peer, "quick": quick}))
        code, printed = on_a_terminal([sys.executable, "-m", "benchmarks.child", str(request)], folder)
        answer = request.with_name("answer.json")
        if code == 0 and answer.exists():
            return json.loads(answer.read_text())
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or [f"exit code {code}"]
    why = next(
        (line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)), lines[-1]
    )
    return {case: {"failed": why[:300]} for case in cases}


def on_a_terminal(command: list[str], folder: str) -> tuple[int, str]:
    """Run a command on a terminal of 80 columns, as a user does: bars are drawn there as they are for people."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "xterm-256color",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "BENCH_STARTED": repr(time.time()),
        "PYTHONDONTWRITEBYTECODE": "",  # modules are compiled once, as where people work, and not at each start
    }
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    printed = bytearray()
    reader = threading.Thread(target=read_all, args=(ours, printed), daemon=True)
    reader.start()
    try:
        code = process.wait(TIMEOUT)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        reader.join(10)
        os.close(ours)
    return code, printed.decode(errors="replace").replace("\r", "\n")


def read_all(terminal: int, into: bytearray) -> None:
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            return
        if not part:
            return
        into.extend(part)
        del into[:-20_000]


def missing_peers(wanted: list[str]) -> list[str]:
    """Return a line for each wanted peer that is not installed."""
    return [
        f"{name} is left out: it is not installed (pip install {PEERS[name].package})"
        for name in wanted
        if not PEERS[name].installed
    ]
